// Writes one safetensors file.
import { type FileHandle, open } from 'node:fs/promises';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import { arrayType, type DType, dtypes, encode, type TensorData } from '../tensor.js';
import { checkpointError } from './checkpoint_error.js';
import { elementsOfShape } from './safetensors_header.js';

const op = 'safetensors';

/** What `writeSafetensors` takes: raw bits, or a Float32Array of values for the narrow floats. */
export interface TensorToWrite<D extends DType = DType> {
  readonly dtype: D;
  readonly shape: readonly number[];
  readonly data: TensorData<D>;
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
