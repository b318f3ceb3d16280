// The safetensors format: an 8-byte little-endian length, a JSON header, raw little-endian bytes. Read here as one
// file or as a folder of shards, lazily: opening reads headers only, and a read touches only the bytes asked for, so
// one layer of a checkpoint of a terabyte costs that layer. A header is trusted only after every offset in it has
// been checked against the file, as the reference implementation does: tensors cover the data exactly, without
// holes and without overlap.
import { type FileHandle, open, readdir, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import {
  arrayType,
  type DType,
  dtypeRow,
  dtypes,
  encode,
  type RawArray,
  type TensorData,
} from '../tensor.js';

const op = 'safetensors';
/** The reference implementation's limit; a longer header is a file of another kind. */
const MAX_HEADER_BYTES = 100_000_000;
/** A single read of the operating system ends below 2 GiB. */
const READ_CHUNK_BYTES = 2 ** 30;
const INDEX_FILE = 'model.safetensors.index.json';
const SINGLE_FILE = 'model.safetensors';

/** Where a tensor lies. */
export interface TensorInfo {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly file: string;
  /** Of the first byte, in the file. */
  readonly offset: number;
  readonly bytes: number;
}

/** A tensor in host memory: `data` holds the bits as stored. */
export interface HostTensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly data: RawArray;
}

/** What `writeSafetensors` takes: raw bits, or a Float32Array of values for the narrow floats. */
export interface TensorToWrite<D extends DType = DType> {
  readonly dtype: D;
  readonly shape: readonly number[];
  readonly data: TensorData<D>;
}

export function checkpointError(message: string, details: { arg?: string; cause?: unknown } = {}): MoeError {
  return new MoeError('ERR_MOE_CHECKPOINT', message, { op: 'checkpoint', ...details });
}

/** An entry of a header. The dtype stays text: a dtype nobody can read matters only when its tensor is asked for. */
interface Entry {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly offset: number;
  readonly bytes: number;
}

const dtypeByName = new Map(
  Object.entries(dtypes).map(([dtype, row]) => [row.safetensors as string, dtype as DType]),
);

class Shard {
  readonly file: string;
  readonly entries: ReadonlyMap<string, Entry>;
  readonly metadata: Readonly<Record<string, string>>;
  readonly #handle: FileHandle;

  private constructor(
    file: string,
    handle: FileHandle,
    header: { entries: Map<string, Entry>; metadata: Record<string, string> },
  ) {
    this.file = file;
    this.#handle = handle;
    this.entries = header.entries;
    this.metadata = header.metadata;
  }

  static async open(file: string): Promise<Shard> {
    const handle = await openFile(file);
    try {
      return new Shard(file, handle, await readHeader(file, handle));
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  info(name: string): TensorInfo {
    const entry = this.entries.get(name)!;
    const dtype = dtypeByName.get(entry.dtype);
    if (dtype === undefined) {
      throw checkpointError(
        `${this.file}: tensor '${name}' has dtype ${entry.dtype}; those that can be read are ${[...dtypeByName.keys()].join(', ')}`,
      );
    }
    return { name, dtype, shape: entry.shape, file: this.file, offset: entry.offset, bytes: entry.bytes };
  }

  async read(name: string, into: Uint8Array, offset: number): Promise<void> {
    for (let done = 0; done < into.byteLength; ) {
      const length = Math.min(READ_CHUNK_BYTES, into.byteLength - done);
      const { bytesRead } = await this.#handle.read(into, done, length, offset + done);
      if (bytesRead === 0) throw checkpointError(`${this.file}: the file ends inside tensor '${name}'`);
      done += bytesRead;
    }
  }

  close(): Promise<void> {
    return this.#handle.close();
  }
}

/**
 * Reads a safetensors file or a folder of them. Headers of shards are read when one of their tensors is first asked
 * for, so a checkpoint may lack the shards that nobody needs. Close it when done: it holds the files open.
 */
export class SafetensorsReader {
  readonly path: string;
  /** Every tensor name, with the file that holds it. */
  readonly #files: ReadonlyMap<string, string>;
  readonly #shards = new Map<string, Promise<Shard>>();
  #closed = false;

  private constructor(path: string, files: ReadonlyMap<string, string>) {
    this.path = path;
    this.#files = files;
  }

  /**
   * Opens a `.safetensors` file, an index (`*.index.json`), or a folder that holds `model.safetensors` or
   * `model.safetensors.index.json`.
   * @throws MoeError ERR_MOE_CHECKPOINT naming the file, and the tensor where one is at fault.
   */
  static async open(path: string): Promise<SafetensorsReader> {
    const file = await locate(path);
    if (file.endsWith('.json')) return new SafetensorsReader(path, await readIndex(file));
    const shard = await Shard.open(file);
    const reader = new SafetensorsReader(
      path,
      new Map([...shard.entries.keys()].map((name) => [name, file])),
    );
    reader.#shards.set(file, Promise.resolve(shard));
    return reader;
  }

  get names(): string[] {
    return [...this.#files.keys()];
  }

  has(name: string): boolean {
    return this.#files.has(name);
  }

  /** Dtype, shape and place of a tensor. */
  async info(name: string): Promise<TensorInfo> {
    return (await this.#shardOf(name)).info(name);
  }

  /**
   * The bytes of a tensor, or `length` of them from `offset` on, read into `into` or into a new buffer.
   * @throws MoeError ERR_MOE_CHECKPOINT; ERR_MOE_INVALID_ARG for a range outside the tensor or a buffer too small.
   */
  async read(
    name: string,
    { into, offset = 0, length }: { into?: Uint8Array; offset?: number; length?: number } = {},
  ): Promise<Uint8Array> {
    const shard = await this.#shardOf(name);
    const info = shard.info(name);
    const bytes = length ?? info.bytes - offset;
    const inside = Number.isSafeInteger(offset) && Number.isSafeInteger(bytes) && offset >= 0 && bytes >= 0;
    if (!inside || offset + bytes > info.bytes) {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected bytes inside tensor '${name}' of ${info.bytes} bytes but received ${bytes} bytes from ${offset} on`,
        { op, arg: 'offset' },
      );
    }
    if (into !== undefined && into.byteLength < bytes) {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected into: at least ${bytes} bytes for tensor '${name}' but received ${into.byteLength}`,
        { op, arg: 'into' },
      );
    }
    const target = into === undefined ? allocate(name, bytes) : into.subarray(0, bytes);
    await shard.read(name, target, info.offset + offset);
    return target;
  }

  /** A whole tensor in host memory. */
  async tensor(name: string): Promise<HostTensor> {
    const { dtype, shape } = await this.info(name);
    const bytes = await this.read(name);
    const { raw, bytes: width } = dtypeRow(dtype);
    return { dtype, shape, data: new raw(bytes.buffer, bytes.byteOffset, bytes.byteLength / width) };
  }

  /** The `__metadata__` of the file that holds `name`. */
  async metadata(name: string): Promise<Readonly<Record<string, string>>> {
    return (await this.#shardOf(name)).metadata;
  }

  /** Closes every file that was opened. Closing twice is harmless. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    const opened = await Promise.allSettled(this.#shards.values());
    await Promise.all(
      opened.map((shard) => (shard.status === 'fulfilled' ? shard.value.close() : undefined)),
    );
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #shardOf(name: string): Promise<Shard> {
    if (this.#closed) {
      throw new MoeError('ERR_MOE_DISPOSED', `expected an open reader but ${this.path} is closed`, { op });
    }
    const file = this.#files.get(name);
    if (file === undefined) {
      throw checkpointError(
        `${this.path}: no tensor '${name}' among the ${this.#files.size} of this checkpoint`,
      );
    }
    let opening = this.#shards.get(file);
    if (opening === undefined) {
      opening = Shard.open(file);
      this.#shards.set(file, opening);
    }
    const shard = await opening;
    if (!shard.entries.has(name)) {
      throw checkpointError(`${file}: no tensor '${name}', though the index of ${this.path} places it there`);
    }
    return shard;
  }
}

/** Opens a safetensors file or folder for reading tensor by tensor. */
export const openSafetensors = (path: string): Promise<SafetensorsReader> => SafetensorsReader.open(path);

/**
 * Reads whole tensors of a file or folder into host memory: those named, or all.
 * @throws MoeError ERR_MOE_CHECKPOINT naming the file and the tensor at fault.
 */
export async function readSafetensors(
  path: string,
  names?: readonly string[],
): Promise<Record<string, HostTensor>> {
  if (names !== undefined && !(Array.isArray(names) && names.every((name) => typeof name === 'string'))) {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected names: an array of names but received ${describeValue(names)}`,
      {
        op,
        arg: 'names',
      },
    );
  }
  const reader = await SafetensorsReader.open(path);
  try {
    const tensors: Record<string, HostTensor> = Object.create(null);
    for (const name of names ?? reader.names) tensors[name] = await reader.tensor(name);
    return tensors;
  } finally {
    await reader.close();
  }
}

/**
 * Writes tensors to one file, replacing it. Wide dtypes come first so that every tensor is aligned to its elements.
 * @throws MoeError ERR_MOE_INVALID_ARG for data that does not fit its dtype and shape; ERR_MOE_CHECKPOINT when the
 * file cannot be written.
 */
export async function writeSafetensors(
  file: string,
  tensors: Readonly<Record<string, TensorToWrite>>,
  metadata?: Readonly<Record<string, string>>,
): Promise<void> {
  if (typeof tensors !== 'object' || tensors === null) {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected tensors: an object but received ${describeValue(tensors)}`,
      {
        op,
        arg: 'tensors',
      },
    );
  }
  const sorted = Object.entries(tensors).sort(
    ([a, x], [b, y]) =>
      (dtypes[y?.dtype]?.bytes ?? 0) - (dtypes[x?.dtype]?.bytes ?? 0) || (a < b ? -1 : a > b ? 1 : 0),
  );
  // Without a prototype, so that '__proto__' is a name like any other.
  const header: Record<string, unknown> = Object.create(null);
  if (metadata !== undefined) header.__metadata__ = metadata;
  const chunks: Uint8Array[] = [];
  let end = 0;
  for (const [name, tensor] of sorted) {
    checkTensorToWrite(name, tensor);
    const { dtype, shape, data } = tensor;
    const bits = encode(dtype, data);
    const begin = end;
    end += bits.byteLength;
    header[name] = { dtype: dtypes[dtype].safetensors, shape, data_offsets: [begin, end] };
    chunks.push(new Uint8Array(bits.buffer, bits.byteOffset, bits.byteLength));
  }
  const json = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(8 + Math.ceil(json.length / 8) * 8).fill(0x20);
  padded.set(json, 8);
  new DataView(padded.buffer).setBigUint64(0, BigInt(padded.length - 8), true);
  let handle: FileHandle | undefined;
  try {
    handle = await open(file, 'w');
    for (const chunk of [padded, ...chunks]) await handle.writeFile(chunk);
  } catch (cause) {
    throw checkpointError(`${file}: cannot be written (${(cause as Error).message})`, { cause });
  } finally {
    await handle?.close();
  }
}

function checkTensorToWrite(name: string, tensor: TensorToWrite): void {
  const fail = (expected: string, received: string): never => {
    throw new MoeError('ERR_MOE_INVALID_ARG', `expected ${expected} but received ${received}`, {
      op,
      arg: name,
    });
  };
  if (typeof tensor !== 'object' || tensor === null)
    fail(`'${name}': { dtype, shape, data }`, describeValue(tensor));
  const { dtype, shape, data } = tensor;
  if (name === '__metadata__') fail("a tensor name other than '__metadata__'", 'that one');
  if (!Object.hasOwn(dtypes, dtype))
    fail(`dtype of '${name}': one of ${Object.keys(dtypes).join(', ')}`, describeValue(dtype));
  const elements = Array.isArray(shape) ? elementsOfShape(shape) : undefined;
  if (elements === undefined) fail(`shape of '${name}': integers >= 0`, describeValue(shape));
  const { raw, values } = dtypes[dtype];
  const type = arrayType(data);
  if ((type !== raw.name && type !== values.name) || data.length !== elements) {
    fail(
      `data of '${name}': ${raw.name}(${elements}) for ${dtype}[${shape.join(', ')}]`,
      describeValue(data),
    );
  }
}

/** Finds what a path stands for: a file to read as safetensors, or an index. */
async function locate(path: string): Promise<string> {
  if (typeof path !== 'string' || path === '') {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected path: a file or folder but received ${describeValue(path)}`,
      {
        op,
        arg: 'path',
      },
    );
  }
  let isFolder: boolean;
  try {
    isFolder = (await stat(path)).isDirectory();
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    throw checkpointError(
      missing ? `${path}: no such file or folder` : `${path}: ${(cause as Error).message}`,
      { cause },
    );
  }
  if (!isFolder) return path;
  const files = await readdir(path);
  for (const file of [SINGLE_FILE, INDEX_FILE]) if (files.includes(file)) return join(path, file);
  const weights = files.filter((file) => /\.(safetensors|bin|pt|pth|gguf)$/.test(file)).sort();
  throw checkpointError(
    `${path}: holds neither ${SINGLE_FILE} nor ${INDEX_FILE}` +
      (weights.length > 0 ? ` (there are: ${weights.slice(0, 5).join(', ')})` : ''),
  );
}

async function openFile(file: string): Promise<FileHandle> {
  let handle: FileHandle;
  try {
    handle = await open(file, 'r');
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    throw checkpointError(missing ? `${file}: no such file` : `${file}: ${(cause as Error).message}`, {
      cause,
    });
  }
  try {
    if (!(await handle.stat()).isFile()) throw checkpointError(`${file}: not a file`);
    return handle;
  } catch (error) {
    await handle.close();
    throw error;
  }
}

async function readHeader(
  file: string,
  handle: FileHandle,
): Promise<{ entries: Map<string, Entry>; metadata: Record<string, string> }> {
  const { size } = await handle.stat();
  if (size < 8) throw checkpointError(`${file}: truncated: ${size} bytes, too few for a safetensors header`);
  const prefix = new Uint8Array(8);
  await handle.read(prefix, 0, 8, 0);
  const length = new DataView(prefix.buffer).getBigUint64(0, true);
  if (length > BigInt(size - 8)) {
    throw checkpointError(
      `${file}: truncated or no safetensors file: its header claims ${length} bytes but ${size - 8} follow`,
    );
  }
  if (length > MAX_HEADER_BYTES) {
    throw checkpointError(
      `${file}: its header claims ${length} bytes; at most ${MAX_HEADER_BYTES} are allowed`,
    );
  }
  const bytes = new Uint8Array(Number(length));
  const { bytesRead } = await handle.read(bytes, 0, bytes.length, 8);
  if (bytesRead !== bytes.length) throw checkpointError(`${file}: truncated inside its header`);
  const header = parseStrictJson(file, bytes, 'its header');
  const metadata = readMetadata(file, header);
  const start = 8 + bytes.length;
  const entries = new Map<string, Entry>();
  for (const [name, value] of Object.entries(header)) {
    if (name !== '__metadata__') entries.set(name, readEntry(file, name, value, start, size));
  }
  checkCoverage(file, entries, start, size);
  return { entries, metadata };
}

/** A JSON object; `what` names it in messages. */
export function parseJson(file: string, bytes: Uint8Array, what: string): Record<string, unknown> {
  return parseObject(file, bytes, what).value;
}

/** A JSON object without duplicate keys: which of two a writer meant, nobody can tell. */
function parseStrictJson(file: string, bytes: Uint8Array, what: string): Record<string, unknown> {
  const { value, text } = parseObject(file, bytes, what);
  const duplicate = findDuplicateKey(text);
  if (duplicate !== undefined) throw checkpointError(`${file}: ${what} has the key '${duplicate}' twice`);
  return value;
}

function parseObject(
  file: string,
  bytes: Uint8Array,
  what: string,
): { value: Record<string, unknown>; text: string } {
  let value: unknown;
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
    value = JSON.parse(text);
  } catch (cause) {
    throw checkpointError(`${file}: ${what} is not valid JSON (${(cause as Error).message})`, { cause });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw checkpointError(`${file}: ${what} is ${describeValue(value)}, not a JSON object`);
  }
  return { value: value as Record<string, unknown>, text };
}

function readMetadata(file: string, header: Record<string, unknown>): Record<string, string> {
  const metadata = Object.hasOwn(header, '__metadata__') ? header.__metadata__ : {};
  const valid = typeof metadata === 'object' && metadata !== null && !Array.isArray(metadata);
  if (!valid || !Object.values(metadata).every((value) => typeof value === 'string')) {
    throw checkpointError(`${file}: '__metadata__' is not an object of strings`);
  }
  return metadata as Record<string, string>;
}

function readEntry(file: string, name: string, value: unknown, start: number, size: number): Entry {
  const fail = (problem: string): never => {
    throw checkpointError(`${file}: tensor '${name}' ${problem}`);
  };
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    return fail(`is described by ${describeValue(value)}, not by an object`);
  }
  const { dtype, shape, data_offsets: offsets } = value as Record<string, unknown>;
  if (typeof dtype !== 'string') return fail(`has no dtype (${describeValue(dtype)})`);
  if (!Array.isArray(shape)) return fail(`has no shape (${describeValue(shape)})`);
  const elements = elementsOfShape(shape);
  if (elements === undefined) {
    return fail(`has an impossible shape [${shape.slice(0, 9).map(describeValue).join(', ')}]`);
  }
  const isOffset = (offset: unknown): offset is number =>
    Number.isSafeInteger(offset) && (offset as number) >= 0;
  if (
    !Array.isArray(offsets) ||
    offsets.length !== 2 ||
    !offsets.every(isOffset) ||
    offsets[0] > offsets[1]
  ) {
    return fail(`has impossible data_offsets ${JSON.stringify(offsets)?.slice(0, 80)}`);
  }
  const [begin, end] = offsets as [number, number];
  if (start + end > size) {
    return fail(`ends at byte ${end} of the data but the file holds ${size - start}; it may be truncated`);
  }
  const known = dtypeByName.get(dtype);
  if (known !== undefined && elements * dtypes[known].bytes !== end - begin) {
    return fail(
      `is ${dtype}[${shape.join(', ')}], which takes ${elements * dtypes[known].bytes} bytes, but its data_offsets ` +
        `[${begin}, ${end}] hold ${end - begin}`,
    );
  }
  return { dtype, shape: Object.freeze([...shape]), offset: start + begin, bytes: end - begin };
}

/** The number of elements of a shape, or undefined where it is none or leaves the safe integers. */
function elementsOfShape(shape: readonly unknown[]): number | undefined {
  let elements = 1;
  for (const dim of shape) {
    if (!Number.isSafeInteger(dim) || (dim as number) < 0) return undefined;
    elements *= dim as number;
    if (!Number.isSafeInteger(elements * 8)) return undefined;
  }
  return elements;
}

function checkCoverage(file: string, entries: ReadonlyMap<string, Entry>, start: number, size: number): void {
  const sorted = [...entries].sort(([, a], [, b]) => a.offset - b.offset || a.bytes - b.bytes);
  let end = start;
  let before = '';
  for (const [name, { offset, bytes }] of sorted) {
    if (offset < end) throw checkpointError(`${file}: tensors '${before}' and '${name}' overlap`);
    if (offset > end) {
      throw checkpointError(`${file}: ${offset - end} bytes before tensor '${name}' belong to no tensor`);
    }
    end = offset + bytes;
    before = name;
  }
  if (end !== size)
    throw checkpointError(`${file}: ${size - end} bytes after the last tensor belong to no tensor`);
}

/** The first key that an object of this (valid) JSON text has twice; JSON.parse silently keeps the last. */
function findDuplicateKey(json: string): string | undefined {
  const scopes: (Set<string> | undefined)[] = [];
  let keyNext = false;
  for (let i = 0; i < json.length; i++) {
    const char = json[i];
    if (char === '"') {
      let end = i + 1;
      while (json[end] !== '"') end += json[end] === '\\' ? 2 : 1;
      const scope = scopes.at(-1);
      if (keyNext && scope !== undefined) {
        const key = JSON.parse(json.slice(i, end + 1)) as string;
        if (scope.has(key)) return key;
        scope.add(key);
        keyNext = false;
      }
      i = end;
    } else if (char === '{') {
      scopes.push(new Set());
      keyNext = true;
    } else if (char === '[') {
      scopes.push(undefined);
      keyNext = false;
    } else if (char === '}' || char === ']') {
      scopes.pop();
    } else if (char === ',') {
      keyNext = scopes.at(-1) !== undefined;
    }
  }
  return undefined;
}

async function readIndex(file: string): Promise<Map<string, string>> {
  const handle = await openFile(file);
  let bytes: Uint8Array;
  try {
    bytes = await handle.readFile();
  } finally {
    await handle.close();
  }
  const { weight_map: map } = parseStrictJson(file, bytes, 'this index');
  if (typeof map !== 'object' || map === null || Array.isArray(map)) {
    throw checkpointError(`${file}: has no weight_map`);
  }
  const files = new Map<string, string>();
  for (const [name, shard] of Object.entries(map)) {
    if (typeof shard !== 'string' || shard === '' || basename(shard) !== shard || shard === '..') {
      throw checkpointError(
        `${file}: places tensor '${name}' in ${describeValue(shard)}, not in a file of its folder`,
      );
    }
    files.set(name, join(dirname(file), shard));
  }
  return files;
}

function allocate(name: string, bytes: number): Uint8Array {
  try {
    return new Uint8Array(bytes);
  } catch (cause) {
    throw new MoeError('ERR_MOE_OOM', `out of memory: tensor '${name}' needs ${bytes} bytes in one buffer`, {
      op,
      cause,
    });
  }
}
