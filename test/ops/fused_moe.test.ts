import { beforeAll, describe, expect, it } from 'vitest';
import {
  type Context,
  type FloatDType,
  type FusedMoeOptions,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
} from '../../lib/index.js';
import { fused_moe } from '../../lib/oracle/fused_moe.js';
import {
  clampedSwiGLU,
  denseLayer,
  type ExpertsCase,
  expertArrays,
  oracleExperts,
  type RoutingKind,
  routing,
} from '../cases/experts.js';
import { floatDTypes, relativeNorm, relativeTolerance, rounded } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from './backends.js';
import { packCase } from './packed.js';

interface FusedCase extends ExpertsCase {
  readonly tokens: number;
  readonly columns: number;
  /** Ids are drawn below this; default: the slots. */
  readonly experts?: number;
  readonly kind?: RoutingKind;
  /** Dtype of the hidden states; `dtype` is that of the weights. Default: the same. */
  readonly hiddenDType?: FloatDType;
  readonly options?: FusedMoeOptions;
}

function arrays(given: FusedCase) {
  const { tokens, columns, hidden, dtype = 'f32', hiddenDType = dtype, kind = 'uniform' } = given;
  const random = new Random((given.seed ?? 1) * 101);
  const x = rounded(hiddenDType, random.normals(tokens * hidden));
  return { x, ...routing(kind, tokens, columns, given.experts ?? given.slots, random) };
}

function oracle(given: FusedCase): Float32Array {
  const { tokens, columns, hidden, slots, options = {} } = given;
  const { x, ids, weights } = arrays(given);
  const { firstExpert = 0 } = options;
  const output = { shape: [tokens, hidden], data: new Float32Array(tokens * hidden) };
  fused_moe(
    {
      hidden: { shape: [tokens, hidden], data: x },
      ids: { shape: [tokens, columns], data: ids },
      weights: { shape: [tokens, columns], data: weights },
      experts: oracleExperts(given),
    },
    {
      outputScale: 1,
      firstExpert,
      zeroExperts: 0,
      firstZeroExpert: firstExpert + slots,
      weightsOnInput: false,
      ...options,
    },
    { output },
  );
  return output.data;
}

function upload(context: Context, given: FusedCase) {
  const { tokens, columns, hidden, dtype = 'f32', hiddenDType = dtype } = given;
  const { x, ids, weights } = arrays(given);
  return {
    hidden: context.tensor(hiddenDType, [tokens, hidden], x),
    ids: context.tensor('i32', [tokens, columns], ids),
    weights: context.tensor('f32', [tokens, columns], weights),
  };
}

async function run(context: Context, given: FusedCase): Promise<Float32Array> {
  using experts = packCase(context, given);
  const output = fusedMoe({ ...upload(context, given), experts }, given.options);
  expect(output.dtype).toBe(given.hiddenDType ?? given.dtype ?? 'f32');
  return output.read();
}

/** Against the oracle and, independently of it, against the dense f64 layer. */
async function check(context: Context, given: FusedCase): Promise<void> {
  const actual = await run(context, given);
  const { x, ids, weights } = arrays(given);
  const dense = denseLayer(given, expertArrays(given), {
    hidden: x,
    ids,
    weights,
    columns: given.columns,
    ...given.options,
  });
  const tolerance = relativeTolerance[given.hiddenDType ?? given.dtype ?? 'f32'];
  expect(relativeNorm(actual, oracle(given)), JSON.stringify(given)).toBeLessThan(tolerance);
  expect(relativeNorm(actual, dense), JSON.stringify(given)).toBeLessThan(tolerance);
}

const base: FusedCase = { tokens: 33, columns: 4, slots: 9, hidden: 65, intermediate: 33 };

describe.each(backends)('fused_moe on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it.each([0, 1, 2, 31, 32, 33, 127])('%i tokens', async (tokens) => {
    for (const [slots, columns, hidden, intermediate] of [
      [1, 1, 1, 1],
      [3, 2, 7, 5],
      [8, 2, 64, 32],
      [60, 9, 33, 17],
      [257, 9, 16, 8],
    ]) {
      await check(context, { tokens, slots, columns, hidden, intermediate });
    }
  });

  it.each(['uniform', 'skewed', 'one', 'none', 'holes'] as const)('%s routing', async (kind) => {
    await check(context, { ...base, kind });
  });

  it('more experts than rows', async () => {
    await check(context, { ...base, tokens: 3, slots: 1024, hidden: 8, intermediate: 4 });
  });

  it.each(floatDTypes)('many rows of one expert, wide and long matrices in %s', async (dtype) => {
    await check(context, { tokens: 150, columns: 2, slots: 2, hidden: 264, intermediate: 260, dtype });
    await check(context, {
      tokens: 3,
      columns: 2,
      slots: 2,
      hidden: 520,
      intermediate: 528,
      dtype,
      biases: true,
    });
  });

  // 16 values are read where they lie, 2 are copied first
  describe.skipIf(backend === 'oracle')('more tokens than fit scratch memory', () => {
    it.each([2, 16])('hidden %i', async (hidden) => {
      const [tokens, columns, slots] = [602, 8, 8];
      using experts = packCase(context, { slots, hidden, intermediate: 16384 });
      const forward = (count: number) => {
        const values = Float32Array.from(
          { length: hidden * count },
          (_, i) => (i % (13 * hidden)) / (6 * hidden) - 1,
        );
        const ids = Int32Array.from({ length: columns * count }, (_, i) => (i * 3) % slots);
        return fusedMoe({
          hidden: context.tensor('f32', [count, hidden], values),
          ids: context.tensor('i32', [count, columns], ids),
          weights: context.tensor('f32', [count, columns], new Float32Array(ids.length).fill(0.5)),
          experts,
        }).read();
      };
      const [many, few] = [await forward(tokens), await forward(13)]; // rows repeat after 13
      expect(many.every((value, i) => value === few[i % (13 * hidden)])).toBe(true);
    });
  });

  describe.each(floatDTypes)('hidden states in %s', (hiddenDType) => {
    it.each(floatDTypes)('weights in %s', async (dtype) => {
      await check(context, { ...base, hiddenDType, dtype, biases: true, swiglu: clampedSwiGLU });
      await check(context, { ...base, hiddenDType, dtype, hidden: 129, intermediate: 64 });
    });

    it('weights on the input', async () => {
      await check(context, { ...base, dtype: hiddenDType, biases: true, options: { weightsOnInput: true } });
    });

    it('zero experts', async () => {
      const options = { zeroExperts: 4, firstZeroExpert: 9, outputScale: 2.5 };
      await check(context, { ...base, dtype: hiddenDType, experts: 13, options });
      await check(context, {
        ...base,
        dtype: hiddenDType,
        experts: 13,
        options: { ...options, weightsOnInput: true },
      });
    });

    it('one rank of several: local experts only, zero experts far away', async () => {
      const options = { firstExpert: 7, zeroExperts: 3, firstZeroExpert: 24 };
      await check(context, { ...base, dtype: hiddenDType, experts: 27, kind: 'holes', options });
    });
  });

  it('swiglu without biases, limits and offsets of every kind', async () => {
    for (const swiglu of [
      { alpha: 1.702 },
      { beta: 1 },
      { limit: 0.5 },
      { alpha: 0.5, beta: -1, limit: 2 },
    ]) {
      await check(context, { ...base, swiglu });
    }
  });

  it('the ranks of an expert-parallel group add up to the whole', async () => {
    const given = { ...base, slots: 12, experts: 12 };
    const arraysOf = expertArrays(given);
    const sum = new Float64Array(given.tokens * given.hidden);
    for (const firstExpert of [0, 4, 8]) {
      const part = { ...given, slots: 4 };
      const [w13, w2] = [2 * given.intermediate * given.hidden, given.intermediate * given.hidden];
      using experts = packCase(context, part, {
        w13: arraysOf.w13.slice(firstExpert * w13, (firstExpert + 4) * w13),
        w2: arraysOf.w2.slice(firstExpert * w2, (firstExpert + 4) * w2),
      });
      const output = fusedMoe({ ...upload(context, given), experts }, { firstExpert, firstZeroExpert: 12 });
      for (const [i, value] of (await output.read()).entries()) sum[i] += value;
    }
    expect(relativeNorm(sum, oracle(given))).toBeLessThan(relativeTolerance.f32);
  });

  it.each(floatDTypes)('equals dispatch, experts and combine in %s', async (dtype) => {
    const given: FusedCase = { ...base, dtype, experts: 11, biases: true, kind: 'holes' };
    const options = { zeroExperts: 2, firstZeroExpert: 9, outputScale: 2.5 };
    using experts = packCase(context, given);
    const { hidden, ids, weights } = upload(context, given);
    const { rows, counts, offsets, inverse } = moeDispatch({ ids, hidden }, { experts: 9, blockSize: 4 });
    const outputs = moeExperts({ rows: rows!, counts, offsets, experts });
    const combined = moeCombine({ rows: outputs, inverse, weights, ids, hidden }, options);
    const fused = await fusedMoe({ hidden, ids, weights, experts }, options).read();
    expect(relativeNorm(await combined.read(), fused)).toBeLessThan(relativeTolerance[dtype]);
  });

  it('is bitwise equal from run to run', async () => {
    for (const dtype of floatDTypes) {
      const given: FusedCase = { ...base, tokens: 127, kind: 'skewed', dtype };
      expect(await run(context, given)).toEqual(await run(context, given));
    }
  });

  it('replays with new hidden states and routing', async () => {
    const tensors = upload(context, { ...base, kind: 'none', seed: 8 });
    using experts = packCase(context, base);
    using step = context.capture(() => fusedMoe({ ...tensors, experts }));
    for (const kind of ['uniform', 'skewed', 'none'] as const) {
      const next = { ...base, kind };
      const { x, ids, weights } = arrays(next);
      tensors.hidden.write(x);
      tensors.ids.write(ids);
      tensors.weights.write(weights);
      step.replay();
      expect(relativeNorm(await step.output.read(), oracle(next))).toBeLessThan(relativeTolerance.f32);
    }
  });
});
