import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, createContext, moeExperts } from '../../lib/index.js';
import { moe_dispatch } from '../../lib/oracle/moe_dispatch.js';
import { moe_experts } from '../../lib/oracle/moe_experts.js';
import {
  clampedSwiGLU,
  denseExpert,
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

interface RowsCase extends ExpertsCase {
  readonly tokens: number;
  readonly columns: number;
  readonly kind?: RoutingKind;
  readonly blockSize?: number;
  readonly weighted?: boolean;
}

/** Dispatched rows of a case, with NaN in the places that hold no row. */
function dispatched(given: RowsCase) {
  const { tokens, columns, slots, hidden, dtype = 'f32', kind = 'uniform', blockSize = 0 } = given;
  const random = new Random(given.seed ?? 1);
  const { ids, weights } = routing(kind, tokens, columns, slots, random);
  const capacity = blockSize === 0 ? ids.length : ids.length * blockSize;
  const tensor = (length: number) => ({ shape: [length], data: new Int32Array(length) });
  const places = {
    order: tensor(capacity),
    inverse: tensor(ids.length),
    counts: tensor(slots),
    offsets: tensor(slots + 1),
  };
  moe_dispatch(
    { ids: { shape: [tokens, columns], data: ids } },
    { experts: slots, firstExpert: 0, blockSize },
    places,
  );
  const rows = rounded(dtype, random.normals(capacity * hidden));
  for (let p = 0; p < capacity; p++) {
    if (places.order.data[p] === ids.length) rows.fill(Number.NaN, p * hidden, (p + 1) * hidden);
  }
  return {
    rows: { shape: [capacity, hidden], data: rows },
    weights: { shape: [tokens, columns], data: weights },
    order: places.order,
    counts: places.counts,
    offsets: places.offsets,
  };
}

function oracle(given: RowsCase): Float32Array {
  const { weights, order, ...inputs } = dispatched(given);
  const output = { shape: inputs.rows.shape, data: new Float32Array(inputs.rows.data.length) };
  const onInput = given.weighted ? { weights, order } : {};
  moe_experts({ ...inputs, experts: oracleExperts(given), ...onInput }, {}, { output });
  return output.data;
}

async function run(context: Context, given: RowsCase): Promise<Float32Array> {
  const { rows, counts, offsets, order, weights } = dispatched(given);
  using experts = packCase(context, given);
  const i32 = ({ shape, data }: { shape: number[]; data: Int32Array }) => context.tensor('i32', shape, data);
  const output = moeExperts({
    rows: context.tensor(given.dtype ?? 'f32', rows.shape, rows.data),
    counts: i32(counts),
    offsets: i32(offsets),
    experts,
    ...(given.weighted
      ? { order: i32(order), weights: context.tensor('f32', weights.shape, weights.data) }
      : {}),
  });
  expect(output.dtype).toBe(given.dtype ?? 'f32');
  return output.read();
}

async function check(context: Context, given: RowsCase): Promise<void> {
  const error = relativeNorm(await run(context, given), oracle(given));
  expect(error, JSON.stringify(given)).toBeLessThan(relativeTolerance[given.dtype ?? 'f32']);
}

const base = { tokens: 33, columns: 3, slots: 8, hidden: 33, intermediate: 17 };

describe.each(backends)('moe_experts on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it.each([0, 1, 2, 31, 32, 33, 127])('%i tokens', async (tokens) => {
    for (const [slots, hidden, intermediate] of [
      [1, 1, 1],
      [3, 7, 5],
      [8, 64, 32],
      [60, 33, 17],
      [257, 16, 8],
    ]) {
      await check(context, {
        tokens,
        columns: Math.min(4, slots),
        slots,
        hidden,
        intermediate,
        biases: slots % 2 === 1,
      });
    }
  });

  it.each(['uniform', 'skewed', 'one', 'none', 'holes'] as const)(
    '%s routing, with and without blocks',
    async (kind) => {
      for (const blockSize of [0, 1, 8]) await check(context, { ...base, kind, blockSize });
    },
  );

  describe.each(floatDTypes)('%s', (dtype) => {
    it('plain', async () => check(context, { ...base, dtype, hidden: 129, intermediate: 65 }));
    it('biases', async () => check(context, { ...base, dtype, biases: true }));
    it('clamped activation', async () =>
      check(context, { ...base, dtype, biases: true, swiglu: clampedSwiGLU }));
    it('weights on the input', async () => check(context, { ...base, dtype, weighted: true, blockSize: 4 }));
    it('weights on the input with biases', async () =>
      check(context, { ...base, dtype, weighted: true, biases: true }));
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
      weighted: true,
    });
  });

  // 16 values are read where they lie, 2 are copied first
  describe.skipIf(backend === 'oracle')('more rows than fit scratch memory', () => {
    it.each([2, 16])('hidden %i', async (hidden) => {
      const [tokens, intermediate] = [4500, 16384];
      using experts = packCase(context, { slots: 1, hidden, intermediate });
      const forward = (count: number) => {
        const values = Float32Array.from(
          { length: hidden * count },
          (_, i) => (i % (13 * hidden)) / (6 * hidden) - 1,
        );
        return moeExperts({
          rows: context.tensor('f32', [count, hidden], values),
          counts: context.tensor('i32', [1], Int32Array.of(count)),
          offsets: context.tensor('i32', [2], Int32Array.of(0, count)),
          experts,
        }).read();
      };
      const [many, few] = [await forward(tokens), await forward(13)]; // rows repeat after 13
      expect(many.every((value, i) => value === few[i % (13 * hidden)])).toBe(true);
    });
  });

  it('agrees with the dense f64 reading', async () => {
    const given = { ...base, biases: true, swiglu: clampedSwiGLU, weighted: true };
    const { rows, counts, offsets, order, weights } = dispatched(given);
    const arrays = expertArrays(given);
    const expected = new Float64Array(rows.data.length);
    for (let e = 0; e < given.slots; e++) {
      for (let p = offsets.data[e]; p < offsets.data[e] + counts.data[e]; p++) {
        const x = rows.data.subarray(p * given.hidden, (p + 1) * given.hidden);
        const y = denseExpert(given, arrays, e, x, weights.data[order.data[p]]);
        expected.set(y, p * given.hidden);
      }
    }
    expect(relativeNorm(await run(context, given), expected)).toBeLessThan(relativeTolerance.f32);
  });

  it('activations far from zero neither overflow nor vanish', async () => {
    const experts = packCase(
      context,
      { slots: 1, hidden: 1, intermediate: 1 },
      { w13: Float32Array.of(1, 1), w2: Float32Array.of(1) },
    );
    const x = [-1e4, -200, -100, -90, -20, 0, 20, 90, 100, 1e4];
    const output = moeExperts({
      rows: context.tensor('f32', [x.length, 1], Float32Array.from(x)),
      counts: context.tensor('i32', [1], Int32Array.of(x.length)),
      offsets: context.tensor('i32', [2], Int32Array.of(0, x.length)),
      experts,
    });
    for (const [p, value] of (await output.read()).entries()) {
      const expected = (x[p] * x[p]) / (1 + Math.exp(-x[p]));
      expect(Math.abs(value - expected)).toBeLessThanOrEqual(1e-6 * Math.max(1e-3, Math.abs(expected)));
    }
  });

  it.each([
    ['offsets', { counts: [2, 2], offsets: [0, 3, 5] }],
    ['offsets', { counts: [1, 1], offsets: [-1, 0, 1] }],
    ['offsets', { counts: [4, 1], offsets: [0, 2147483647, 2147483647] }],
    ['offsets', { counts: [2, 2], offsets: [0, 1, 4] }],
    ['counts', { counts: [-1, 2], offsets: [0, 2, 4] }],
    ['order', { counts: [2, 2], offsets: [0, 2, 4], order: [0, 1, 2, 4] }],
    ['order', { counts: [2, 2], offsets: [0, 2, 4], order: [-1, 1, 2, 3] }],
  ])('refuses %s that leave the rows: %o', async (arg, { counts, offsets, ...rest }) => {
    const own = await createContext({ backend }); // what a failed op leaves behind stays here
    const run = async () => {
      const order = (rest as { order?: number[] }).order;
      const output = moeExperts({
        rows: own.tensor('f32', [4, 3]),
        counts: own.tensor('i32', [2], Int32Array.from(counts)),
        offsets: own.tensor('i32', [3], Int32Array.from(offsets)),
        experts: packCase(own, { slots: 2, hidden: 3, intermediate: 2 }),
        ...(order === undefined
          ? {}
          : { order: own.tensor('i32', [4], Int32Array.from(order)), weights: own.tensor('f32', [2, 2]) }),
      });
      await output.read();
    };
    await expect(run()).rejects.toMatchObject({ code: 'ERR_MOE_RANGE', op: 'moe_experts', arg });
    await own.close();
  });

  it('is bitwise equal from run to run', async () => {
    for (const dtype of floatDTypes) {
      const given = { ...base, tokens: 127, hidden: 129, dtype };
      expect(await run(context, given)).toEqual(await run(context, given));
    }
  });

  it('replays with new rows and counts', async () => {
    const given: RowsCase = { ...base, biases: true };
    const first = dispatched(given);
    const rows = context.tensor('f32', first.rows.shape);
    const counts = context.tensor('i32', first.counts.shape);
    const offsets = context.tensor('i32', first.offsets.shape);
    using experts = packCase(context, given);
    using step = context.capture(() => moeExperts({ rows, counts, offsets, experts }));
    for (const kind of ['uniform', 'none', 'skewed'] as const) {
      const next = dispatched({ ...given, kind });
      rows.write(next.rows.data);
      counts.write(next.counts.data);
      offsets.write(next.offsets.data);
      step.replay();
      const error = relativeNorm(await step.output.read(), oracle({ ...given, kind }));
      expect(error).toBeLessThan(relativeTolerance.f32);
    }
  });
});
