import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, type MoeFusedGateOptions, moeFusedGate } from '../../lib/index.js';
import { type GateCase, gateExperts, gateFamilies, gateTokens, randomGateCase } from '../cases/gate.js';
import { uniformKey } from '../cases/gate_judge.js';
import { backends, contextOf } from './backends.js';
import { checkGate, gateTensors, oracleGate, runGate } from './gate.js';

describe.each(backends)('moe_fused_gate on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  // One row computed by hand, experts 4 and 5 equal
  describe('golden row', () => {
    const logits = [0.5, -1, 2, 0, 1.5, 1.5, -0.5, 3];
    const bias = [0, 0.5, -0.25, 0, 0, 0, 0.6, -0.5];
    const v3 = { topK: 3, scoring: 'sigmoid', groups: 4, topGroups: 2 } as const;
    const v2 = { topK: 3, groups: 4, topGroups: 2 } as const;
    const fused = { ...v3, renormalize: true, routedScalingFactor: 2.5, sharedExperts: 1 } as const;
    const all = { topK: 8, scoring: 'sqrtSoftplus' } as const;
    const goldens: [string, MoeFusedGateOptions, boolean, number[], number[]][] = [
      ['V3', v3, true, [6, 4, 5], [0.37754068, 0.8175745, 0.8175745]],
      [
        'V3 renormalised',
        { ...v3, renormalize: true },
        true,
        [6, 4, 5],
        [0.18758018, 0.40620995, 0.40620995],
      ],
      [
        'V3 renormalised and scaled',
        { ...v3, renormalize: true, routedScalingFactor: 2.5 },
        true,
        [6, 4, 5],
        [0.46895045, 1.0155249, 1.0155249],
      ],
      ['V3 fused, scale in weights', fused, true, [6, 4, 5, 8], [0.46895045, 1.0155249, 1.0155249, 1]],
      [
        'V3 fused, scale on output',
        { ...fused, scalePlacement: 'onOutput' },
        true,
        [6, 4, 5, 8],
        [0.18758018, 0.40620995, 0.40620995, 0.4],
      ],
      ['V2', v2, false, [7, 2, 3], [0.5013726, 0.18444464, 0.024961868]],
      [
        'V2 renormalised',
        { ...v2, renormalize: true },
        false,
        [7, 2, 3],
        [0.7053845, 0.25949642, 0.035119023],
      ],
      [
        'square root of softplus',
        all,
        false,
        [7, 2, 4, 5, 0, 3, 6, 1],
        [1.7460204, 1.458399, 1.3043823, 1.3043823, 0.9869534, 0.83255464, 0.6885325, 0.5596978],
      ],
    ];

    it.each(goldens)('%s', async (_, options, biased, ids, weights) => {
      const result = moeFusedGate(
        {
          logits: context.tensor('f32', [1, 8], Float32Array.from(logits)),
          ...(biased ? { bias: context.tensor('f32', [8], Float32Array.from(bias)) } : {}),
        },
        options,
      );
      expect([...(await result.ids.read())]).toEqual(ids);
      const actual = await result.weights.read();
      for (const [c, weight] of weights.entries()) expect(Math.abs(actual[c] - weight)).toBeLessThan(2e-7);
    });
  });

  describe.each(Object.entries(gateFamilies))('%s', (_, family) => {
    it.each(gateTokens)('%i tokens', async (tokens) => {
      const given = { tokens, ...family };
      checkGate(given, await runGate(context, given));
    });

    it('every kind of row', async () => {
      const given: GateCase = { tokens: 33, kind: 'mixed', ...family, dtype: 'bf16' };
      checkGate(given, await runGate(context, given));
    });
  });

  it.each(gateExperts)('%i experts, topK up to the limit', async (experts) => {
    for (const topK of new Set([1, Math.min(2, experts), Math.min(22, experts), Math.min(32, experts)])) {
      for (const scoring of ['softmax', 'sigmoid', 'sqrtSoftplus'] as const) {
        const given: GateCase = {
          tokens: 13,
          experts,
          kind: 'mixed',
          options: { topK, scoring, renormalize: true },
        };
        checkGate(given, await runGate(context, given));
      }
    }
  });

  // Group counts and sizes around those that kernels like: one expert per group, odd divisors, groups > 32
  it.each([
    [8, 8, 4],
    [60, 5, 2],
    [60, 15, 7],
    [60, 20, 3],
    [64, 32, 5],
    [160, 8, 3],
    [160, 32, 32],
    [256, 8, 4],
    [256, 16, 4],
    [256, 32, 9],
    [256, 64, 40],
    [384, 3, 2],
    [384, 24, 11],
    [512, 512, 100],
    [1024, 32, 8],
    [1024, 2, 1],
  ])('%i experts in %i groups of which %i stay', async (experts, groups, topGroups) => {
    const topK = Math.min(8, (experts / groups) * topGroups);
    for (const groupScore of ['max', 'top2Sum'] as const) {
      for (const bias of [undefined, 'normal', 'special'] as const) {
        const given: GateCase = {
          tokens: groups > 100 ? 3 : 24, // judging is quadratic in groups
          experts,
          kind: 'mixed',
          ...(bias === undefined ? {} : { bias }),
          options: { topK, groups, topGroups, groupScore, scoring: 'sigmoid' },
        };
        checkGate(given, await runGate(context, given));
      }
    }
  });

  it.each(Array.from({ length: 160 }, (_, seed) => seed))('random case %i', async (seed) => {
    const given = randomGateCase(seed);
    checkGate(given, await runGate(context, given, seed % 2 === 0 ? 'number' : 'tensor'));
  });

  it('most rows of the usual kinds are unambiguous, so that they were compared with the oracle', async () => {
    for (const family of Object.values(gateFamilies)) {
      const given: GateCase = { tokens: 127, ...family };
      const { valid, compared } = checkGate(given, await runGate(context, given));
      expect(compared).toBeGreaterThan(0.95 * valid);
    }
  });

  it.each([0, 1, 0xffffffff])('uniform choices from seed %i are the documented hash', async (seed) => {
    const given: GateCase = { tokens: 31, experts: 60, options: { topK: 32, selection: 'uniform', seed } };
    const { ids } = await runGate(context, given);
    for (let t = 0; t < given.tokens; t++) {
      const keys = Array.from({ length: given.experts }, (_, e) => uniformKey(seed, t, e));
      const expected = [...keys.keys()].sort((a, b) => keys[b] - keys[a] || a - b).slice(0, 32);
      expect([...ids.subarray(t * 32, (t + 1) * 32)]).toEqual(expected);
    }
  });

  it('uniform choices spread evenly whatever the logits', async () => {
    const options: MoeFusedGateOptions = { topK: 8, selection: 'uniform', sharedExperts: 1, seed: 3 };
    const given: GateCase = { tokens: 2048, experts: 64, kind: 'skewed', slots: 65, options };
    const { load } = await runGate(context, given);
    const added = Array.from(load!, (count, slot) => Number(count) - slot);
    expect(added[64]).toBe(2048);
    for (const count of added.slice(0, 64)) expect(Math.abs(count - 256)).toBeLessThan(5 * Math.sqrt(256));
  });

  it('is bitwise equal from run to run', async () => {
    for (const seed of [3, 14, 15]) {
      const given = { ...randomGateCase(seed), tokens: 127 };
      const { validTokens: _, ...unpadded } = given;
      expect(await runGate(context, unpadded)).toEqual(await runGate(context, unpadded));
    }
  });

  it('replays with new logits and a new count of valid tokens', async () => {
    const given: GateCase = {
      tokens: 33,
      experts: 256,
      bias: 'normal',
      validTokens: 33,
      rounds: 2,
      slots: 300,
      options: { ...gateFamilies['deepseek-v3'].options, captureLogicalIds: true },
    };
    const inputs = gateTensors(context, given, 'tensor');
    const step = context.capture(() => moeFusedGate(inputs, given.options));
    const { ids, weights, logicalIds } = step.output;
    let before = await inputs.load!.read();
    for (const [seed, validTokens] of [
      [1, 33],
      [2, 5],
      [3, 0],
    ]) {
      const next = { ...given, seed, validTokens };
      const fresh = gateTensors(context, next, 'tensor');
      for (const name of ['logits', 'bias', 'validTokens', 'idMap'] as const) {
        const tensor = inputs[name];
        if (tensor !== undefined && typeof tensor === 'object') {
          tensor.write((await (fresh[name] as typeof tensor).read()) as never);
        }
      }
      step.replay();
      const result = {
        ids: await ids.read(),
        weights: await weights.read(),
        logicalIds: await logicalIds!.read(),
      };
      checkGate(next, result);
      const load = await inputs.load!.read();
      const expected = oracleGate(next).ids.filter((id) => id >= 0 && id < 300).length;
      const added = load.reduce((sum, count, slot) => sum + Number(count - before[slot]), 0);
      expect(added).toBe(expected);
      before = load;
    }
    step.dispose();
  });
});
