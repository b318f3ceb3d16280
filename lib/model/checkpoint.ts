// A Hugging Face checkpoint folder: which family its config.json names, and which decoder layers hold an MoE block.
// What such a block is made of is decided in lib/model/layer_plan.ts.
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import {
  type Architecture,
  architectureNames,
  architectureOf,
  architectureOfClass,
  type ListedExperts,
  type StackedExperts,
} from './architectures.js';
import { checkpointError } from './checkpoint_error.js';
import { parseJson } from './json.js';
import { type LayerPlan, planLayer } from './layer_plan.js';
import { describeQuantisation } from './quantisation.js';
import { SafetensorsReader } from './safetensors.js';

/** An open checkpoint folder. Close it when done: it holds files open. */
export class Checkpoint {
  readonly dir: string;
  /** The part of config.json that describes the language model. */
  readonly config: Readonly<Record<string, unknown>>;
  /** The model type, one of `architectureNames`. */
  readonly architecture: string;
  /** Numbers of the decoder layers that hold an MoE block, ascending. */
  readonly moeLayers: readonly number[];
  readonly tensors: SafetensorsReader;
  readonly #row: Architecture;
  readonly #wholeConfig: Readonly<Record<string, unknown>>;
  readonly #blocks: ReadonlyMap<number, string>;

  private constructor(
    dir: string,
    whole: Readonly<Record<string, unknown>>,
    chosen: ChosenArchitecture,
    tensors: SafetensorsReader,
  ) {
    this.dir = dir;
    this.#wholeConfig = whole;
    this.#row = chosen.row;
    this.config = chosen.values;
    this.architecture = chosen.name;
    this.tensors = tensors;
    this.#blocks = findBlocks(dir, chosen.row, tensors.names);
    this.moeLayers = Object.freeze([...this.#blocks.keys()].sort((a, b) => a - b));
  }

  /** @throws MoeError ERR_MOE_CHECKPOINT for a folder, config.json or family that cannot be read. */
  static async open(dir: string): Promise<Checkpoint> {
    const config = await readConfig(dir);
    const chosen = chooseArchitecture(join(dir, 'config.json'), config);
    const tensors = await SafetensorsReader.open(dir);
    try {
      return new Checkpoint(dir, config, chosen, tensors);
    } catch (error) {
      await tensors.close();
      throw error;
    }
  }

  /**
   * What layer `layer` is and where its weights lie, from names, shapes and configuration alone.
   * @throws MoeError ERR_MOE_CHECKPOINT for a layer that is dense, missing or inconsistent; ERR_MOE_UNSUPPORTED for
   * quantised weights and for configuration values that no op here can do.
   */
  async plan(layer: number): Promise<LayerPlan> {
    const block = this.#blocks.get(layer);
    if (block === undefined) {
      const found =
        this.moeLayers.length === 0 ? 'it has none' : `its MoE layers are ${ranges(this.moeLayers)}`;
      throw checkpointError(`${this.dir}: layer ${layer} has no MoE block; ${found} (${this.architecture})`);
    }
    const names = new Set(this.tensors.names.filter((name) => name.startsWith(`${block}.`)));
    const quantisation = await describeQuantisation(
      this.#wholeConfig,
      this.config,
      this.tensors,
      block,
      names,
    );
    if (quantisation !== undefined) {
      throw new MoeError(
        'ERR_MOE_UNSUPPORTED',
        `${this.dir}: ${quantisation}; only f32, bf16 and f16 weights can be loaded`,
        { op: 'checkpoint' },
      );
    }
    const { dir, config, tensors } = this;
    return planLayer({
      dir,
      row: this.#row,
      name: this.architecture,
      config,
      tensors,
      layer,
      block,
      names,
    });
  }

  close(): Promise<void> {
    return this.tensors.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** Opens a checkpoint folder: `config.json` beside `model.safetensors` or its shards. */
export const openCheckpoint = (dir: string): Promise<Checkpoint> => Checkpoint.open(dir);

async function readConfig(dir: string): Promise<Record<string, unknown>> {
  if (typeof dir !== 'string' || dir === '') {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected dir: a checkpoint folder but received ${describeValue(dir)}`,
      {
        op: 'checkpoint',
        arg: 'dir',
      },
    );
  }
  const file = join(dir, 'config.json');
  let bytes: Uint8Array;
  try {
    bytes = await readFile(file);
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const problem =
      code === 'ENOENT' || code === 'ENOTDIR'
        ? `${dir}: not a checkpoint folder: no config.json in it`
        : message;
    throw checkpointError(problem, { cause });
  }
  return parseJson(file, bytes, 'this file');
}

interface ChosenArchitecture {
  readonly row: Architecture;
  /** The model type that led to the row. */
  readonly name: string;
  readonly values: Readonly<Record<string, unknown>>;
}

/** `model_type` decides; `architectures` stands in where that is missing, and must not contradict it. */
function chooseArchitecture(file: string, whole: Record<string, unknown>): ChosenArchitecture {
  const nested = whole.text_config;
  if (nested !== undefined && nested !== null && (typeof nested !== 'object' || Array.isArray(nested))) {
    throw checkpointError(`${file}: text_config is ${describeValue(nested)}, not an object`);
  }
  const text = (nested ?? undefined) as Record<string, unknown> | undefined;
  const values = text ?? whole;
  const classes = Array.isArray(whole.architectures) ? whole.architectures : [];
  const className = classes.find((name): name is string => typeof name === 'string');
  const named = text?.model_type ?? whole.model_type ?? undefined;
  if (named !== undefined && typeof named !== 'string') {
    throw checkpointError(`${file}: model_type is ${describeValue(named)}, not a name`);
  }
  const byClass = className === undefined ? undefined : architectureOfClass(className);
  const row = named === undefined ? byClass : architectureOf(named);
  if (row === undefined) {
    const received =
      named === undefined
        ? `neither model_type nor a known name in architectures (${describeValue(className)})`
        : `model_type '${named}'`;
    throw checkpointError(
      `${file}: unknown architecture: ${received}; known are ${architectureNames.join(', ')}`,
    );
  }
  if (text === undefined && byClass !== undefined && byClass !== row) {
    throw checkpointError(
      `${file}: model_type '${named}' and architectures '${className}' contradict each other`,
    );
  }
  return { row, name: named ?? row.name, values };
}

/** Decoder layers of language models; vision towers and prediction heads have names of their own. */
const decoderLayer = /^((?:(?:model|language_model|text_model|transformer)\.)*layers\.(\d+)\.)(\w+)\.(.+)$/;

function findBlocks(dir: string, row: Architecture, names: readonly string[]): Map<number, string> {
  const blocks = new Map<number, string>();
  for (const name of names) {
    const match = decoderLayer.exec(name);
    if (match === null || !row.blocks.includes(match[3])) continue;
    const [, prefix, number, block, rest] = match;
    const isMoe = rest.startsWith('experts.') || row.experts.some((layout) => isStackOf(layout, rest));
    if (!isMoe && !row.routers.some((router) => rest === `${router}.weight`)) continue;
    const layer = Number(number);
    const found = `${prefix}${block}`;
    const before = blocks.get(layer);
    if (before !== undefined && before !== found) {
      throw checkpointError(`${dir}: layer ${layer} has two MoE blocks, ${before} and ${found}`);
    }
    blocks.set(layer, found);
  }
  return blocks;
}

const isStackOf = (layout: ListedExperts | StackedExperts, rest: string): boolean =>
  layout.kind === 'stacked' && (rest === layout.gateUp || rest === layout.down);

/** `1, 3-60` */
function ranges(numbers: readonly number[]): string {
  const parts: string[] = [];
  for (let i = 0; i < numbers.length; ) {
    let end = i;
    while (numbers[end + 1] === numbers[end] + 1) end++;
    parts.push(end === i ? `${numbers[i]}` : `${numbers[i]}-${numbers[end]}`);
    i = end + 1;
  }
  return parts.join(', ');
}
