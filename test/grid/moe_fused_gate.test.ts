import { beforeAll, describe, expect, it } from 'vitest';
import type { Context } from '../../lib/index.js';
import { type GateCase, gateFamilies, gateInputs, resolveGateOptions } from '../cases/gate.js';
import { gap, judgedRow, judgeRow } from '../cases/gate_judge.js';
import { contextOf } from '../ops/backends.js';
import { checkManyRows, type GateResult, oracleGate, runGate } from '../ops/gate.js';
import { expectSameBits, natives } from './sizes.js';

/** Rows of every kind, an odd number of them and no multiple of any block. */
const PERIOD = 331;
const sizes = [511, 512, 513, 4097, 40000] as const;
const raw = (result: GateResult) => Object.fromEntries(Object.entries(result));

describe.each(natives)('moe_fused_gate on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });
  /** As many as the oracle gets through in seconds; the CPU's loop over rows needs fewer. */
  const many = backend === 'cpu' ? 4097 : 40000;

  // Which expert a uniform choice takes depends on the row's number: no rows repeat
  const families = Object.entries(gateFamilies).filter(([, { options }]) => options.selection !== 'uniform');

  describe.each(families)('%s', (_, family) => {
    // Kinds of all rows in turn: ties, NaN, infinities, all equal, all NaN
    it.each(sizes)('%i tokens', async (tokens) => {
      const dtype = tokens % 2 === 1 ? 'f32' : 'bf16';
      const given = { tokens, period: PERIOD, kind: 'mixed', ...family, dtype } as const;
      const result = await runGate(context, given);
      checkManyRows(given, result);
      expectSameBits(raw(await runGate(context, given)), raw(result), 'a second run');
    });
  });

  const v3 = { period: PERIOD, ...gateFamilies['deepseek-v3'] };

  it('every row like the oracle where none repeats', async () => {
    const given: GateCase = { ...gateFamilies['deepseek-v3'], tokens: many, seed: 5 };
    const [actual, expected] = [await runGate(context, given), oracleGate(given)];
    const inputs = gateInputs(given);
    const options = resolveGateOptions(given);
    for (let t = 0; t < many; t++) {
      const [ids, weights] = [actual.ids, actual.weights].map((all) => all.subarray(9 * t, 9 * t + 9));
      const equal = ids.every((id, c) => {
        const [at, weight] = [9 * t + c, expected.weights[9 * t + c]];
        return id === expected.ids[at] && Math.abs(weights[c] - weight) <= gap * Math.max(1, weight);
      });
      // What differs is a near tie, or wrong
      const complaint = equal ? undefined : judgeRow(judgedRow(inputs, options, t), options, ids, weights);
      if (complaint !== undefined) expect.fail(`row ${t}: ${complaint}`);
    }
  });

  it('uniform choices like the oracle', async () => {
    const given: GateCase = { tokens: many, ...gateFamilies['forced balance'], experts: 64, period: 1 };
    expectSameBits({ ids: (await runGate(context, given)).ids }, { ids: oracleGate(given).ids });
  });

  it.each([4097, 40000])('%i tokens with a map of 16 rounds, loads and padding', async (tokens) => {
    for (const kind of ['mixed', 'skewed'] as const) {
      const given = {
        ...v3,
        tokens,
        kind,
        rounds: 16,
        slots: 320,
        validTokens: tokens - 1234,
        options: { ...v3.options, captureLogicalIds: true },
      };
      const result = await runGate(context, given, kind === 'mixed' ? 'tensor' : 'number');
      checkManyRows(given, result);
      expectSameBits(raw(await runGate(context, given)), raw(result), 'a second run');
    }
  });

  it.each(['equal', 'allNaN', 'allInfinity'] as const)(
    '40000 rows that are all %s: the same experts take all',
    async (kind) => {
      const given = { ...v3, tokens: 40000, kind, bias: undefined, slots: 257 };
      const { bias: _, ...unbiased } = given;
      const result = await runGate(context, unbiased);
      checkManyRows(unbiased, result);
      for (const id of [0, 1, 7, 256]) expect(result.load![id]).toBe(BigInt(id + 40000));
    },
  );

  it.each([
    [160, 8, 3, 6],
    [512, 16, 8, 10],
    [1024, 1, 1, 32],
    [60, 1, 1, 4],
    [384, 24, 11, 8],
  ])(
    '%i experts in %i groups of which %i stay, top %i, 4097 tokens',
    async (experts, groups, topGroups, topK) => {
      for (const scoring of ['softmax', 'sigmoid'] as const) {
        const given: GateCase & { period: number } = {
          tokens: 4097,
          period: 97,
          experts,
          kind: 'mixed',
          bias: 'normal',
          dtype: 'bf16',
          options: { topK, groups, topGroups, scoring, renormalize: true },
        };
        checkManyRows(given, await runGate(context, given));
      }
    },
  );
});
