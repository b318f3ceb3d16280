import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type Context,
  createContext,
  type FloatDType,
  type MoeCombineOptions,
  moeCombine,
} from '../../lib/index.js';
import { moe_combine } from '../../lib/oracle/moe_combine.js';
import { floatDTypes, relativeNorm, relativeTolerance, rounded } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from './backends.js';

interface CombineCase {
  readonly tokens: number;
  readonly columns: number;
  readonly hidden: number;
  readonly capacity?: number;
  readonly dtype?: FloatDType;
  /** The share of choices that have no row here. */
  readonly missing?: number;
  readonly options?: MoeCombineOptions;
  readonly seed?: number;
}

function arrays(given: CombineCase) {
  const { tokens, columns, hidden, dtype = 'f32', missing = 0.2, capacity = tokens * columns } = given;
  const random = new Random(given.seed ?? 1);
  const choices = tokens * columns;
  const places = random.distinct(choices, Math.max(capacity, choices));
  return {
    rows: { shape: [capacity, hidden], data: rounded(dtype, random.normals(capacity * hidden)) },
    inverse: {
      shape: [tokens, columns],
      data: Int32Array.from(places, (p) => (random.chance(missing) ? -1 : p)),
    },
    weights: { shape: [tokens, columns], data: Float32Array.from({ length: choices }, () => random.next()) },
    ids: {
      shape: [tokens, columns],
      data: Int32Array.from({ length: choices }, () => random.integer(12) - 1),
    },
    hidden: { shape: [tokens, hidden], data: rounded(dtype, random.normals(tokens * hidden)) },
  };
}

function oracle(given: CombineCase): Float32Array {
  const { tokens, hidden, options = {} } = given;
  const output = { shape: [tokens, hidden], data: new Float32Array(tokens * hidden) };
  const resolved = { outputScale: 1, zeroExperts: 0, firstZeroExpert: 0, weightsOnInput: false, ...options };
  moe_combine(arrays(given), resolved, { output });
  return output.data;
}

async function run(context: Context, given: CombineCase): Promise<Float32Array> {
  const { dtype = 'f32', options = {} } = given;
  const { rows, inverse, weights, ids, hidden } = arrays(given);
  const output = moeCombine(
    {
      rows: context.tensor(dtype, rows.shape, rows.data),
      inverse: context.tensor('i32', inverse.shape, inverse.data),
      weights: context.tensor('f32', weights.shape, weights.data),
      ...(options.zeroExperts
        ? {
            ids: context.tensor('i32', ids.shape, ids.data),
            hidden: context.tensor(dtype, hidden.shape, hidden.data),
          }
        : {}),
    },
    options,
  );
  expect(output.dtype).toBe(dtype);
  return output.read();
}

async function check(context: Context, given: CombineCase): Promise<void> {
  const error = relativeNorm(await run(context, given), oracle(given));
  expect(error, JSON.stringify(given)).toBeLessThan(relativeTolerance[given.dtype ?? 'f32']);
}

describe.each(backends)('moe_combine on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it('sums weighted rows, skips -1 and adds zero experts once', async () => {
    const output = moeCombine(
      {
        rows: context.tensor('f32', [3, 2], Float32Array.of(1, 2, 10, 20, Number.NaN, Number.NaN)),
        inverse: context.tensor('i32', [2, 3], Int32Array.of(1, 0, -1, -1, -1, 0)),
        weights: context.tensor('f32', [2, 3], Float32Array.of(0.5, 2, 4, 8, 0.25, 1)),
        ids: context.tensor('i32', [2, 3], Int32Array.of(1, 0, 5, -1, 4, 0)),
        hidden: context.tensor('f32', [2, 2], Float32Array.of(100, 200, 4, 8)),
      },
      { outputScale: 2, zeroExperts: 2, firstZeroExpert: 4 },
    );
    expect([...(await output.read())]).toEqual([
      2 * (5 + 2 + 400),
      2 * (10 + 4 + 800),
      2 * (1 + 1),
      2 * (2 + 2),
    ]);
  });

  it.each([0, 1, 2, 31, 32, 33, 127, 511, 513])('%i tokens', async (tokens) => {
    for (const hidden of [1, 7, 64, 129]) {
      for (const columns of [1, 2, 9, 40]) await check(context, { tokens, columns, hidden, seed: hidden });
    }
  });

  it.each([511, 513, 1030])('hidden %i', async (hidden) => {
    for (const dtype of floatDTypes) {
      const options = { zeroExperts: 4, firstZeroExpert: 6, outputScale: 2.5 };
      await check(context, { tokens: 3, columns: 9, hidden, dtype, options });
    }
  });

  describe.each(floatDTypes)('%s', (dtype) => {
    const base = { tokens: 33, columns: 9, hidden: 65, dtype };
    it('more rows than choices', async () => check(context, { ...base, capacity: 400 }));
    it('output scale', async () => check(context, { ...base, options: { outputScale: 2.5 } }));
    it('nothing to add', async () => {
      expect((await run(context, { ...base, missing: 1 })).every((value) => value === 0)).toBe(true);
    });
    it('zero experts', async () =>
      check(context, { ...base, options: { zeroExperts: 4, firstZeroExpert: 6, outputScale: 0.5 } }));
    it('weights on the input, which zero experts still need', async () =>
      check(context, { ...base, options: { zeroExperts: 3, firstZeroExpert: 8, weightsOnInput: true } }));
  });

  it('accumulates in f32: many bf16 rows do not lose the small ones', async () => {
    const columns = 32;
    const output = moeCombine({
      rows: context.tensor('bf16', [columns, 1], new Float32Array(columns).fill(1)),
      inverse: context.tensor(
        'i32',
        [1, columns],
        Int32Array.from({ length: columns }, (_, c) => c),
      ),
      weights: context.tensor(
        'f32',
        [1, columns],
        Float32Array.from({ length: columns }, (_, c) => (c === 0 ? 256 : 0.5)),
      ),
    });
    expect([...(await output.read())]).toEqual([272]); // 271.5 rounded once; bf16 additions would stay at 256
  });

  it('refuses places beyond the rows', async () => {
    const own = await createContext({ backend });
    const run = async () => {
      const output = moeCombine({
        rows: own.tensor('f32', [2, 3]),
        inverse: own.tensor('i32', [1, 2], Int32Array.of(0, 2)),
        weights: own.tensor('f32', [1, 2]),
      });
      await output.read();
    };
    await expect(run()).rejects.toMatchObject({
      code: 'ERR_MOE_RANGE',
      op: 'moe_combine',
      arg: 'inverse',
    });
    await own.close();
  });

  it('does not depend on where the rows lie', async () => {
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 1, max: 1e6 }), async (seed) => {
        const [tokens, columns, hidden] = [5, 4, 3];
        const random = new Random(seed);
        const values = random.normals(tokens * columns * hidden);
        const weights = context.tensor('f32', [tokens, columns], random.normals(tokens * columns));
        const combine = (places: readonly number[]) => {
          const rows = new Float32Array(values.length);
          for (const [choice, p] of places.entries()) {
            rows.set(values.subarray(choice * hidden, (choice + 1) * hidden), p * hidden);
          }
          return moeCombine({
            rows: context.tensor('f32', [places.length, hidden], rows),
            inverse: context.tensor('i32', [tokens, columns], Int32Array.from(places)),
            weights,
          }).read();
        };
        const straight = await combine([...Array(tokens * columns).keys()]);
        expect(await combine(random.distinct(tokens * columns, tokens * columns))).toEqual(straight);
      }),
      { seed: 3, numRuns: 25 },
    );
  });

  it('is bitwise equal from run to run', async () => {
    const given = { tokens: 127, columns: 9, hidden: 129 };
    expect(await run(context, given)).toEqual(await run(context, given));
  });

  it('replays with new rows and places', async () => {
    const given = { tokens: 33, columns: 3, hidden: 17 };
    const first = arrays(given);
    const rows = context.tensor('f32', first.rows.shape);
    const inverse = context.tensor('i32', first.inverse.shape);
    const weights = context.tensor('f32', first.weights.shape);
    using step = context.capture(() => moeCombine({ rows, inverse, weights }));
    for (const seed of [1, 2]) {
      const next = arrays({ ...given, seed });
      rows.write(next.rows.data);
      inverse.write(next.inverse.data);
      weights.write(next.weights.data);
      step.replay();
      expect(relativeNorm(await step.output.read(), oracle({ ...given, seed }))).toBeLessThan(
        relativeTolerance.f32,
      );
    }
  });
});
