// Recordings of what a block did elsewhere (`moe_io.safetensors`: `<block>.input`, `<block>.output`, the gate's
// outputs), and activations in files in general: found by name, widened to f32, leading dimensions made one.
import { decode, type Raw } from '../tensor.js';
import { checkpointError } from './checkpoint_error.js';
import { type HostTensor, SafetensorsReader } from './safetensors.js';

/** Hidden states [tokens, hidden]. */
export interface Activations {
  /** The name of the tensor. */
  readonly name: string;
  readonly tokens: number;
  readonly hidden: number;
  readonly data: Float32Array;
}

export interface Recording {
  /** The block's name as the recording spells it. */
  readonly block: string;
  readonly input: Activations;
  /** Null where none was recorded under that name. */
  readonly output: Activations | null;
  /** The experts that the gate chose, i32 [tokens, columns]; null where none were recorded. */
  readonly ids: { readonly name: string; readonly columns: number; readonly data: Int32Array } | null;
}

/** The usual name of a recording in a checkpoint folder. */
export const RECORDING_FILE = 'moe_io.safetensors';

/** transformers 5 renames blocks in memory, so a recording may not call a block what the checkpoint calls it. */
const blockNames = ['mlp', 'block_sparse_moe', 'feed_forward'];

/**
 * What a recording holds of a block, or null if nothing.
 * @throws MoeError ERR_MOE_CHECKPOINT for a file that cannot be read, or shapes that do not belong together.
 */
export async function readRecording(file: string, block: string): Promise<Recording | null> {
  const reader = await SafetensorsReader.open(file);
  try {
    const stem = block.slice(0, block.lastIndexOf('.') + 1);
    const spellings = [block, ...blockNames.map((name) => `${stem}${name}`)];
    const recorded = spellings.find((name) => reader.has(`${name}.input`));
    if (recorded === undefined) return null;
    const input = await activations(reader, `${recorded}.input`);
    const outputName = `${recorded}.output`;
    const output = reader.has(outputName) ? await activations(reader, outputName) : null;
    if (output !== null && (output.tokens !== input.tokens || output.hidden !== input.hidden)) {
      throw checkpointError(
        `${file}: '${input.name}' is [${input.tokens}, ${input.hidden}] but '${output.name}' [${output.tokens}, ${output.hidden}]`,
      );
    }
    return { block: recorded, input, output, ids: await chosenIds(reader, recorded, input.tokens) };
  } finally {
    await reader.close();
  }
}

/**
 * Hidden states from a file: the tensor named, or the only float tensor of the file. Dimensions before the last
 * count as tokens.
 * @throws MoeError ERR_MOE_CHECKPOINT naming the tensors that could have been meant.
 */
export async function readActivations(file: string, tensor?: string): Promise<Activations> {
  const reader = await SafetensorsReader.open(file);
  try {
    if (tensor !== undefined) return await activations(reader, tensor);
    const candidates: string[] = [];
    for (const name of reader.names) if (isFloat((await reader.info(name)).dtype)) candidates.push(name);
    if (candidates.length === 1) return await activations(reader, candidates[0]);
    const listed = candidates.slice(0, 8).join(', ');
    throw checkpointError(
      candidates.length === 0
        ? `${file}: holds no float tensor`
        : `${file}: holds ${candidates.length} float tensors; say which one, as FILE:TENSOR: ${listed}`,
    );
  } finally {
    await reader.close();
  }
}

const isFloat = (dtype: string): boolean => dtype === 'f32' || dtype === 'bf16' || dtype === 'f16';

async function activations(reader: SafetensorsReader, name: string): Promise<Activations> {
  const { dtype, shape, data }: HostTensor = await reader.tensor(name);
  if (!isFloat(dtype) || shape.length < 2) {
    throw checkpointError(
      `${reader.path}: expected '${name}': f32|bf16|f16[..., tokens, hidden] but it is ${dtype}[${shape.join(', ')}]`,
    );
  }
  const hidden = shape[shape.length - 1];
  const values = decode(dtype as 'f32', data as Raw<'f32'>);
  return {
    name,
    tokens: shape.slice(0, -1).reduce((product, dim) => product * dim, 1),
    hidden,
    data: values,
  };
}

/** The gate's outputs differ in order by family; the ids are the integers among them. */
async function chosenIds(
  reader: SafetensorsReader,
  block: string,
  tokens: number,
): Promise<Recording['ids']> {
  for (const name of reader.names) {
    if (!name.startsWith(`${block}.gate.`) && !name.startsWith(`${block}.router.`)) continue;
    const { dtype, shape } = await reader.info(name);
    if ((dtype !== 'i64' && dtype !== 'i32') || shape.length < 2) continue;
    const columns = shape[shape.length - 1];
    const { data } = await reader.tensor(name);
    if (data.length !== tokens * columns) continue;
    return { name, columns, data: Int32Array.from(data as ArrayLike<number>, Number) };
  }
  return null;
}
