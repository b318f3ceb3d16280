// Contract 1: which ids there are, that they are unique, how ties fall, how slots are ordered.
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, type MoeFusedGateOptions, moeFusedGate } from '../../lib/index.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from '../ops/backends.js';

const scorings = ['softmax', 'sigmoid', 'sqrtSoftplus'] as const;

describe.each(backends)('ids on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  async function gate(
    logits: ArrayLike<number>,
    experts: number,
    options: MoeFusedGateOptions,
    bias?: ArrayLike<number>,
  ) {
    const { ids, weights } = moeFusedGate(
      {
        logits: context.tensor('f32', [logits.length / experts, experts], Float32Array.from(logits)),
        ...(bias === undefined ? {} : { bias: context.tensor('f32', [experts], Float32Array.from(bias)) }),
      },
      options,
    );
    return { ids: [...(await ids.read())], weights: [...(await weights.read())] };
  }

  it('any bits in logits and bias give unique ids inside the range, and weights that are numbers', async () => {
    const cases = fc.record({
      groupsOf: fc.constantFrom([1, 5], [2, 3], [4, 8], [8, 2], [3, 1]),
      bits: fc.array(fc.integer({ min: 0, max: 0xffffffff }), { minLength: 64, maxLength: 64 }),
      scoring: fc.constantFrom(...scorings),
      selection: fc.constantFrom('score' as const, 'logits' as const, 'uniform' as const),
      biased: fc.boolean(),
      renormalize: fc.boolean(),
      sharedExperts: fc.integer({ min: 0, max: 8 }),
      zeros: fc.integer({ min: 0, max: 4 }),
      pick: fc.integer({ min: 0, max: 1000 }),
    });
    await fc.assert(
      fc.asyncProperty(cases, async ({ groupsOf, bits, zeros, pick, biased, ...rest }) => {
        const grouped = rest.selection === 'score';
        const [groups, size] = grouped ? groupsOf : [1, groupsOf[0] * groupsOf[1]];
        const experts = groups * size;
        const topGroups = 1 + (pick % groups);
        const topK = 1 + (pick % (topGroups * size));
        const zeroExperts = Math.min(zeros, experts - 1);
        const { sharedExperts } = rest;
        const values = new Float32Array(Uint32Array.from(bits).buffer);
        const options = { ...rest, groups, topGroups, topK, zeroExperts };
        const bias = biased && grouped ? values.slice(32, 32 + experts) : undefined;
        const { ids, weights } = await gate(values.slice(0, experts), experts, options, bias);
        const routed = experts - zeroExperts;
        expect(new Set(ids).size).toBe(topK + sharedExperts);
        for (const id of ids.slice(0, topK)) {
          expect(
            (id >= 0 && id < routed) || (id >= routed + sharedExperts && id < experts + sharedExperts),
          ).toBe(true);
        }
        expect(ids.slice(topK)).toEqual(Array.from({ length: sharedExperts }, (_, j) => routed + j));
        expect(weights.some(Number.isNaN)).toBe(false);
        expect(weights.every((weight) => weight >= 0)).toBe(true);
        if (rest.renormalize) {
          const sum = weights.slice(0, topK).reduce((a, b) => a + b, 0);
          if (sum !== 0) expect(Math.abs(sum - 1)).toBeLessThan(1e-5);
        }
      }),
      { seed: 1, numRuns: 300 },
    );
  });

  it.each(scorings)('equal logits choose the lowest ids and groups (%s)', async (scoring) => {
    for (const [experts, groups, topGroups, topK] of [
      [8, 1, 1, 3],
      [60, 5, 2, 20],
      [256, 8, 4, 8],
      [256, 1, 1, 32],
      [1024, 32, 3, 32],
    ]) {
      for (const groupScore of ['max', 'top2Sum'] as const) {
        const options = { topK, scoring, groups, topGroups, groupScore };
        const { ids } = await gate(new Float32Array(experts).fill(-0.5), experts, options);
        expect(ids).toEqual([...Array(topK).keys()]);
      }
    }
  });

  it('zeros of both signs are equal', async () => {
    for (const selection of ['logits', 'score'] as const) {
      expect((await gate([-0, 0, -0, 0], 4, { topK: 3, selection })).ids).toEqual([0, 1, 2]);
    }
    expect((await gate([1, 1, 1], 3, { topK: 2 }, [-0, 0, 0])).ids).toEqual([0, 1]);
  });

  it('ties between a bias and a score go to the lower id too', async () => {
    // sigmoid(0) = 0.5 exactly, so that 0.5 + 0.25 and 0.5 + 0.25 tie at ids 1 and 3
    const { ids, weights } = await gate(
      [0, 0, 0, 0],
      4,
      { topK: 2, scoring: 'sigmoid' },
      [0, 0.25, -1, 0.25],
    );
    expect(ids).toEqual([1, 3]);
    expect(weights).toEqual([0.5, 0.5]);
  });

  it('groups tie by lower id, their own ties aside', async () => {
    // Groups {0,1}, {2,3}, {4,5}: sums 0.5+0.5, 0.75+0.25, 0.5+0.5 are all 1
    const bias = [0, 0, 0.25, -0.25, 0, 0];
    const options = { topK: 2, scoring: 'sigmoid', groups: 3, topGroups: 1 } as const;
    expect((await gate(Array(6).fill(0), 6, options, bias)).ids).toEqual([0, 1]);
    expect((await gate(Array(6).fill(0), 6, { ...options, groupScore: 'max' }, bias)).ids).toEqual([2, 3]);
    expect((await gate(Array(6).fill(0), 6, { ...options, topK: 4, topGroups: 2 }, bias)).ids).toEqual([
      2, 0, 1, 3,
    ]);
  });

  it('slots descend by biased choice, not by weight', async () => {
    const { ids, weights } = await gate([2, 0, 1], 3, { topK: 3, scoring: 'sigmoid' }, [-1, 1, 0]);
    expect(ids).toEqual([1, 2, 0]);
    expect(weights[0]).toBeLessThan(weights[1]);
  });

  it('zero experts come after the shared ones', async () => {
    const options = { topK: 3, zeroExperts: 2, sharedExperts: 2 };
    expect((await gate([1, 5, 2, 4, 3], 5, options)).ids).toEqual([1, 5, 6, 3, 4]);
  });

  it('renaming the experts renames the choices', async () => {
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 0, max: 1e9 }), async (seed) => {
        const random = new Random(seed);
        const [experts, topK] = [16, 5];
        const logits = random.distinct(experts, 1000).map((v) => v / 100 - 5); // far apart: no ties, no near ties
        const names = random.distinct(experts, experts);
        const renamed = new Float32Array(experts);
        names.forEach((name, e) => {
          renamed[name] = logits[e];
        });
        const options = { topK, scoring: random.pick(scorings), renormalize: random.chance(0.5) };
        const plain = await gate(logits, experts, options);
        const other = await gate(renamed, experts, options);
        expect(other.ids).toEqual(plain.ids.map((e) => names[e]));
        for (const [c, weight] of plain.weights.entries())
          expect(Math.abs(other.weights[c] - weight)).toBeLessThan(2e-6);
      }),
      { seed: 7, numRuns: 60 },
    );
  });

  it('a row does not depend on the other rows', async () => {
    const logits = new Random(3).normals(33 * 24);
    const options: MoeFusedGateOptions = { topK: 4, groups: 4, topGroups: 2, renormalize: true };
    const all = await gate(logits, 24, options);
    for (const t of [0, 1, 17, 32]) {
      const one = await gate(logits.subarray(t * 24, (t + 1) * 24), 24, options);
      expect(one.ids).toEqual(all.ids.slice(4 * t, 4 * t + 4));
      expect(one.weights).toEqual(all.weights.slice(4 * t, 4 * t + 4));
    }
  });
});
