// What a safetensors file says of itself: an 8-byte little-endian length and a JSON header. It is trusted only after
// every offset in it has been checked against the file, as the reference implementation does: tensors cover the data
// exactly, without holes and without overlap.
import type { FileHandle } from 'node:fs/promises';
import { describeValue } from '../options.js';
import { type DType, dtypes } from '../tensor.js';
import { checkpointError } from './checkpoint_error.js';
import { parseStrictJson } from './json.js';

/** The reference implementation's limit; a longer header is a file of another kind. */
const MAX_HEADER_BYTES = 100_000_000;

/** An entry of a header. The dtype stays text: a dtype nobody can read matters only when its tensor is asked for. */
export interface Entry {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly offset: number;
  readonly bytes: number;
}

export const dtypeByName = new Map(
  Object.entries(dtypes).map(([dtype, row]) => [row.safetensors as string, dtype as DType]),
);

export async function readHeader(
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
export function elementsOfShape(shape: readonly unknown[]): number | undefined {
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
