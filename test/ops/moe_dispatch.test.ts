import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, type MoeDispatchOptions, moeDispatch, type Tensor } from '../../lib/index.js';
import { moe_dispatch } from '../../lib/oracle/moe_dispatch.js';
import { type RoutingKind, routing } from '../cases/experts.js';
import { floatDTypes, rounded } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from './backends.js';

interface Result {
  readonly order: Int32Array;
  readonly inverse: Int32Array;
  readonly counts: Int32Array;
  readonly offsets: Int32Array;
  readonly blockExperts?: Int32Array;
}

async function run(
  context: Context,
  ids: Int32Array,
  columns: number,
  options: MoeDispatchOptions,
): Promise<Result> {
  const outputs = moeDispatch({ ids: context.tensor('i32', [ids.length / columns, columns], ids) }, options);
  const entries = Object.entries(outputs).map(async ([name, tensor]) => [
    name,
    await (tensor as Tensor).read(),
  ]);
  return Object.fromEntries(await Promise.all(entries));
}

function oracle(ids: Int32Array, columns: number, options: MoeDispatchOptions): Result {
  const { experts, firstExpert = 0, blockSize = 0 } = options;
  const rows = ids.length;
  const worst = blockSize === 0 ? rows : Math.min(rows + experts * (blockSize - 1), rows * blockSize);
  const blocks = blockSize === 0 ? 0 : Math.ceil(worst / blockSize);
  const tensor = (length: number) => ({ shape: [length], data: new Int32Array(length) });
  const outputs = {
    order: tensor(blockSize === 0 ? rows : blocks * blockSize),
    inverse: tensor(rows),
    counts: tensor(experts),
    offsets: tensor(experts + 1),
    ...(blockSize === 0 ? {} : { blockExperts: tensor(blocks) }),
  };
  const shape = [rows / columns, columns];
  moe_dispatch({ ids: { shape, data: ids } }, { experts, firstExpert, blockSize }, outputs);
  return Object.fromEntries(
    Object.entries(outputs).map(([name, { data }]) => [name, data]),
  ) as unknown as Result;
}

describe.each(backends)('moe_dispatch on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it("lays blocks out as vLLM's moe_align_block_size does", async () => {
    const ids = Int32Array.of(2, 3, 4, 1, 2, 4, 1, 3, 4, 1, 2, 3);
    const { order, offsets, counts, blockExperts } = await run(context, ids, 3, { experts: 5, blockSize: 4 });
    expect([...order.subarray(0, 16)]).toEqual([3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]);
    expect(order.length).toBe(28);
    expect(order.subarray(16).every((choice) => choice === 12)).toBe(true);
    expect([...blockExperts!]).toEqual([1, 2, 3, 4, -1, -1, -1]);
    expect([...counts]).toEqual([0, 3, 3, 3, 3]);
    expect([...offsets]).toEqual([0, 0, 4, 8, 12, 16]);
  });

  it('sorts without blocks, stably', async () => {
    const ids = Int32Array.of(2, 0, -1, 2, 0, 7);
    expect(await run(context, ids, 2, { experts: 3 })).toEqual({
      order: Int32Array.of(1, 4, 0, 3, 6, 6),
      inverse: Int32Array.of(2, 0, -1, 3, 1, -1),
      counts: Int32Array.of(2, 0, 2),
      offsets: Int32Array.of(0, 2, 2, 4),
    });
  });

  const kinds: RoutingKind[] = ['uniform', 'skewed', 'one', 'none', 'holes'];
  describe.each(kinds)('%s routing', (kind) => {
    it.each([0, 1, 2, 31, 32, 33, 127, 511, 513])('%i tokens', async (tokens) => {
      const random = new Random(tokens + 1);
      for (const [experts, columns] of [
        [1, 1],
        [3, 2],
        [8, 3],
        [60, 4],
        [257, 9],
        [1024, 8],
      ]) {
        const { ids } = routing(kind, tokens, columns, experts, random);
        for (const options of [
          { experts },
          { experts, blockSize: 1 },
          { experts, blockSize: 16 },
          { experts: Math.ceil(experts / 3), firstExpert: Math.floor(experts / 3), blockSize: 5 },
        ]) {
          const label = `${experts} experts, ${columns} columns, ${JSON.stringify(options)}`;
          expect(await run(context, ids, columns, options), label).toEqual(oracle(ids, columns, options));
        }
      }
    });
  });

  it('handles many choices', async () => {
    const { ids } = routing('holes', 16411, 9, 33, new Random(5));
    for (const options of [
      { experts: 33 },
      { experts: 33, blockSize: 64 },
      { experts: 5, firstExpert: 20 },
    ]) {
      expect(await run(context, ids, 9, options)).toEqual(oracle(ids, 9, options));
    }
  });

  it('handles many experts', async () => {
    const { ids } = routing('uniform', 65, 2, 5000, new Random(5));
    for (const options of [{ experts: 5000 }, { experts: 65536, blockSize: 2 }]) {
      expect(await run(context, ids, 2, options)).toEqual(oracle(ids, 2, options));
    }
  });

  it.each(floatDTypes)('gathers rows of %s bit by bit, zeros in empty places', async (dtype) => {
    const random = new Random(9);
    for (const [tokens, width, blockSize] of [
      [0, 8, 4],
      [1, 1, 0],
      [33, 7, 0],
      [33, 65, 8],
    ]) {
      const { ids } = routing('holes', tokens, 3, 8, random);
      const values = rounded(dtype, random.normals(tokens * width));
      const { order, rows } = moeDispatch(
        {
          ids: context.tensor('i32', [tokens, 3], ids),
          hidden: context.tensor(dtype, [tokens, width], values),
        },
        { experts: 8, blockSize },
      );
      const expected = [...(await order.read())].flatMap((choice) => {
        const token = Math.floor(choice / 3);
        return choice === tokens * 3
          ? Array(width).fill(0)
          : [...values.subarray(token * width, (token + 1) * width)];
      });
      expect(rows!.dtype).toBe(dtype);
      expect([...(await rows!.read())]).toEqual(expected);
    }
  });

  it('keeps its invariants whatever the ids', async () => {
    const cases = fc.record({
      columns: fc.integer({ min: 1, max: 9 }),
      choices: fc.array(fc.integer({ min: -2, max: 14 }), { maxLength: 120 }),
      experts: fc.integer({ min: 1, max: 12 }),
      firstExpert: fc.integer({ min: 0, max: 3 }),
      blockSize: fc.integer({ min: 0, max: 9 }),
    });
    await fc.assert(
      fc.asyncProperty(cases, async ({ columns, choices, ...options }) => {
        const ids = Int32Array.from(choices.slice(0, choices.length - (choices.length % columns)));
        const { experts, firstExpert, blockSize } = options;
        const local = (id: number) => id >= firstExpert && id < firstExpert + experts;
        const { order, inverse, counts, offsets, blockExperts } = await run(context, ids, columns, options);
        const filled = [...order].filter((choice) => choice !== ids.length);
        expect(filled.toSorted((a, b) => a - b)).toEqual(
          [...ids.keys()].filter((choice) => local(ids[choice])),
        );
        for (const [choice, place] of inverse.entries()) {
          if (local(ids[choice])) expect(order[place]).toBe(choice);
          else expect(place).toBe(-1);
        }
        for (let e = 0; e < experts; e++) {
          const bucket = [...order.subarray(offsets[e], offsets[e] + counts[e])];
          expect(bucket.every((choice) => ids[choice] === firstExpert + e)).toBe(true);
          expect(bucket).toEqual(bucket.toSorted((a, b) => a - b));
          const padded = blockSize === 0 ? counts[e] : Math.ceil(counts[e] / blockSize) * blockSize;
          expect(offsets[e + 1] - offsets[e]).toBe(padded);
          for (let b = offsets[e] / blockSize; b < offsets[e + 1] / blockSize; b++)
            expect(blockExperts![b]).toBe(e);
        }
        expect(offsets[0]).toBe(0);
        expect(offsets[experts]).toBeLessThanOrEqual(order.length);
        expect(blockExperts?.subarray(offsets[experts] / blockSize).every((e) => e === -1) ?? true).toBe(
          true,
        );
      }),
      { seed: 2, numRuns: 150 },
    );
  });

  it('is bitwise equal from run to run', async () => {
    const { ids } = routing('uniform', 513, 8, 64, new Random(4));
    const options = { experts: 64, blockSize: 32 };
    expect(await run(context, ids, 8, options)).toEqual(await run(context, ids, 8, options));
  });

  it('replays with new ids', async () => {
    const ids = context.tensor('i32', [33, 4]);
    using step = context.capture(() => moeDispatch({ ids }, { experts: 8, blockSize: 4 }));
    for (const kind of ['uniform', 'none', 'skewed'] as const) {
      const next = routing(kind, 33, 4, 8, new Random(6)).ids;
      ids.write(next);
      step.replay();
      const expected = oracle(next, 4, { experts: 8, blockSize: 4 });
      expect(await step.output.order.read()).toEqual(expected.order);
      expect(await step.output.inverse.read()).toEqual(expected.inverse);
      expect(await step.output.counts.read()).toEqual(expected.counts);
      expect(await step.output.blockExperts!.read()).toEqual(expected.blockExperts);
    }
  });
});
