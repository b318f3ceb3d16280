// Work in flight: what is disposed, written, read and shared while it runs; one tensor in several places of a call.
import { describe, expect, it } from 'vitest';
import {
  createContext,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeFusedGate,
  moeRouter,
  packExperts,
  sharedExperts,
  type Tensor,
} from '../../lib/index.js';
import { failure, rejection } from '../failures.js';
import { backends } from '../ops/backends.js';
import { type Anything, setUp } from './set_up.js';

describe.each(backends)('work in flight on %s', async (backend) => {
  const { context } = await setUp(backend);

  const count = (n: number) => Float32Array.from({ length: n }, (_, i) => (i % 7) - 3);
  const f32 = (...shape: number[]) =>
    context.tensor('f32', shape, count(shape.reduce((product, dim) => product * dim)));
  const i32 = (shape: number[], ...values: number[]) => context.tensor('i32', shape, Int32Array.from(values));
  const copy = async (tensor: Tensor<'f32'>) => context.tensor('f32', tensor.shape, await tensor.read());

  /** A call with every argument a tensor of its own, and the same call with one tensor wherever it fits. */
  const aliased: [string, (same: <T extends Tensor>(tensor: T) => Promise<T>) => Promise<Tensor[]>][] = [
    [
      'moe_router: hidden and weight',
      async (same) => {
        const x = f32(4, 4);
        return [moeRouter({ hidden: x, weight: await same(x) })];
      },
    ],
    [
      'moe_router: hidden, weight and bias',
      async (same) => {
        const x = f32(1, 1);
        const bias = context.tensor('f32', [1], await x.read());
        return [moeRouter({ hidden: x, weight: await same(x), bias })];
      },
    ],
    [
      'moe_combine: rows and hidden',
      async (same) => {
        const rows = f32(4, 6);
        const choices = i32([4, 1], 0, 1, 2, 3);
        return [
          moeCombine(
            {
              rows,
              inverse: choices,
              weights: f32(4, 1),
              ids: await same(choices),
              hidden: await same(rows),
            },
            { zeroExperts: 2, firstZeroExpert: 2 },
          ),
        ];
      },
    ],
    [
      'moe_experts: counts and order',
      async (same) => {
        const rows = f32(2, 3);
        const experts = packExperts({ w13: f32(2, 2, 3), w2: f32(2, 3, 1) });
        const ones = i32([2], 1, 1);
        return [
          moeExperts({
            rows,
            counts: ones,
            offsets: i32([3], 0, 1, 2),
            experts,
            order: await same(ones),
            weights: f32(2, 1),
          }),
        ];
      },
    ],
    [
      'shared_experts: hidden and routed',
      async (same) => {
        const hidden = f32(3, 4);
        const experts = packExperts({ w13: f32(1, 4, 4), w2: f32(1, 4, 2) });
        return [sharedExperts({ hidden, experts, routed: await same(hidden) })];
      },
    ],
    [
      'pack_experts: b13 and b2',
      async (same) => {
        const b13 = f32(1, 2);
        const experts = packExperts({ w13: f32(1, 2, 2), w2: f32(1, 2, 1), b13, b2: await same(b13) });
        return [fusedMoe({ hidden: f32(1, 2), ids: i32([1, 1], 0), weights: f32(1, 1), experts })];
      },
    ],
  ];

  it.each(aliased)('one tensor in two places of a call: %s', async (_, call) => {
    const twice = await call(async (tensor) => tensor);
    const apart = await call(async (tensor) =>
      tensor.dtype === 'f32'
        ? ((await copy(tensor as Tensor<'f32'>)) as Anything)
        : (context.tensor('i32', tensor.shape, (await tensor.read()) as Int32Array) as Anything),
    );
    for (const [i, tensor] of twice.entries()) expect(await tensor.read()).toEqual(await apart[i].read());
  });

  it('outputs never overlap inputs: a tensor that a call changes is nowhere else in it', async () => {
    const load = context.tensor('i64', [4]);
    const logits = f32(1, 4);
    // By dtype no other argument of the gate can be its load; weights that are written take no part as tensors
    expect(failure(() => moeFusedGate({ logits, load, bias: load as Anything }, { topK: 1 }))).toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      arg: 'bias',
    });
    const first = moeFusedGate({ logits, load }, { topK: 1 });
    const second = moeFusedGate({ logits, load }, { topK: 2 });
    expect((await load.read()).reduce((sum, n) => sum + n, 0n)).toBe(3n);
    expect(first.ids).not.toBe(second.ids);
  });

  it('what is disposed right after the call is there until the call is done', async () => {
    const source = count(512 * 64);
    const expected = await moeRouter({ hidden: f32(512, 64), weight: f32(64, 64) }).read();
    const outputs: Promise<Float32Array>[] = [];
    for (let i = 0; i < 20; i++) {
      const hidden = context.tensor('f32', [512, 64], source);
      const weight = f32(64, 64);
      const logits = moeRouter({ hidden, weight });
      hidden.dispose();
      weight.dispose();
      const crowd = context.tensor('f32', [512, 64], new Float32Array(512 * 64).fill(9)); // takes freed memory
      outputs.push(logits.read());
      logits.dispose(); // with the read in flight
      crowd.dispose();
    }
    for (const output of await Promise.all(outputs)) expect(output).toEqual(expected);
  });

  it('weights and captures that are disposed in flight finish their work', async () => {
    const hidden = f32(64, 8);
    const call = () => {
      const experts = packExperts({ w13: f32(2, 6, 8), w2: f32(2, 8, 3) });
      const ids = context.tensor('i32', [64, 1]);
      const out = fusedMoe({ hidden, ids, weights: f32(64, 1), experts });
      experts.dispose();
      ids.dispose();
      return out;
    };
    const expected = await call().read();
    const capture = context.capture(() => moeRouter({ hidden, weight: hidden }));
    capture.replay();
    const read = capture.output.read();
    capture.dispose();
    expect((await read).length).toBe(64 * 64);
    for (let i = 0; i < 10; i++) expect(await call().read()).toEqual(expected);
  });

  it('reads see the tensor as it was when they were asked for', async () => {
    const tensor = context.tensor('f32', [1000]);
    const reads: Promise<Float32Array>[] = [];
    for (let i = 0; i < 50; i++) reads.push(tensor.write(new Float32Array(1000).fill(i)).read());
    for (const [i, values] of (await Promise.all(reads)).entries())
      expect(values[0] + values[999]).toBe(2 * i);
  });

  it('one output may be read, used and written by many at once', async () => {
    const x = f32(64, 64);
    const logits = moeRouter({ hidden: x, weight: x });
    const before = logits.read();
    const uses = Array.from({ length: 20 }, () => moeRouter({ hidden: logits, weight: x }));
    const gates = Array.from({ length: 20 }, () => moeFusedGate({ logits }, { topK: 4 }));
    logits.write(new Float32Array(64 * 64));
    const after = await moeRouter({ hidden: logits, weight: x }).read();
    expect(after.every((value) => value === 0)).toBe(true);
    const expected = await uses[0].read();
    expect(expected.some((value) => value !== 0)).toBe(true);
    for (const use of uses) expect(await use.read()).toEqual(expected);
    const ids = await gates[0].ids.read();
    for (const gate of gates) expect(await gate.ids.read()).toEqual(ids);
    expect((await before).some((value) => value !== 0)).toBe(true);
  });

  it('contexts that are closed in flight finish what was asked for', async () => {
    const own = await createContext({ backend });
    const x = own.tensor('f32', [256, 64], count(256 * 64));
    const reads = Array.from({ length: 10 }, () => moeRouter({ hidden: x, weight: x }).read());
    const [closed, ...values] = await Promise.all([own.close(), ...reads]);
    expect(closed).toBeUndefined();
    for (const each of values) expect(each).toEqual(values[0]);
    expect(failure(() => moeRouter({ hidden: x, weight: x }))).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    expect(await rejection(() => x.read())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    x.dispose();
  });

  it('NaN and infinities go through every op and stay where they belong', async () => {
    const odd = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
    const experts = packExperts({ w13: f32(2, 6, 4), w2: f32(2, 4, 3) });
    const dense = packExperts({ w13: f32(1, 6, 4), w2: f32(1, 4, 3) });
    const weight = f32(3, 4);
    const run = async (poison: readonly number[]) => {
      // Rows 0.. are poisoned, one each; the last two are not
      const values = count(5 * 4).map((value, i) => (i % 4 === 1 ? (poison[i >> 2] ?? value) : value));
      const hidden = context.tensor('f32', [5, 4], values);
      const ids = i32([5, 1], 0, 1, 0, 1, 0);
      const weights = context.tensor('f32', [5, 1], new Float32Array(5).fill(1));
      const { rows, counts, offsets, inverse } = moeDispatch({ ids, hidden }, { experts: 2 });
      const computed = moeExperts({ rows: rows!, counts, offsets, experts });
      const outputs = [
        moeRouter({ hidden, weight }),
        fusedMoe({ hidden, ids, weights, experts }),
        moeCombine({ rows: computed, inverse, weights }),
        sharedExperts({ hidden, experts: dense }),
      ];
      const gate = moeFusedGate({ logits: outputs[0] }, { topK: 3 });
      for (let t = 0; t < 5; t++) {
        expect([...(await gate.ids.read()).slice(3 * t, 3 * t + 3)].sort()).toEqual([0, 1, 2]);
      }
      return Promise.all(outputs.map((output) => output.read()));
    };
    const clean = await run([]);
    const poisoned = await run(odd);
    for (const [i, values] of poisoned.entries()) {
      const width = values.length / 5;
      expect(values.subarray(3 * width)).toEqual(clean[i].subarray(3 * width));
      expect(values.subarray(0, width).some(Number.isNaN)).toBe(true);
      expect(values.subarray(width, 3 * width).every(Number.isFinite)).toBe(false);
    }
  });
});
