// Reads loads from the files people have: numpy, JSON, CSV, SGLang's recorder dumps, and top-k ids. The content
// decides what a file is; a name that says otherwise is an error, because a wrong guess would plan on noise.
import { readFile } from 'node:fs/promises';
import { extname } from 'node:path';
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { decodeUtf8, describeBytes, jsonFault } from '../text_file.js';
import { parseCsv } from './load_csv.js';
import { Loads } from './loads.js';
import { isNpy, parseNpy } from './npy.js';
import { recordedCounts } from './recorder_dump.js';
import { isZip, parseTorch } from './torch_file.js';

export interface ReadLoadsOptions {
  /** The file holds ids [layers, tokens, topK] of the router's choices; they are counted in steps of `stepTokens`. */
  topk?: { experts: number; stepTokens: number };
}

const check = new Arguments('loads');

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
  if (typeof file !== 'string') check.refuse('file', 'a path', file);
  checkOptions(options);
  let bytes: Uint8Array;
  try {
    bytes = await readFile(file);
  } catch (cause) {
    throw bad(file, `cannot be read (${(cause as Error).message})`, cause);
  }
  return parseLoads(bytes, file, options);
}

function checkOptions(options: ReadLoadsOptions): void {
  const { topk } = check.object('options', options, ['topk']);
  if (topk !== undefined) check.object('topk', topk, ['experts', 'stepTokens']);
}

const kinds: Readonly<Record<string, 'npy' | 'torch' | 'json' | 'csv'>> = {
  '.npy': 'npy',
  '.pt': 'torch',
  '.pth': 'torch',
  '.json': 'json',
  '.csv': 'csv',
};

/** `readLoads` on the bytes of a file; `file` is its name, whose extension must fit the content. */
export function parseLoads(bytes: Uint8Array, file: string, options: ReadLoadsOptions = {}): Loads {
  check.instance('bytes', bytes, Uint8Array);
  check.text('file', file);
  checkOptions(options);
  const extension = extname(file).toLowerCase();
  const kind = kinds[extension];
  if (kind === undefined)
    throw bad(
      file,
      `expected a name ending in .npy, .json, .csv or .pt but received ${extension || 'no extension'}`,
    );
  const binary = isNpy(bytes) || isZip(bytes);
  const text = kind === 'npy' || kind === 'torch' || binary ? undefined : decodeUtf8(bytes);
  if (kind === 'npy' ? !isNpy(bytes) : kind === 'torch' ? !isZip(bytes) : text === undefined)
    throw bad(file, `expected the content its name says (${extension}) but received ${describeBytes(bytes)}`);
  if (options.topk !== undefined && (kind === 'torch' || kind === 'csv'))
    throw bad(file, `expected top-k ids as .npy or .json but received ${extension}`);
  try {
    if (kind === 'npy') return fromDense(parseNpy(bytes, file), file, options);
    if (kind === 'torch') return fromDense(recordedCounts(parseTorch(bytes, file), file), file, options);
    return kind === 'csv' ? parseCsv(text!, (message) => bad(file, message)) : fromJson(text!, file, options);
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
  const root = parseJson(text, file);
  if (options.topk !== undefined) return fromIds(root, file, options);
  const nested = Array.isArray(root) ? root : (root as Record<string, unknown> | null)?.logical_count;
  if (!Array.isArray(nested))
    throw bad(file, 'expected nested lists of counts or an object with logical_count');
  return Loads.fromArrays(nested);
}

/** JSON, and what Python's json module writes beside it: NaN and infinities as strings, to be refused by place. */
function parseJson(text: string, file: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    try {
      return JSON.parse(text.replace(/-?\b(NaN|Infinity)\b/g, '"$&"'));
    } catch {
      throw bad(file, `expected JSON but received text that does not parse (${jsonFault(cause)})`, cause);
    }
  }
}

function fromIds(root: unknown, file: string, options: ReadLoadsOptions): Loads {
  const layers = Array.isArray(root) ? (root as unknown[]) : [];
  const tokensOf = (rows: unknown): unknown[] => (Array.isArray(rows) ? rows : []);
  const tokens = tokensOf(layers[0]).length;
  const topK = tokensOf(tokensOf(layers[0])[0]).length;
  if (topK === 0) throw bad(file, 'expected nested lists of ids [layers][tokens][topK]');
  for (const [layer, rows] of layers.entries())
    if (tokensOf(rows).length !== tokens || !tokensOf(rows).every((row) => tokensOf(row).length === topK))
      throw bad(
        file,
        `layer ${layer}: expected ${tokens} tokens x ${topK} ids (as token 0 of layer 0) but received a ragged list`,
      );
  const data = (layers as number[][][]).flat(2);
  return fromDense({ shape: [layers.length, tokens, topK], data }, file, options);
}
