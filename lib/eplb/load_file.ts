// Reads loads from the files people have: numpy, JSON, CSV, SGLang's recorder dumps, and top-k ids. The content
// decides what a file is; a name that says otherwise is an error, because a wrong guess would plan on noise.
import { readFile } from 'node:fs/promises';
import { extname } from 'node:path';
import { MoeError } from '../errors.js';
import { Loads } from './loads.js';
import { isNpy, parseNpy } from './npy.js';
import { recordedCounts } from './recorder_dump.js';
import { isZip, parseTorch } from './torch_file.js';

export interface ReadLoadsOptions {
  /** The file holds ids [layers, tokens, topK] of the router's choices; they are counted in steps of `stepTokens`. */
  topk?: { experts: number; stepTokens: number };
}

const bad = (file: string, message: string, cause?: unknown): MoeError =>
  new MoeError('ERR_MOE_CHECKPOINT', `${file}: ${message}`, { op: 'loads', arg: 'file', cause });

interface Dense {
  shape: number[];
  data: ArrayLike<number>;
}

/**
 * Reads loads as [steps, layers, experts] (a file of [layers, experts] has one step). Formats: .npy; .json with
 * nested lists or an object with `logical_count`; .csv with a header `step,layer,expert,count` or a plain matrix of
 * layers x experts; .pt of SGLang's recorder (all its modes). Throws ERR_MOE_CHECKPOINT naming file, layer and field.
 */
export async function readLoads(file: string, options: ReadLoadsOptions = {}): Promise<Loads> {
  let bytes: Uint8Array;
  try {
    bytes = await readFile(file);
  } catch (cause) {
    throw bad(file, `cannot be read (${(cause as Error).message})`, cause);
  }
  return parseLoads(bytes, file, options);
}

/** `readLoads` on the bytes of a file; `file` is its name, whose extension must fit the content. */
export function parseLoads(bytes: Uint8Array, file: string, options: ReadLoadsOptions = {}): Loads {
  const kind = isNpy(bytes) ? 'npy' : isZip(bytes) ? 'torch' : 'text';
  const extension = extname(file).toLowerCase();
  const expected = (
    { '.npy': 'npy', '.pt': 'torch', '.pth': 'torch', '.json': 'text', '.csv': 'text' } as Record<
      string,
      string
    >
  )[extension];
  if (expected === undefined)
    throw bad(
      file,
      `expected a name ending in .npy, .json, .csv or .pt but received ${extension || 'no extension'}`,
    );
  if (expected !== kind)
    throw bad(
      file,
      `expected the content its name says (${extension}) but received ${kind === 'text' ? 'something else' : `a ${kind} file`}`,
    );
  try {
    if (kind === 'npy') return fromDense(parseNpy(bytes, file), file, options);
    if (kind === 'torch') return fromDense(recordedCounts(parseTorch(bytes, file), file), file, options);
    const text = new TextDecoder().decode(bytes);
    return extension === '.csv' ? fromCsv(text, file) : fromJson(text, file, options);
  } catch (error) {
    if (error instanceof MoeError && error.code === 'ERR_MOE_INVALID_ARG')
      throw bad(file, error.message.replace(/^\[loads\] /, ''), error);
    throw error;
  }
}

function fromDense({ shape, data }: Dense, file: string, { topk }: ReadLoadsOptions): Loads {
  if (topk !== undefined) {
    if (shape.length !== 3)
      throw bad(file, `expected ids of shape [layers, tokens, topK] but received shape [${shape}]`);
    const [layers, tokens, topK] = shape as [number, number, number];
    return Loads.fromTopk(data, { layers, tokens, topK }, topk);
  }
  if (shape.length === 2) return new Loads({ steps: 1, layers: shape[0]!, experts: shape[1]! }, data);
  if (shape.length === 3) return new Loads({ steps: shape[0]!, layers: shape[1]!, experts: shape[2]! }, data);
  throw bad(
    file,
    `expected shape [layers, experts] or [steps, layers, experts] but received shape [${shape}]`,
  );
}

function fromJson(text: string, file: string, options: ReadLoadsOptions): Loads {
  let root: unknown;
  try {
    root = JSON.parse(text);
  } catch (cause) {
    throw bad(
      file,
      `expected JSON but received text that does not parse (${(cause as Error).message})`,
      cause,
    );
  }
  const nested = Array.isArray(root) ? root : (root as Record<string, unknown> | null)?.logical_count;
  if (!Array.isArray(nested))
    throw bad(file, 'expected nested lists of counts or an object with logical_count');
  if (options.topk === undefined) return Loads.fromArrays(nested);
  const asRows = nested as number[][][];
  const layers = asRows.length;
  const tokens = asRows[0]?.length ?? 0;
  const topK = asRows[0]?.[0]?.length ?? 0;
  for (const [layer, rows] of asRows.entries())
    if (rows?.length !== tokens || !rows.every((row) => row?.length === topK))
      throw bad(
        file,
        `layer ${layer}: expected ${tokens} tokens x ${topK} ids (as token 0 of layer 0) but received a ragged list`,
      );
  return fromDense({ shape: [layers, tokens, topK], data: asRows.flat(2) }, file, options);
}

function fromCsv(text: string, file: string): Loads {
  const lines = text.split(/\r?\n/).filter((line) => line.trim() !== '');
  const cells = lines.map((line) => line.split(',').map((cell) => cell.trim()));
  const header = cells[0]?.map((cell) => cell.toLowerCase());
  if (header === undefined) throw bad(file, 'expected lines of counts but received an empty file');
  const numbers = (row: string[], line: number): number[] =>
    row.map((cell, column) => {
      const value = cell === '' ? Number.NaN : Number(cell);
      if (Number.isNaN(value))
        throw bad(file, `line ${line + 1}: expected a number in column ${column + 1} but received '${cell}'`);
      return value;
    });
  if (!header.includes('expert')) return Loads.fromArrays(cells.map(numbers));
  const column = (name: string): number => header.indexOf(name);
  for (const name of ['layer', 'expert', 'count'])
    if (column(name) < 0)
      throw bad(file, `expected a column ${name} in the header but received ${header.join(',')}`);
  const rows = cells.slice(1).map((row, index) => {
    if (row.length !== header.length)
      throw bad(file, `line ${index + 2}: expected ${header.length} cells but received ${row.length}`);
    const values = numbers(row, index + 1);
    const place = {
      step: column('step') < 0 ? 0 : values[column('step')]!,
      layer: values[column('layer')]!,
      expert: values[column('expert')]!,
    };
    for (const [name, value] of Object.entries(place))
      if (!Number.isInteger(value) || value < 0)
        throw bad(file, `line ${index + 2}: expected ${name} to be an integer >= 0 but received ${value}`);
    return { ...place, count: values[column('count')]! };
  });
  if (rows.length === 0) throw bad(file, 'expected lines of counts after the header but received none');
  const size = (name: 'step' | 'layer' | 'expert'): number =>
    rows.reduce((most, row) => Math.max(most, row[name]), 0) + 1;
  const [steps, layers, experts] = [size('step'), size('layer'), size('expert')];
  if (steps * layers * experts !== rows.length)
    throw bad(
      file,
      `expected one line for each of ${steps} steps x ${layers} layers x ${experts} experts but received ${rows.length}`,
    );
  const counts = new Float64Array(rows.length).fill(Number.NaN);
  for (const { step, layer, expert, count } of rows) {
    const index = (step * layers + layer) * experts + expert;
    if (!Number.isNaN(counts[index]!))
      throw bad(
        file,
        `layer ${layer}: expected one line for expert ${expert} in step ${step} but received two`,
      );
    counts[index] = count;
  }
  return new Loads({ steps, layers, experts }, counts);
}
