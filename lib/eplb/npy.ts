// Reads numpy's .npy format (versions 1 to 3): magic, version, header length, a Python dict literal, raw data.
// Every dtype a count or an id can have is widened to f64; 64-bit integers beyond 2^53 are refused.
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { f16 } from '../float_formats.js';

export interface NpyArray {
  shape: number[];
  /** Row-major, whatever order the file has. */
  data: Float64Array;
}

const check = new Arguments('npy');

const magic = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59];

/** True if the bytes start like an .npy file. */
export const isNpy = (bytes: Uint8Array): boolean => magic.every((byte, index) => bytes[index] === byte);

type Read = (view: DataView, offset: number, little: boolean) => number;

const readers: Record<string, [size: number, read: Read]> = {
  b1: [1, (view, offset) => view.getUint8(offset)],
  u1: [1, (view, offset) => view.getUint8(offset)],
  i1: [1, (view, offset) => view.getInt8(offset)],
  u2: [2, (view, offset, little) => view.getUint16(offset, little)],
  i2: [2, (view, offset, little) => view.getInt16(offset, little)],
  u4: [4, (view, offset, little) => view.getUint32(offset, little)],
  i4: [4, (view, offset, little) => view.getInt32(offset, little)],
  u8: [8, (view, offset, little) => Number(view.getBigUint64(offset, little))],
  i8: [8, (view, offset, little) => Number(view.getBigInt64(offset, little))],
  f2: [2, (view, offset, little) => f16.decode(view.getUint16(offset, little))],
  f4: [4, (view, offset, little) => view.getFloat32(offset, little)],
  f8: [8, (view, offset, little) => view.getFloat64(offset, little)],
};

/** Parses an .npy file. Throws ERR_MOE_CHECKPOINT naming the file and the header field at fault. */
export function parseNpy(bytes: Uint8Array, file = 'npy'): NpyArray {
  check.instance('bytes', bytes, Uint8Array);
  const bad = (message: string): MoeError =>
    new MoeError('ERR_MOE_CHECKPOINT', `${file}: ${message}`, { op: 'npy', arg: 'file' });
  if (!isNpy(bytes)) throw bad('expected an .npy file but received bytes without its magic');
  if (bytes.length < 12) throw bad(`expected an .npy header but received a file of ${bytes.length} bytes`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const long = bytes[6]! >= 2;
  const start = long ? 12 : 10;
  const length = long ? view.getUint32(8, true) : view.getUint16(8, true);
  if (bytes[6]! < 1 || bytes[6]! > 3 || start + length > bytes.length)
    throw bad(
      `expected version 1 to 3 and a whole header but received version ${bytes[6]} and ${bytes.length} bytes`,
    );
  const header = new TextDecoder('latin1').decode(bytes.subarray(start, start + length));
  const descr = /'descr'\s*:\s*'([<>|=]?)([a-z]\d)'/.exec(header);
  const reader = descr === null ? undefined : readers[descr[2]!];
  if (reader === undefined)
    throw bad(`expected descr to be an integer or float dtype but received ${header.trim()}`);
  const shapeText = /'shape'\s*:\s*\(([^)]*)\)/.exec(header)?.[1];
  const fortran = /'fortran_order'\s*:\s*(True|False)/.exec(header)?.[1];
  const shape = shapeText
    ?.split(',')
    .filter((part) => part.trim() !== '')
    .map(Number);
  if (
    shape === undefined ||
    fortran === undefined ||
    !shape.every((size) => Number.isInteger(size) && size >= 0)
  )
    throw bad(`expected shape and fortran_order in the header but received ${header.trim()}`);
  const elements = shape.reduce((product, size) => product * size, 1);
  const [size, read] = reader;
  if (bytes.length - start - length !== elements * size)
    throw bad(
      `expected ${elements * size} bytes of data for shape [${shape}] but received ${bytes.length - start - length}`,
    );
  const little = descr![1] !== '>';
  const data = new Float64Array(elements);
  for (let index = 0; index < elements; index++) {
    const value = read(view, start + length + index * size, little);
    if (size === 8 && descr![2] !== 'f8' && Math.abs(value) > Number.MAX_SAFE_INTEGER)
      throw bad(`expected integers below 2^53 but entry ${index} is ${value}`);
    data[index] = value;
  }
  return { shape, data: fortran === 'True' ? rowMajor(shape, data) : data };
}

const rowMajor = (shape: number[], data: Float64Array): Float64Array => {
  const out = new Float64Array(data.length);
  const place = new Array<number>(shape.length).fill(0);
  for (let index = 0; index < out.length; index++) {
    let from = 0;
    for (let axis = shape.length - 1; axis >= 0; axis--) from = from * shape[axis]! + place[axis]!;
    out[index] = data[from]!;
    for (let axis = shape.length - 1; axis >= 0 && ++place[axis]! === shape[axis]; axis--) place[axis] = 0;
  }
  return out;
};

/**
 * The bytes of an .npy file (version 1.0, row-major) of f64, i32 or u8 data. Throws ERR_MOE_INVALID_ARG for data of
 * another type, and where it does not fill the shape.
 */
export function formatNpy(
  shape: readonly number[],
  data: Float64Array | Int32Array | Uint8Array,
): Uint8Array {
  for (const [axis, size] of check.list('shape', shape).entries()) check.integer(`shape[${axis}]`, size, 0);
  if (!(data instanceof Float64Array || data instanceof Int32Array || data instanceof Uint8Array))
    check.refuse('data', 'a Float64Array, Int32Array or Uint8Array', data);
  if (data.length !== shape.reduce((product, size) => product * size, 1))
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected data that fills shape [${shape}] but received ${data.length} values`,
      { op: 'npy', arg: 'data' },
    );
  const descr = data instanceof Float64Array ? '<f8' : data instanceof Int32Array ? '<i4' : '|u1';
  const dict = `{'descr': '${descr}', 'fortran_order': False, 'shape': (${shape.join(', ')}${shape.length === 1 ? ',' : ''}), }`;
  const padded = `${dict.padEnd(Math.ceil((dict.length + 11) / 64) * 64 - 11)}\n`;
  const out = new Uint8Array(10 + padded.length + data.byteLength);
  out.set([...magic, 1, 0, padded.length & 255, padded.length >> 8]);
  out.set(new TextEncoder().encode(padded), 10);
  out.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), 10 + padded.length);
  return out;
}
