// Contract 5: rows at and beyond validTokens are padding: id -1, weight 0, computed by nobody, counted nowhere.
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type Context,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeFusedGate,
  moeRouter,
  sharedExperts,
} from '../../lib/index.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from '../ops/backends.js';
import { packCase } from '../ops/packed.js';

const [tokens, experts, hidden] = [33, 16, 8];
const options = { topK: 3, sharedExperts: 2, captureLogicalIds: true } as const;

describe.each(backends)('padding on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  const logitsOf = (seed: number) => new Random(seed).normals(tokens * experts);

  it.each([0, 1, 32, 33])('%i valid tokens, as a number and as a tensor', async (valid) => {
    const logits = context.tensor('f32', [tokens, experts], logitsOf(1));
    const whole = moeFusedGate({ logits }, options);
    const [ids, weights] = [await whole.ids.read(), await whole.weights.read()];
    for (const validTokens of [valid, context.tensor('i32', [1], Int32Array.of(valid))]) {
      const load = context.tensor('i64', [experts + 2]);
      const padded = moeFusedGate({ logits, validTokens, load }, options);
      expect(await padded.ids.read()).toEqual(ids.map((id, i) => (i < 5 * valid ? id : -1)));
      expect(await padded.weights.read()).toEqual(weights.map((weight, i) => (i < 5 * valid ? weight : 0)));
      expect((await padded.logicalIds!.read()).subarray(3 * valid).every((id) => id === -1)).toBe(true);
      const counts = await load.read();
      expect(counts.reduce((sum, count) => sum + count, 0n)).toBe(BigInt(5 * valid));
      expect([counts[experts], counts[experts + 1]]).toEqual([BigInt(valid), BigInt(valid)]);
    }
  });

  it.each([
    [-5, 0],
    [1000, 33],
  ])('a tensor of %i means %i', async (given, valid) => {
    const logits = context.tensor('f32', [tokens, experts], logitsOf(1));
    const validTokens = context.tensor('i32', [1], Int32Array.of(given));
    const ids = await moeFusedGate({ logits, validTokens }, options).ids.read();
    expect(ids.filter((id) => id === -1).length).toBe(5 * (tokens - valid));
  });

  it('a map does not bring padded rows back', async () => {
    const logits = context.tensor('f32', [tokens, experts], logitsOf(1));
    const idMap = context.tensor(
      'i32',
      [1, experts + 2],
      Int32Array.from({ length: experts + 2 }, (_, i) => i),
    );
    const ids = await moeFusedGate({ logits, idMap, validTokens: 4 }, options).ids.read();
    expect(ids.subarray(20).every((id) => id === -1)).toBe(true);
  });

  it('NaN in padded rows reaches nothing, and a replay can change how many there are', async () => {
    const random = new Random(2);
    const x = random.normals(tokens * hidden);
    const xs = context.tensor('f32', [tokens, hidden]);
    const logits = context.tensor('f32', [tokens, experts]);
    const validTokens = context.tensor('i32', [1]);
    using packed = packCase(context, { slots: experts + 2, hidden, intermediate: 4 });
    const forward = () => {
      const { ids, weights } = moeFusedGate({ logits, validTokens }, options);
      const { rows, counts, offsets, inverse } = moeDispatch({ ids, hidden: xs }, { experts: experts + 2 });
      const outputs = moeExperts({ rows: rows!, counts, offsets, experts: packed });
      return {
        counts,
        fused: fusedMoe({ hidden: xs, ids, weights, experts: packed }),
        combined: moeCombine({ rows: outputs, inverse, weights }),
      };
    };
    using step = context.capture(forward);
    let whole: Float32Array | undefined;
    for (const valid of [33, 5, 0, 17]) {
      xs.write(x.map((value, i) => (i < valid * hidden ? value : Number.NaN)));
      logits.write(logitsOf(1).map((value, i) => (i < valid * experts ? value : Number.NaN)));
      validTokens.write(Int32Array.of(valid));
      step.replay();
      const fused = await step.output.fused.read();
      whole ??= fused;
      const expected = whole.map((value, i) => (i < valid * hidden ? value : 0));
      for (const actual of [fused, await step.output.combined.read()]) {
        for (const [i, value] of actual.entries()) expect(Math.abs(value - expected[i])).toBeLessThan(1e-5);
        expect(actual.subarray(valid * hidden).every((value) => value === 0)).toBe(true);
      }
      const counts = await step.output.counts.read();
      expect(counts.reduce((sum, count) => sum + count, 0)).toBe(5 * valid);
    }
  });

  it('dense ops compute every row, and padded ones reach no other', async () => {
    const valid = 5;
    const x = new Random(3).normals(tokens * hidden);
    const weight = context.tensor('f32', [experts, hidden], new Random(4).normals(experts * hidden));
    using dense = packCase(context, { slots: 1, hidden, intermediate: 4 });
    const run = async (values: Float32Array) => {
      const xs = context.tensor('f32', [tokens, hidden], values);
      const outputs = [
        moeRouter({ hidden: xs, weight }),
        sharedExperts({ hidden: xs, experts: dense, routed: xs }),
      ];
      return Promise.all(outputs.map((output) => output.read()));
    };
    const whole = await run(x);
    const padded = await run(x.map((value, i) => (i < valid * hidden ? value : Number.NaN)));
    for (const [i, values] of padded.entries()) {
      const end = (valid * values.length) / tokens;
      expect(values.subarray(0, end)).toEqual(whole[i].subarray(0, end));
      expect(values.subarray(end).every(Number.isNaN)).toBe(true);
    }
  });
});
