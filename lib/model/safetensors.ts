// Safetensors: a header and raw little-endian bytes. Read here as one file or as a folder of shards, lazily: opening
// reads headers only, and a read touches only the bytes asked for, so one layer of a checkpoint of a terabyte costs
// that layer.
import { type FileHandle, open, readdir, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import { type DType, dtypeRow, type RawArray } from '../tensor.js';
import { checkpointError } from './checkpoint_error.js';
import { parseStrictJson } from './json.js';
import { dtypeByName, type Entry, readHeader } from './safetensors_header.js';

const op = 'safetensors';

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
