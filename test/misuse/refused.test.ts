// What is refused in the state that things are in, and what goes on as if nothing had been.
import vm from 'node:vm';
import { describe, expect, it } from 'vitest';
import {
  createContext,
  type DType,
  dtypes,
  fusedMoe,
  moeCombine,
  moeExperts,
  moeFusedGate,
  moeRouter,
  packExperts,
} from '../../lib/index.js';
import { decode, encode } from '../../lib/tensor.js';
import { failure, rejection } from '../failures.js';
import { backends } from '../ops/backends.js';
import { type Anything, setUp } from './set_up.js';

describe.each(backends)('refused on %s', async (backend) => {
  const { context, f32, i32, experts } = await setUp(backend);

  it('refuses disposed tensors, weights and captures', async () => {
    const logits = f32(2, 8);
    logits.dispose();
    logits.dispose();
    expect(failure(() => moeFusedGate({ logits }, { topK: 1 }))).toMatchObject({
      code: 'ERR_MOE_DISPOSED',
      op: 'moe_fused_gate',
      arg: 'logits',
    });
    expect(await rejection(() => logits.read())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    expect(failure(() => logits.write(new Float32Array(16)))).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    const packed = experts();
    packed.dispose();
    const call = () => fusedMoe({ hidden: f32(2, 8), ids: i32(2, 2), weights: f32(2, 2), experts: packed });
    expect(failure(call)).toMatchObject({ code: 'ERR_MOE_DISPOSED', arg: 'experts' });
    const into = () => packExperts({ w13: f32(1, 6, 8), w2: f32(1, 8, 3) }, { into: packed });
    expect(failure(into)).toMatchObject({ code: 'ERR_MOE_DISPOSED', op: 'pack_experts', arg: 'into' });
    const capture = context.capture(() => moeRouter({ hidden: f32(2, 8), weight: f32(4, 8) }));
    capture.dispose();
    expect(failure(() => capture.replay())).toMatchObject({ code: 'ERR_MOE_DISPOSED', op: 'replay' });
    expect(await rejection(() => capture.output.read())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
  });

  it('refuses tensors of another context and names both', async () => {
    const other = await createContext({ backend });
    const error = failure(() => moeRouter({ hidden: f32(2, 8), weight: other.tensor('f32', [4, 8]) }));
    expect(error).toMatchObject({ code: 'ERR_MOE_WRONG_CONTEXT', op: 'moe_router', arg: 'weight' });
    expect(error.message).toMatch(/copy it with tensor\.to\(context\)/);
    await other.close();
    expect(failure(() => other.tensor('f32', [1]))).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    expect(await rejection(() => other.synchronize())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
  });

  it('refuses reads, waits, captures and promises while a capture is recorded, and recovers', async () => {
    const tensor = f32(2);
    for (const record of [
      () => tensor.readSync(),
      () => tensor.read(),
      () => tensor.readRaw(),
      () => context.synchronize(),
      // biome-ignore lint/suspicious/noThenProperty: the point is to return one
      () => ({ then: () => {} }),
      () => context.synchronizeSync(),
      () => context.capture(() => 1),
      () => context.close(),
      async () => tensor,
    ]) {
      expect(failure(() => context.capture(record))).toMatchObject({ code: 'ERR_MOE_CAPTURE' });
    }
    const thrown = failure(() => context.capture(() => moeRouter({ hidden: tensor, weight: tensor })));
    expect(thrown).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', op: 'moe_router' });
    expect([...(await tensor.read())]).toEqual([0, 0]);
  });

  it('refuses to read what a capture made before the first replay', async () => {
    using capture = context.capture(() => context.tensor('f32', [2], Float32Array.of(1, 2)));
    expect(await rejection(() => capture.output.read())).toMatchObject({ code: 'ERR_MOE_CAPTURE' });
    capture.replay();
    expect([...(await capture.output.read())]).toEqual([1, 2]);
  });

  it('keeps failures apart: what failed stays failed, also in replays, and every failure is told', async () => {
    const rows = f32(2, 4);
    const weights = f32(2, 1);
    const inverse = (value: number) => context.tensor('i32', [2, 1], Int32Array.of(value, 0));
    if (backend !== 'oracle') {
      const first = moeCombine({ rows, inverse: inverse(7), weights });
      const second = moeCombine({ rows, inverse: inverse(7), weights });
      expect(await rejection(() => first.read())).toMatchObject({ op: 'moe_combine' });
      // A device keeps one note of an argument until a wait tells it: there the first wait has told of both.
      if (backend === 'cpu') {
        expect(await rejection(() => context.synchronize())).toMatchObject({ op: 'moe_combine' });
        expect(await rejection(() => second.read())).toMatchObject({ op: 'moe_combine' });
      }
      await context.synchronize();
    }
    const input = inverse(7);
    using capture = context.capture(() => ({
      bad: moeCombine({ rows, inverse: input, weights }),
      good: moeRouter({ hidden: rows, weight: rows }),
    }));
    if (backend === 'oracle') expect(failure(() => capture.replay())).toMatchObject({ op: 'moe_combine' });
    else capture.replay();
    if (backend !== 'cuda')
      expect(await rejection(() => capture.output.bad.read())).toMatchObject({ op: 'moe_combine' });
    else expect(await rejection(() => context.synchronize())).toMatchObject({ op: 'moe_combine' });
    expect([...(await capture.output.good.read())]).toEqual([0, 0, 0, 0]);
    input.write(Int32Array.of(1, 0));
    capture.replay();
    expect([...(await capture.output.bad.read())]).toEqual(new Array(8).fill(0));
  });

  it.each(Object.keys(dtypes) as DType[])('moves %s both ways, as bits and as values', async (dtype) => {
    const { raw, values } = dtypes[dtype];
    const numbers =
      dtype === 'i64' ? BigInt64Array.of(0n, 1n, 2n) : new (values as typeof Uint8Array)([0, 1, 2]);
    const tensor = context.tensor(dtype, [3], numbers as never);
    expect(await tensor.read()).toEqual(numbers);
    expect(tensor.readSync()).toEqual(numbers);
    const bits = await tensor.readRaw();
    expect(bits).toBeInstanceOf(raw);
    expect(tensor.readRawSync()).toEqual(bits);
    const again = context.tensor(dtype, [3], bits as never);
    expect(await again.read()).toEqual(numbers);
    expect(await again.write(numbers as never).readRaw()).toEqual(bits);
  });

  it('takes typed arrays of another realm', async () => {
    const foreign = vm.runInNewContext('Float32Array.of(1, 2)');
    expect(foreign).not.toBeInstanceOf(Float32Array);
    expect([...(await context.tensor('f32', [2], foreign).read())]).toEqual([1, 2]);
    expect([...(await context.tensor('bf16', [2], foreign).read())]).toEqual([1, 2]);
  });

  it('rounds e4m3 alike on every backend', async () => {
    const values = Float32Array.from({ length: 4096 }, (_, i) => (i - 2048) / 4.3);
    values.set([NaN, Infinity, -Infinity, 448, 464, 2 ** -9, 2 ** -10, 3 * 2 ** -11, -0, 2 ** -6]);
    const bits = await context.tensor('f8_e4m3', [4096], values).readRaw();
    expect(bits).toEqual(encode('f8_e4m3', values));
    const all = Uint8Array.from({ length: 256 }, (_, i) => i);
    expect(await context.tensor('f8_e4m3', [256], all).read()).toEqual(decode('f8_e4m3', all));
  });

  it('reports device data that leaves its bounds at the wait, naming the op', async () => {
    const call = () => {
      const rows = f32(4, 8);
      const counts = context.tensor('i32', [4], Int32Array.of(1, 1, 99, 1));
      const offsets = context.tensor('i32', [5], Int32Array.of(0, 1, 2, 3, 4));
      return moeExperts({ rows, counts, offsets, experts: experts() });
    };
    // The oracle computes at the call, so it throws there.
    const error = backend === 'oracle' ? failure(call) : await rejection(() => call().read());
    expect(error).toMatchObject({ op: 'moe_experts' });
    expect(error.message).toMatch(/rows of expert 2 among 0\.\.3 but received 2\.\.100/);
    if (backend !== 'oracle') await context.synchronize(); // told once
  });
});

it('refuses unknown backends, devices and options of contexts', async () => {
  expect(await rejection(() => createContext({ backend: 'tpu' as Anything }))).toMatchObject({
    code: 'ERR_MOE_INVALID_ARG',
    arg: 'backend',
    message: expect.stringMatching(/one of 'auto', 'cuda', 'ascend', 'cpu', 'oracle' but received 'tpu'/),
  });
  expect(await rejection(() => createContext({ threads: 0 }))).toMatchObject({ arg: 'threads' });
  expect(await rejection(() => createContext({ gpu: 1 } as Anything))).toMatchObject({ arg: 'gpu' });
});
