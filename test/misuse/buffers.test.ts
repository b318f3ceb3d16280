// Data that a caller hands over, in every kind of buffer and disguise: copied as it is at the call, or refused.
import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import type { DType } from '../../lib/index.js';
import { failure } from '../failures.js';
import { backends } from '../ops/backends.js';
import { type Anything, setUp } from './set_up.js';

/** What newer runtimes have and the types of es2023 do not. */
const resizable = (bytes: number, most: number): Anything =>
  new (ArrayBuffer as Anything)(bytes, { maxByteLength: most });
const growable = (bytes: number, most: number): Anything =>
  new (SharedArrayBuffer as Anything)(bytes, { maxByteLength: most });

describe.each(backends)('data on %s', async (backend) => {
  const { context } = await setUp(backend);

  const refused = (dtype: DType, size: number, data: Anything, received: RegExp) => {
    const tensor = context.tensor(dtype, [size]);
    const before = tensor.readRawSync();
    for (const act of [() => context.tensor(dtype, [size], data), () => tensor.write(data)]) {
      const error = failure(act);
      expect(error).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', arg: 'data' });
      expect(error.message).toMatch(received);
    }
    expect(tensor.readRawSync()).toEqual(before);
    tensor.dispose();
  };
  const taken = async (data: Anything, expected: readonly number[]) => {
    expect([...(await context.tensor('f32', [expected.length], data).read())]).toEqual(expected);
    const later = context.tensor('f32', [expected.length]);
    expect([...(await later.write(data).read())]).toEqual(expected);
    expect([...(await context.tensor('bf16', [expected.length], data).read())]).toEqual(expected);
  };

  it('detached buffers are empty', async () => {
    const data = new Float32Array([1, 2, 3]);
    structuredClone(data.buffer, { transfer: [data.buffer] });
    refused('f32', 3, data, /received Float32Array\(0\)/);
    refused('bf16', 3, data, /received Float32Array\(0\)/);
    expect((await context.tensor('f32', [0], data).read()).length).toBe(0);
  });

  it('a buffer that is detached right after the call has been copied', async () => {
    const data = new Float32Array(100_000).fill(3);
    const tensor = context.tensor('f32', [100_000], data);
    tensor.write(data);
    structuredClone(data.buffer, { transfer: [data.buffer] });
    expect((await tensor.read()).every((x) => x === 3)).toBe(true);
  });

  it('resizable buffers count as long as they are now', async () => {
    const buffer = resizable(16, 64);
    const tracking = new Float32Array(buffer);
    const fixed = new Float32Array(buffer, 0, 4);
    tracking.set([1, 2, 3, 4]);
    await taken(tracking, [1, 2, 3, 4]);
    buffer.resize(8);
    await taken(tracking, [1, 2]);
    refused('f32', 4, tracking, /received Float32Array\(2\)/);
    refused('f32', 4, fixed, /received Float32Array\(0\)/); // out of bounds
    buffer.resize(64);
    await taken(fixed, [1, 2, 0, 0]);
  });

  it('shared and growable shared buffers are copied', async () => {
    const shared = new Float32Array(new SharedArrayBuffer(8));
    shared.set([5, 6]);
    await taken(shared, [5, 6]);
    const buffer = growable(8, 32);
    const growing = new Float32Array(buffer);
    growing.set([7, 8]);
    await taken(growing, [7, 8]);
    buffer.grow(16);
    await taken(growing, [7, 8, 0, 0]);
  });

  it('a shared buffer that another thread is writing gives some of its values', async () => {
    const shared = new Float32Array(new SharedArrayBuffer(4 * 65536));
    const writer = new Worker(
      `const { workerData } = require('node:worker_threads'); for (let i = 0; ; i++) workerData.fill(i % 100);`,
      { eval: true, workerData: shared },
    );
    try {
      const tensor = context.tensor('f32', [65536]);
      for (let i = 0; i < 20; i++) {
        const values = await tensor.write(shared).read();
        expect(values.every((x) => Number.isInteger(x) && x >= 0 && x < 100)).toBe(true);
      }
    } finally {
      await writer.terminate();
    }
  });

  it('views at any offset that JavaScript allows, and of part of a buffer', async () => {
    const buffer = new ArrayBuffer(64);
    for (const offset of [0, 4, 12, 20, 52]) {
      const view = new Float32Array(buffer, offset, 3);
      view.set([offset, 1, 2]);
      await taken(view, [offset, 1, 2]);
    }
    const bytes = new Uint8Array(buffer, 1, 5).fill(9); // not even aligned to 2
    expect(await context.tensor('u8', [5], bytes).read()).toEqual(bytes);
    const pooled = Buffer.from([1, 2, 3]); // node's pool: a view into the middle of a larger buffer
    expect([...(await context.tensor('u8', [3], pooled).read())]).toEqual([1, 2, 3]);
    const bits = new Uint16Array(buffer, 2, 3);
    expect(await context.tensor('bf16', [3], bits).readRaw()).toEqual(bits);
    const long = new BigInt64Array(buffer, 8, 2);
    expect(await context.tensor('i64', [2], long).read()).toEqual(long);
  });

  it.each([
    ['DataView', () => new DataView(new ArrayBuffer(8)), /received DataView/],
    ['ArrayBuffer', () => new ArrayBuffer(8), /received an object/],
    ['SharedArrayBuffer', () => new SharedArrayBuffer(8), /received an object/],
    ['array of BigInt', () => [1n, 2n], /received an array of 2/],
    ['Uint8ClampedArray', () => new Uint8ClampedArray(2), /received Uint8ClampedArray\(2\)/],
    ['BigUint64Array', () => new BigUint64Array(2), /received BigUint64Array\(2\)/],
    ['a short view', () => new Float32Array(8).subarray(0, 1), /received Float32Array\(1\)/],
    ['a long view', () => new Float32Array(8).subarray(0, 3), /received Float32Array\(3\)/],
    ['a string', () => '12', /received '12'/],
    ['null', () => null, /received null/],
    ['a tensor', () => context.tensor('f32', [2]), /received an object/],
    ['an object like an array', () => ({ length: 2, 0: 1, 1: 2 }), /received an object/],
    ['a proxy of an array', () => new Proxy(new Float32Array(2), {}), /but received/],
    ['a promise', () => Promise.resolve(new Float32Array(2)), /received an object/],
  ])('refuses %s', (_, make, received) => {
    refused('f32', 2, make(), received);
  });

  it('looks through subclasses and properties that lie', async () => {
    class Liar extends Float32Array {
      override get length() {
        return 1000;
      }
      // biome-ignore lint/suspicious/noExplicitAny: not the constructor's own type
      override get [Symbol.toStringTag](): any {
        return 'Int32Array';
      }
    }
    await taken(new Liar([1, 2, 3]), [1, 2, 3]);
    refused('f32', 1000, new Liar([1, 2, 3]), /received Float32Array\(3\)/);
    const owned = Object.defineProperties(new Float32Array([4, 5]), {
      length: { value: 7 },
      byteLength: { value: 1 << 30 },
      buffer: { value: new ArrayBuffer(1) },
      constructor: { value: null },
    });
    await taken(owned, [4, 5]);
    refused('f32', 7, owned, /received Float32Array\(2\)/);
    const strange = Object.setPrototypeOf(new Float32Array([6]), null);
    expect([...(await context.tensor('f32', [1], strange).read())]).toEqual([6]);
  });

  it('takes data that is frozen as far as JavaScript can', async () => {
    await taken(Object.preventExtensions(Object.seal(new Float32Array([1, 2]))), [1, 2]);
  });

  it('gives every read an array of its own', async () => {
    const tensor = context.tensor('f32', [3], Float32Array.of(1, 2, 3));
    const reads = await Promise.all([tensor.read(), tensor.read(), tensor.readRaw(), tensor.read()]);
    reads.push(tensor.readSync(), tensor.readRawSync());
    for (const values of reads) {
      expect([...values]).toEqual([1, 2, 3]);
      values.fill(0);
    }
    expect([...(await tensor.read())]).toEqual([1, 2, 3]);
  });
});
