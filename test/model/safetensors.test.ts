import {
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { mkdir, open } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { afterAll, describe, expect, test } from 'vitest';
import { MoeError } from '../../lib/errors.js';
import { openSafetensors, readSafetensors } from '../../lib/model/safetensors.js';
import { type TensorToWrite, writeSafetensors } from '../../lib/model/safetensors_write.js';
import { type DType, dtypes, type RawArray } from '../../lib/tensor.js';

const scratch = mkdtempSync(join(tmpdir(), 'moe-safetensors-'));
afterAll(() => rmSync(scratch, { recursive: true }));
let files = 0;
const fresh = (suffix = '.safetensors') => join(scratch, `${files++}${suffix}`);

/** A file with this header, followed by `data` zero bytes. */
function fileOf(header: unknown, data: number, length?: bigint): string {
  const json = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(length ?? BigInt(json.length));
  const file = fresh();
  writeFileSync(file, Buffer.concat([prefix, json, Buffer.alloc(data)]));
  return file;
}

const refused = (work: () => Promise<unknown>, message: RegExp, code = 'ERR_MOE_CHECKPOINT') =>
  expect(work()).rejects.toThrow(expect.objectContaining({ code, message: expect.stringMatching(message) }));

describe('reading and writing', () => {
  test('every dtype comes back bit by bit', async () => {
    const arbitrary = fc.dictionary(
      fc.string({ minLength: 1, maxLength: 12 }).filter((name) => name !== '__metadata__'),
      fc.record({
        dtype: fc.constantFrom(...(Object.keys(dtypes) as DType[])),
        shape: fc.array(fc.integer({ min: 0, max: 4 }), { maxLength: 3 }),
      }),
      { maxKeys: 6 },
    );
    const random = (length: number, seed: number) =>
      Uint8Array.from({ length }, (_, i) => (Math.imul(i + seed, 2654435761) >>> 13) & 0xff);
    await fc.assert(
      fc.asyncProperty(arbitrary, fc.nat(), async (described, seed) => {
        const tensors: Record<string, TensorToWrite> = Object.create(null);
        for (const [name, { dtype, shape }] of Object.entries(described)) {
          const { bytes, raw } = dtypes[dtype];
          const elements = shape.reduce((product, dim) => product * dim, 1);
          tensors[name] = { dtype, shape, data: new raw(random(elements * bytes, seed).buffer) };
        }
        const file = fresh();
        await writeSafetensors(file, tensors, { format: 'pt' });
        const read = await readSafetensors(file);
        expect(Object.keys(read).sort()).toEqual(Object.keys(tensors).sort());
        for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
          expect(read[name]).toMatchObject({ dtype, shape });
          const bits = (array: RawArray) =>
            Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString('hex');
          expect(bits(read[name].data)).toBe(bits(data as RawArray));
        }
      }),
      { numRuns: 60 },
    );
  });

  test('a tensor may be called __proto__', async () => {
    const tensors: Record<string, TensorToWrite> = Object.create(null);
    const name = '__proto__';
    tensors[name] = { dtype: 'i32', shape: [2], data: Int32Array.of(3, 4) };
    const file = fresh();
    await writeSafetensors(file, tensors);
    const read = await readSafetensors(file);
    expect(Object.keys(read)).toEqual([name]);
    expect(read[name]).toMatchObject({ dtype: 'i32', data: Int32Array.of(3, 4) });
  });

  test('values of narrow floats are rounded to nearest even', async () => {
    const file = fresh();
    const data = Float32Array.of(1, -2.5, 1 + 2 ** -8);
    await writeSafetensors(file, { x: { dtype: 'bf16', shape: [3], data } });
    expect((await readSafetensors(file)).x.data).toEqual(Uint16Array.of(0x3f80, 0xc020, 0x3f80));
  });

  test('a range of a tensor is read into the buffer given', async () => {
    const file = fresh();
    await writeSafetensors(file, {
      x: { dtype: 'u8', shape: [2, 4], data: Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8) },
    });
    await using reader = await openSafetensors(file);
    const into = new Uint8Array(6);
    const read = await reader.read('x', { into, offset: 4, length: 3 });
    expect([...read]).toEqual([5, 6, 7]);
    expect([...into]).toEqual([5, 6, 7, 0, 0, 0]);
    expect(await reader.info('x')).toMatchObject({ dtype: 'u8', shape: [2, 4], bytes: 8 });
    await refused(
      () => reader.read('x', { offset: 6, length: 3 }),
      /3 bytes from 6 on/,
      'ERR_MOE_INVALID_ARG',
    );
    await refused(
      () => reader.read('x', { into: new Uint8Array(2) }),
      /at least 8 bytes/,
      'ERR_MOE_INVALID_ARG',
    );
    await refused(() => reader.read('y'), /no tensor 'y' among the 1/);
    await reader.close();
    await refused(() => reader.read('x'), /is closed/, 'ERR_MOE_DISPOSED');
  });

  test('a tensor beyond 2 GiB is read where it is asked for', async () => {
    const size = 3_000_000_000;
    const file = fileOf({ x: { dtype: 'U8', shape: [size], data_offsets: [0, size] } }, 0);
    const start = statSync(file).size;
    truncateSync(file, start + size); // sparse: takes no space
    const handle = await open(file, 'r+');
    await handle.write(Uint8Array.of(7, 8, 9), 0, 3, start + size - 3);
    await handle.close();
    await using reader = await openSafetensors(file);
    expect([...(await reader.read('x', { offset: size - 4 }))]).toEqual([0, 7, 8, 9]);
  });

  test('metadata is returned and is no tensor', async () => {
    const file = fresh();
    await writeSafetensors(
      file,
      { x: { dtype: 'i32', shape: [], data: Int32Array.of(7) } },
      { format: 'pt' },
    );
    await using reader = await openSafetensors(file);
    expect(reader.names).toEqual(['x']);
    expect(await reader.metadata('x')).toEqual({ format: 'pt' });
  });

  test('data that does not fit its shape is not written', async () => {
    const write = (tensor: object) => () => writeSafetensors(fresh(), { x: tensor as TensorToWrite });
    const data = new Float32Array(3);
    await refused(write({ dtype: 'f32', shape: [4], data }), /Float32Array\(4\)/, 'ERR_MOE_INVALID_ARG');
    await refused(write({ dtype: 'f64', shape: [3], data }), /one of f32, bf16/, 'ERR_MOE_INVALID_ARG');
    await refused(write({ dtype: 'f32', shape: [-3], data }), /integers >= 0/, 'ERR_MOE_INVALID_ARG');
    await refused(() => writeSafetensors(join(scratch, 'no', 'such', 'folder'), {}), /cannot be written/);
  });
});

describe('malformed files', () => {
  const f32 = (shape: unknown, data_offsets: unknown) => ({ dtype: 'F32', shape, data_offsets });
  const cases: [string, () => string, RegExp][] = [
    ['an empty file', () => fileOf('', 0), /not valid JSON/],
    [
      'fewer than 8 bytes',
      () => {
        const file = fresh();
        writeFileSync(file, 'abc');
        return file;
      },
      /truncated: 3 bytes/,
    ],
    ['a header longer than the file', () => fileOf({}, 0, 1000n), /claims 1000 bytes but 2 follow/],
    ['an absurd header length', () => fileOf({}, 0, 2n ** 64n - 1n), /claims 18446744073709551615 bytes/],
    ['no JSON', () => fileOf('{"x": ', 0), /not valid JSON/],
    [
      'bad UTF-8',
      () => {
        const file = fileOf('{"xxx":1}', 0);
        const bytes = readFileSync(file);
        bytes[11] = 0xff;
        writeFileSync(file, bytes);
        return file;
      },
      /not valid JSON/,
    ],
    ['an array', () => fileOf([], 0), /not a JSON object/],
    ['a tensor that is no object', () => fileOf({ x: 3 }, 0), /tensor 'x' is described by 3/],
    ['no dtype', () => fileOf({ x: { shape: [1], data_offsets: [0, 4] } }, 4), /tensor 'x' has no dtype/],
    ['no shape', () => fileOf({ x: { dtype: 'F32', data_offsets: [0, 4] } }, 4), /tensor 'x' has no shape/],
    ['a negative dimension', () => fileOf({ x: f32([-1], [0, 4]) }, 4), /impossible shape \[-1\]/],
    ['a fractional dimension', () => fileOf({ x: f32([1.5], [0, 4]) }, 4), /impossible shape \[1.5\]/],
    ['a huge dimension', () => fileOf({ x: f32([2 ** 52, 2 ** 20], [0, 4]) }, 4), /impossible shape/],
    ['a dimension that is text', () => fileOf({ x: f32(['1'], [0, 4]) }, 4), /impossible shape \['1'\]/],
    ['no offsets', () => fileOf({ x: f32([1], undefined) }, 4), /impossible data_offsets/],
    [
      'offsets in the wrong order',
      () => fileOf({ x: f32([1], [4, 0]) }, 4),
      /impossible data_offsets \[4,0\]/,
    ],
    ['negative offsets', () => fileOf({ x: f32([1], [-4, 0]) }, 4), /impossible data_offsets/],
    ['offsets beyond the file', () => fileOf({ x: f32([2], [0, 8]) }, 4), /ends at byte 8 .* holds 4/],
    [
      'offsets that do not fit the shape',
      () => fileOf({ x: f32([2], [0, 4]) }, 4),
      /F32\[2\], which takes 8 bytes.*hold 4/,
    ],
    ['overlap', () => fileOf({ x: f32([2], [0, 8]), y: f32([1], [4, 8]) }, 8), /'x' and 'y' overlap/],
    ['a hole', () => fileOf({ x: f32([1], [0, 4]), y: f32([1], [8, 12]) }, 12), /4 bytes before tensor 'y'/],
    [
      'bytes after the last tensor',
      () => fileOf({ x: f32([1], [0, 4]) }, 6),
      /2 bytes after the last tensor/,
    ],
    [
      'the same tensor twice',
      () => fileOf('{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0078":{}}', 4),
      /key 'x' twice/,
    ],
    [
      'a field twice',
      () => fileOf('{"x":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4),
      /key 'dtype' twice/,
    ],
    ['metadata that is no object', () => fileOf({ __metadata__: 3 }, 0), /'__metadata__' is not an object/],
    ['metadata of numbers', () => fileOf({ __metadata__: { a: 1 } }, 0), /'__metadata__' is not an object/],
  ];
  test.each(cases)('%s', async (_, make, message) => {
    const file = make();
    await refused(() => openSafetensors(file), message);
    await expect(openSafetensors(file)).rejects.toThrow(file);
  });

  test('a dtype nobody knows matters only to those who ask for it', async () => {
    const file = fileOf({ x: { dtype: 'F4', shape: [2], data_offsets: [0, 1] }, y: f32([1], [1, 5]) }, 5);
    await using reader = await openSafetensors(file);
    expect((await reader.tensor('y')).data).toEqual(Float32Array.of(0));
    await refused(() => reader.read('x'), /tensor 'x' has dtype F4; .*F8_E4M3/);
  });

  test('whatever happens to a file, the answer is a MoeError or the tensors', async () => {
    const file = fresh();
    await writeSafetensors(file, {
      a: { dtype: 'f32', shape: [2, 3], data: new Float32Array(6) },
      b: { dtype: 'i8', shape: [5], data: new Int8Array(5) },
    });
    const whole = readFileSync(file);
    await fc.assert(
      fc.asyncProperty(fc.nat(whole.length - 1), fc.nat(255), fc.boolean(), async (at, byte, cut) => {
        const bytes = Buffer.from(whole);
        bytes[at] = byte;
        writeFileSync(file, cut ? bytes.subarray(0, at) : bytes);
        try {
          await readSafetensors(file);
        } catch (error) {
          expect(error).toBeInstanceOf(MoeError);
          expect((error as MoeError).code).toBe('ERR_MOE_CHECKPOINT');
        }
      }),
      { numRuns: 300 },
    );
  });

  test('a file cut while it is open', async () => {
    const file = fresh();
    await writeSafetensors(file, { x: { dtype: 'f32', shape: [64], data: new Float32Array(64) } });
    await using reader = await openSafetensors(file);
    truncateSync(file, 100);
    await refused(() => reader.read('x'), /the file ends inside tensor 'x'/);
  });

  test.skipIf(process.platform !== 'linux')('no file stays open after an error', async () => {
    const openFiles = () => readdirSync('/proc/self/fd').length;
    const file = fileOf({ x: 3 }, 0);
    await openSafetensors(file).catch(() => {});
    const before = openFiles();
    for (let i = 0; i < 20; i++) await openSafetensors(file).catch(() => {});
    expect(openFiles()).toBe(before);
  });
});

describe('paths and folders', () => {
  const x = { x: { dtype: 'u8', shape: [1], data: Uint8Array.of(1) } } as const;
  async function folder(contents: Record<string, unknown>): Promise<string> {
    const dir = fresh('');
    await mkdir(dir);
    for (const [name, content] of Object.entries(contents)) {
      if (name.endsWith('.safetensors')) await writeSafetensors(join(dir, name), content as typeof x);
      else writeFileSync(join(dir, name), typeof content === 'string' ? content : JSON.stringify(content));
    }
    return dir;
  }
  const index = 'model.safetensors.index.json';

  test('a path that is not there, and one that is nothing', async () => {
    await refused(() => openSafetensors(join(scratch, 'none')), /none: no such file or folder/);
    await refused(() => openSafetensors(''), /expected path/, 'ERR_MOE_INVALID_ARG');
    await refused(() => openSafetensors(3 as never), /expected path/, 'ERR_MOE_INVALID_ARG');
  });

  test('a folder without weights says what it has', async () => {
    const dir = await folder({ 'pytorch_model.bin': 'x' });
    await refused(() => openSafetensors(dir), /holds neither .* \(there are: pytorch_model.bin\)/);
  });

  test('a sharded folder opens the shards that are needed', async () => {
    const dir = await folder({
      [index]: { weight_map: { x: 'a.safetensors', gone: 'a.safetensors', far: 'b.safetensors' } },
      'a.safetensors': x,
    });
    await using reader = await openSafetensors(dir);
    expect(reader.names).toEqual(['x', 'gone', 'far']);
    expect([...(await reader.read('x'))]).toEqual([1]);
    await refused(() => reader.read('gone'), /a.safetensors: no tensor 'gone', though the index/);
    await refused(() => reader.read('far'), /b.safetensors: no such file/);
    await refused(() => reader.read('else'), /no tensor 'else'/);
  });

  test('a shard that is a folder', async () => {
    const dir = await folder({ [index]: { weight_map: { x: 'a' } } });
    await mkdir(join(dir, 'a'));
    await using reader = await openSafetensors(dir);
    await refused(() => reader.read('x'), /a: not a file/);
  });

  test.each([
    ['no JSON', '{', /this index is not valid JSON/],
    ['no weight_map', {}, /has no weight_map/],
    ['a shard that is no name', { weight_map: { x: 3 } }, /places tensor 'x' in 3/],
    [
      'a shard outside the folder',
      { weight_map: { x: '../a.safetensors' } },
      /places tensor 'x' in '..\/a.safetensors'/,
    ],
  ])('an index with %s', async (_, content, message) => {
    const dir = await folder({ [index]: content });
    await refused(() => openSafetensors(dir), message);
  });

  test('the fixture in three shards', async () => {
    const dir = fileURLToPath(new URL('../fixtures/hf/qwen3_moe', import.meta.url));
    await using reader = await openSafetensors(dir);
    expect(reader.names).toHaveLength(73);
    expect(await reader.info('model.layers.1.mlp.experts.3.up_proj.weight')).toMatchObject({
      shape: [32, 64],
    });
  });
});
