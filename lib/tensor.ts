// Tensors and the one dtype table. A tensor is a handle to memory that its context owns: device memory on
// native backends, a typed array on the oracle. Nothing here waits except read() and its synchronous twin.

import type { WaitOptions } from './abort.js';
import type { Context } from './context.js';
import { MoeError } from './errors.js';
import { bf16, type FloatFormat, f8e4m3, f16 } from './float_formats.js';
import { describeValue } from './options.js';
import { OwnedMemory } from './owned_memory.js';

export type RawArray = Float32Array | Uint16Array | Int32Array | BigInt64Array | Uint8Array | Int8Array;
type RawArrayConstructor = {
  readonly name: string;
  readonly BYTES_PER_ELEMENT: number;
  new (length: number): RawArray;
  new (buffer: ArrayBufferLike, byteOffset?: number, length?: number): RawArray;
};

interface DTypeRow {
  /** The number that stands for the dtype in native calls. */
  readonly code: number;
  readonly bytes: number;
  /** Holds the bits as they are in memory. */
  readonly raw: RawArrayConstructor;
  /** Holds the values; differs from `raw` for the floats that JavaScript has no array for. */
  readonly values: RawArrayConstructor;
  readonly safetensors: string;
  readonly format?: FloatFormat;
}

/** Every dtype, once. csrc/common/dtype.h has the same rows; the contract test compares them. */
export const dtypes = {
  f32: { code: 0, bytes: 4, raw: Float32Array, values: Float32Array, safetensors: 'F32' },
  bf16: { code: 1, bytes: 2, raw: Uint16Array, values: Float32Array, safetensors: 'BF16', format: bf16 },
  f16: { code: 2, bytes: 2, raw: Uint16Array, values: Float32Array, safetensors: 'F16', format: f16 },
  i32: { code: 3, bytes: 4, raw: Int32Array, values: Int32Array, safetensors: 'I32' },
  i64: { code: 4, bytes: 8, raw: BigInt64Array, values: BigInt64Array, safetensors: 'I64' },
  u8: { code: 5, bytes: 1, raw: Uint8Array, values: Uint8Array, safetensors: 'U8' },
  i8: { code: 6, bytes: 1, raw: Int8Array, values: Int8Array, safetensors: 'I8' },
  bool: { code: 7, bytes: 1, raw: Uint8Array, values: Uint8Array, safetensors: 'BOOL' },
  f8_e4m3: {
    code: 8,
    bytes: 1,
    raw: Uint8Array,
    values: Float32Array,
    safetensors: 'F8_E4M3',
    format: f8e4m3,
  },
} as const satisfies Record<string, DTypeRow>;

export type DType = keyof typeof dtypes;
/** Dtypes that hidden states and weights may have. */
export type FloatDType = 'f32' | 'bf16' | 'f16';
/** What `read()` gives for a dtype: floats of every width come as Float32Array. */
export type Values<D extends DType> = InstanceType<(typeof dtypes)[D]['values']>;
/** What `readRaw()` gives for a dtype: the bits as stored. */
export type Raw<D extends DType> = InstanceType<(typeof dtypes)[D]['raw']>;
/** What a tensor can be filled from: its raw array, or for narrow floats a Float32Array, rounded to nearest even. */
export type TensorData<D extends DType> = OnAnyBuffer<Values<D> | Raw<D>>;
/** The same kind of array on an ArrayBuffer or a SharedArrayBuffer. */
type OnAnyBuffer<T> = T extends Float32Array
  ? Float32Array
  : T extends Uint16Array
    ? Uint16Array
    : T extends Int32Array
      ? Int32Array
      : T extends BigInt64Array
        ? BigInt64Array
        : T extends Uint8Array
          ? Uint8Array
          : T extends Int8Array
            ? Int8Array
            : never;

export function dtypeRow(dtype: DType): DTypeRow {
  return dtypes[dtype];
}

/** The number of elements of a shape, which may be past the safe integers. */
export function elementsOf(shape: readonly number[]): number {
  let elements = 1;
  for (const dim of shape) elements *= dim;
  return elements;
}

/** `f32[8, 256]`, the notation of specs and messages. */
export function describeTensor(tensor: { readonly dtype: DType; readonly shape: readonly number[] }): string {
  return `${tensor.dtype}[${tensor.shape.join(', ')}]`;
}

/** Values of raw bits: the same array where JavaScript has the dtype, a widened copy where it has not. */
export function decode<D extends DType>(dtype: D, raw: Raw<D>): Values<D> {
  const { format } = dtypeRow(dtype);
  if (format === undefined) return raw as unknown as Values<D>;
  const bits = raw as Uint16Array | Uint8Array;
  const values = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) values[i] = format.decode(bits[i]);
  return values as unknown as Values<D>;
}

// A subclass or a property of its own may tell lies about an array; these getters look at the array itself.
const typedArray = Object.getPrototypeOf(Uint8Array.prototype);
const typedArrayTag = Object.getOwnPropertyDescriptor(typedArray, Symbol.toStringTag)!.get!;
const typedArrayLength = Object.getOwnPropertyDescriptor(typedArray, 'length')!.get!;

/** `Float32Array` for any Float32Array, one of another realm (a vm context, a test runner) too. */
export function arrayType(value: unknown): string | undefined {
  return typedArrayTag.call(value);
}

/** Elements of a typed array; 0 for one whose buffer is detached or has shrunk away under it. */
function arrayLength(data: RawArray): number {
  return typedArrayLength.call(data);
}

/** A copy of the shape, each number read once, so that nothing can answer differently later. */
export function checkShape(op: string, dtype: unknown, shape: unknown): number[] {
  if (typeof dtype !== 'string' || !Object.hasOwn(dtypes, dtype)) {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected dtype: one of ${Object.keys(dtypes).join(', ')} but received ${describeValue(dtype)}`,
      { op, arg: 'dtype' },
    );
  }
  const list = Array.isArray(shape);
  const rank: unknown = list ? shape.length : 0;
  const dims = list ? Array.from({ length: Math.min(Number(rank), 9) }, (_, axis) => shape[axis]) : [];
  if (dims.length >= 1 && dims.length <= 8 && dims.every((dim) => Number.isSafeInteger(dim) && dim >= 0))
    return dims;
  throw new MoeError(
    'ERR_MOE_INVALID_ARG',
    `expected shape: 1 to 8 integers >= 0 but received ${list ? `[${dims.map(describeValue).join(', ')}]` : describeValue(shape)}`,
    { op, arg: 'shape' },
  );
}

/** Data that fills a tensor exactly, of one of the dtype's array types. */
export function checkData(op: string, dtype: DType, elements: number, data: RawArray): void {
  const { raw, values } = dtypes[dtype];
  const types = raw === (values as unknown) ? raw.name : `${values.name} or ${raw.name}`;
  const type = arrayType(data);
  if ((type !== raw.name && type !== values.name) || arrayLength(data) !== elements) {
    const received = type === undefined ? describeValue(data) : `${type}(${arrayLength(data)})`;
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected data: ${types}(${elements}) for ${dtype} but received ${received}`,
      { op, arg: 'data' },
    );
  }
}

/** Raw bits of values, rounded to nearest even; data that is raw already is copied. */
export function encode<D extends DType>(dtype: D, data: TensorData<D>): Raw<D> {
  const { format, raw } = dtypeRow(dtype);
  const length = arrayLength(data as RawArray);
  if (format === undefined || arrayType(data) === raw.name) {
    const copy = new raw(length);
    if (length > 0) copy.set(data as never); // a detached array has no elements and cannot be copied
    return copy as Raw<D>;
  }
  const bits = new raw(length) as Uint16Array | Uint8Array;
  const values = data as Float32Array;
  for (let i = 0; i < bits.length; i++) bits[i] = format.encode(values[i]);
  return bits as unknown as Raw<D>;
}

/** What a backend hands out for memory: a number on native backends, an object of its own on the oracle. */
export type Handle = unknown;

const key = Symbol('moe-kernels construction');
export const constructionKey: symbol = key;

/**
 * Memory of a context, with a dtype and a shape. Made by `context.tensor(...)` and by ops.
 *
 * Ops and `write` are enqueued and return at once; `read`, `readRaw` and their `Sync` twins wait. Dispose tensors
 * (`using t = ...` or `t.dispose()`) when done: memory goes back as soon as the work that uses it has finished,
 * while the garbage collector, which cannot see device memory, is only a net.
 */
export class Tensor<D extends DType = DType> extends OwnedMemory {
  readonly dtype: D;
  readonly shape: readonly number[];
  /** Number of elements. */
  readonly size: number;

  /** @internal Tensors are made by contexts; nobody else may hold `shape`. */
  constructor(secret: symbol, context: Context, dtype: D, shape: readonly number[], handle: Handle) {
    if (secret !== key) {
      throw new MoeError('ERR_MOE_INVALID_ARG', 'tensors are made by context.tensor(dtype, shape, data)', {
        op: 'Tensor',
      });
    }
    super(context, handle);
    this.dtype = dtype;
    this.shape = Object.freeze(shape);
    this.size = elementsOf(shape);
    Object.freeze(this); // what kernels were told stays true
  }

  /**
   * Waits for the work enqueued so far and copies the values out; rejects when that work failed, naming the op.
   * A `signal` ends the wait with ERR_MOE_ABORTED, not the work: others may depend on it.
   * @throws MoeError ERR_MOE_CAPTURE, at the call, while a capture is being recorded.
   */
  read(options?: WaitOptions): Promise<Values<D>> {
    this.context.assertNotRecording('read');
    return this.context.readTensor(this, 'values', options) as Promise<unknown> as Promise<Values<D>>;
  }

  /** Like `read`, but the bits as stored: Uint16Array for bf16 and f16. */
  readRaw(options?: WaitOptions): Promise<Raw<D>> {
    this.context.assertNotRecording('readRaw');
    return this.context.readTensor(this, 'raw', options) as Promise<unknown> as Promise<Raw<D>>;
  }

  /** `read` that blocks the thread. For benchmarks and scripts. */
  readSync(): Values<D> {
    return this.context.readTensorSync(this, 'values') as unknown as Values<D>;
  }

  /** `readRaw` that blocks the thread. For benchmarks and scripts. */
  readRawSync(): Raw<D> {
    return this.context.readTensorSync(this, 'raw') as unknown as Raw<D>;
  }

  /**
   * Enqueues an overwrite of the whole tensor. `data` is copied before the call returns. This is how new input
   * enters a captured sequence.
   */
  write(data: TensorData<D>): this {
    this.context.writeTensor(this, data as RawArray);
    return this;
  }

  /** A copy of this tensor in another context. */
  to(context: Context): Promise<Tensor<D>> {
    this.context.assertNotRecording('to');
    return this.#copyTo(context);
  }

  async #copyTo(context: Context): Promise<Tensor<D>> {
    // The class itself cannot be imported here: contexts import tensors
    if (!(context instanceof (this.context.constructor as typeof Context))) {
      throw new MoeError('ERR_MOE_INVALID_ARG', 'expected context: a context from createContext', {
        op: 'to',
        arg: 'context',
      });
    }
    return context.tensor(this.dtype, this.shape, (await this.readRaw()) as TensorData<D>);
  }

  override toString(): string {
    return describeTensor(this);
  }
}
