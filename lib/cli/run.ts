// `moe-kernels run`: a layer of a real checkpoint on real hidden states, and whether the result is right.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { type Command, InvalidArgumentError, Option } from 'commander';
import type { Context } from '../context.js';
import { backendNames } from '../create_context.js';
import { createContext, MoeError } from '../index.js';
import { Checkpoint } from '../model/checkpoint.js';
import { MoeLayer, type MoeLayerDescription, type MoeLayerStage } from '../model/layer.js';
import {
  type Activations,
  RECORDING_FILE,
  type Recording,
  readActivations,
  readRecording,
} from '../model/recording.js';
import { type TensorToWrite, writeSafetensors } from '../model/safetensors_write.js';
import type { FloatDType, Tensor, TensorData, Values } from '../tensor.js';
import { progress } from './progress.js';
import { countRouting, drawRouting, type Routing } from './routing.js';

interface RunOptions {
  layer?: number;
  input?: string;
  expect?: string;
  backend: 'auto' | 'cpu' | 'oracle' | 'cuda' | 'ascend';
  fuseShared: 'auto' | 'on' | 'off';
  overlapShared?: boolean;
  dtype?: FloatDType;
  out?: string;
  json?: boolean;
}

/** Largest relative norm of the error that counts as right. */
const limits: Record<FloatDType, number> = { f32: 2e-6, bf16: 6e-3, f16: 1e-3 };

interface LayerReport {
  layer: number;
  backend: string;
  architecture: string;
  tokens: number;
  experts: number;
  topK: number;
  sharedExperts: number;
  fused: boolean;
  par: number | null;
  error: { maxAbs: number; relNorm: number } | null;
  routing: { idsEqual: boolean | null };
  ms: { load: number; forward: number };
}

/** What is shown to people beside the report. */
interface LayerDetails {
  readonly report: LayerReport;
  readonly good: boolean;
  readonly title: string;
  readonly description: MoeLayerDescription;
  readonly memory: number;
  readonly source: Source;
  readonly routing: Routing;
  readonly stages: readonly (readonly [MoeLayerStage, number])[];
}

/** Where hidden states come from and what they should become. */
interface Source {
  readonly input: Activations;
  readonly expected: Activations | null;
  readonly ids: Recording['ids'];
}

export function registerRun(program: Command): void {
  program
    .command('run')
    .argument('<checkpoint-dir>', 'folder with config.json and safetensors files')
    .description('run MoE layers of a Hugging Face checkpoint and compare with a recorded output')
    .option('--layer <n>', 'decoder layer (default: every MoE layer)', layerNumber)
    .option('--input <file[:tensor]>', `hidden states (default: ${RECORDING_FILE} of the checkpoint)`)
    .option('--expect <file[:tensor]>', 'what the output should be')
    .addOption(
      new Option('--backend <name>', 'where to run').choices(['auto', ...backendNames]).default('auto'),
    )
    .addOption(
      new Option('--fuse-shared <mode>', 'shared experts as expert slots')
        .choices(['auto', 'on', 'off'])
        .default('auto'),
    )
    .option('--overlap-shared', 'shared experts by themselves, beside the routed ones')
    .addOption(
      new Option('--dtype <dtype>', 'dtype of experts and hidden states; the router stays f32').choices([
        'f32',
        'bf16',
        'f16',
      ]),
    )
    .option('--out <file>', 'write the outputs to a safetensors file')
    .option('--json', 'print one JSON object')
    .action(run);
}

function layerNumber(text: string): number {
  if (!/^\d+$/.test(text) || !Number.isSafeInteger(Number(text)))
    throw new InvalidArgumentError('Expected an integer from 0.');
  return Number(text);
}

async function run(dir: string, options: RunOptions): Promise<void> {
  if (options.out !== undefined && !existsSync(dirname(options.out))) {
    // Told before the work, not after it
    throw new MoeError('ERR_MOE_CHECKPOINT', `${options.out}: cannot be written (there is no such folder)`, {
      op: 'run',
      arg: 'out',
    });
  }
  await using checkpoint = await Checkpoint.open(dir);
  const layers = options.layer === undefined ? checkpoint.moeLayers : [options.layer];
  if (layers.length === 0) {
    throw new MoeError('ERR_MOE_CHECKPOINT', `${dir}: no MoE layers found`, { op: 'run' });
  }
  await using context = await createContext({ backend: options.backend });
  const reports: LayerReport[] = [];
  const outputs: Record<string, TensorToWrite> = {};
  let ok = true;
  for (const layer of layers) {
    const details = await runLayer(checkpoint, context, layer, options, outputs);
    reports.push(details.report);
    ok &&= details.good;
    if (!options.json && reports.length === 1) console.log(describeBackend(context));
    if (!options.json) console.log(`\n${formatLayer(details)}`);
  }
  if (options.out !== undefined) await writeSafetensors(options.out, outputs);
  if (options.json) console.log(JSON.stringify({ layers: reports, ok }));
  if (!ok) process.exitCode = 1;
}

async function runLayer(
  checkpoint: Checkpoint,
  context: Context,
  layer: number,
  options: RunOptions,
  outputs: Record<string, TensorToWrite>,
): Promise<LayerDetails> {
  const { block } = await checkpoint.plan(layer);
  const source = await findSource(checkpoint.dir, block, options);
  const begun = performance.now();
  const bar = progress(`Loading ${block}`, 'experts', !options.json);
  using moe = await MoeLayer.load(checkpoint, {
    layer,
    context,
    fuseSharedExperts: options.fuseShared,
    overlapSharedExperts: options.overlapShared ?? false,
    ...(options.dtype === undefined ? {} : { dtype: options.dtype }),
    onProgress: ({ done, total }) => bar.update(done, total),
  }).finally(() => bar.stop());
  await context.synchronize();
  const load = performance.now() - begun;

  const { description } = moe;
  const { input, expected } = source;
  if (input.hidden !== description.hidden) {
    throw new MoeError(
      'ERR_MOE_CHECKPOINT',
      `expected input '${input.name}': [tokens, ${description.hidden}] (the layer's hidden size) but it is ` +
        `[${input.tokens}, ${input.hidden}]`,
      { op: 'run', arg: 'input' },
    );
  }
  const shape = [input.tokens, input.hidden];
  using routerInput = context.tensor('f32', shape, input.data);
  using hidden = context.tensor<FloatDType>(description.dtype, shape, input.data as TensorData<FloatDType>);
  // A recording may hold less than the layer does; an expectation of the user's is of the whole.
  const part = options.expect === undefined && expected !== null ? description.recordedPart : 'all';
  const stages: [MoeLayerStage, number][] = [];
  let mark = 0;
  const onStage = (stage: MoeLayerStage) => {
    context.synchronizeSync();
    stages.push([stage, performance.now() - mark]);
    mark = performance.now();
  };
  // The oracle is too slow to warm up, and has nothing to warm up but itself.
  if (context.backend !== 'oracle') moe.forward(hidden, { routerInput }).dispose();
  context.synchronizeSync();
  const forwardBegun = performance.now();
  mark = forwardBegun;
  const { output, ids, ...rest } = moe.forward(hidden, { routerInput, returnRouting: true, onStage });
  const forward = performance.now() - forwardBegun;
  const compared = part === 'routed' ? moe.forward(hidden, { routerInput, part }) : output;

  const firstZeroExpert = description.experts + description.sharedSlots;
  const chosen = await ids.read();
  const routing = countRouting(chosen, description.experts, firstZeroExpert);
  const error = expected === null ? null : compare(await compared.read(), expected, input);
  const idsEqual = source.ids === null ? null : sameChoices(chosen, description, source.ids, input.tokens);
  await keepOutputs(outputs, block, output, part === 'routed' ? compared : undefined);
  for (const tensor of [output, ids, compared, ...Object.values(rest)]) tensor.dispose();
  return {
    report: {
      layer,
      backend: context.backend,
      architecture: description.architecture,
      tokens: input.tokens,
      experts: description.experts,
      topK: description.topK,
      sharedExperts: description.sharedExperts,
      fused: description.fused,
      par: routing.par,
      error,
      routing: { idsEqual },
      ms: { load, forward },
    },
    good: (error === null || error.relNorm <= limits[description.dtype]) && idsEqual !== false,
    title: String(moe),
    description,
    memory: moe.memory,
    source,
    routing,
    stages,
  };
}

/** `FILE` or `FILE:TENSOR`; a file that is there under the whole name wins. */
function parseSource(text: string): { file: string; tensor?: string } {
  const colon = text.lastIndexOf(':');
  if (existsSync(text) || colon <= 0) return { file: text };
  return { file: text.slice(0, colon), tensor: text.slice(colon + 1) };
}

async function findSource(dir: string, block: string, options: RunOptions): Promise<Source> {
  const read = (text: string) => {
    const { file, tensor } = parseSource(text);
    return readActivations(file, tensor);
  };
  const expected = options.expect === undefined ? undefined : await read(options.expect);
  if (options.input !== undefined) {
    return { input: await read(options.input), expected: expected ?? null, ids: null };
  }
  const file = join(dir, RECORDING_FILE);
  const recording = existsSync(file) ? await readRecording(file, block) : null;
  if (recording === null) {
    const lack = existsSync(file) ? `${file} has no '${block}.input'` : `${dir} holds no ${RECORDING_FILE}`;
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected --input FILE[:TENSOR] with hidden states, because ${lack}`,
      {
        op: 'run',
        arg: 'input',
      },
    );
  }
  return { input: recording.input, expected: expected ?? recording.output, ids: recording.ids };
}

function compare(received: Float32Array, expected: Activations, input: Activations): LayerReport['error'] {
  if (expected.tokens !== input.tokens || expected.hidden !== input.hidden) {
    throw new MoeError(
      'ERR_MOE_CHECKPOINT',
      `expected '${expected.name}' to have the shape of the input, [${input.tokens}, ${input.hidden}], but it is ` +
        `[${expected.tokens}, ${expected.hidden}]`,
      { op: 'run', arg: 'expect' },
    );
  }
  let maxAbs = 0;
  let squares = 0;
  let norm = 0;
  for (let i = 0; i < received.length; i++) {
    const difference = received[i] - expected.data[i];
    maxAbs = Math.max(maxAbs, Math.abs(difference));
    squares += difference * difference;
    norm += expected.data[i] * expected.data[i];
  }
  return { maxAbs, relNorm: norm === 0 ? Math.sqrt(squares) : Math.sqrt(squares / norm) };
}

/** Whether every token chose the recorded experts, in whatever order. */
function sameChoices(
  ids: Int32Array,
  { topK, sharedSlots, experts }: MoeLayerDescription,
  recorded: NonNullable<Recording['ids']>,
  tokens: number,
): boolean {
  if (recorded.columns !== topK) return false;
  const columns = topK + sharedSlots;
  for (let token = 0; token < tokens; token++) {
    // Recordings know no shared slots: zero experts follow the routed ones there.
    const ours = ids
      .slice(token * columns, token * columns + topK)
      .map((id) => (id >= experts ? id - sharedSlots : id))
      .sort();
    const theirs = recorded.data.slice(token * topK, (token + 1) * topK).sort();
    if (ours.some((id, i) => id !== theirs[i])) return false;
  }
  return true;
}

async function keepOutputs(
  outputs: Record<string, TensorToWrite>,
  block: string,
  output: Tensor<FloatDType>,
  routed: Tensor<FloatDType> | undefined,
): Promise<void> {
  const keep = async (
    name: string,
    { dtype, shape }: Tensor<FloatDType>,
    values: Promise<Values<FloatDType>>,
  ) => {
    outputs[name] = { dtype, shape, data: (await values) as TensorData<FloatDType> };
  };
  await keep(`${block}.output`, output, output.read());
  if (routed !== undefined) await keep(`${block}.output.routed`, routed, routed.read());
}

function describeBackend(context: Context): string {
  const { backend, device, passedOver } = context.describe();
  const name = backend === 'oracle' ? 'oracle (pure TypeScript)' : `${backend} (${device})`;
  return [`Backend: ${name}`, ...passedOver.map((other) => `  not ${other.backend}: ${other.reason}`)].join(
    '\n',
  );
}

const ms = (milliseconds: number): string => `${milliseconds.toPrecision(3)} ms`;

function formatLayer({
  report,
  good,
  title,
  description,
  memory,
  source,
  routing,
  stages,
}: LayerDetails): string {
  const { counts, par, zeroChoices } = routing;
  const peak = Math.max(...counts);
  const spread =
    par === null
      ? 'no choices'
      : `peak-to-average ${par.toFixed(2)} (${peak} tokens on expert ${counts.indexOf(peak)}, ` +
        `${(peak / par).toFixed(2)} on average)`;
  const lines = [
    title,
    `  input    ${report.tokens} tokens of '${source.input.name}'; experts in ${description.dtype}, ` +
      `${(memory / 2 ** 20).toFixed(1)} MiB`,
    `  routing  ${report.experts} experts, top ${report.topK}: ${spread}`,
    ...drawRouting(counts).map((line) => `           ${line}`),
  ];
  if (zeroChoices > 0) lines.push(`           ${zeroChoices} choices of zero experts`);
  if (description.sharedExperts > 0) {
    const last = report.experts + description.sharedSlots - 1;
    const slots = last === report.experts ? `slot ${last}` : `slots ${report.experts}..${last}`;
    const how = description.fused
      ? `fused as ${slots}, chosen by every token`
      : `beside the routed ones (${description.unfusedReason})`;
    lines.push(
      `  shared   ${description.sharedExperts} shared expert${description.sharedExperts > 1 ? 's' : ''}, ${how}`,
    );
  }
  const parts = stages.map(([stage, time]) => `${stage} ${ms(time)}`).join(', ');
  lines.push(`  time     load ${ms(report.ms.load)}, forward ${ms(report.ms.forward)}: ${parts}`);
  if (report.error === null) {
    lines.push('  error    not compared: no expected output was given');
  } else {
    const { relNorm, maxAbs } = report.error;
    lines.push(
      `  error    relative norm ${relNorm.toExponential(2)} (limit ${limits[description.dtype]}), ` +
        `largest ${maxAbs.toExponential(2)}, against '${source.expected?.name}'`,
    );
  }
  const { idsEqual } = report.routing;
  if (idsEqual !== null)
    lines.push(`  experts  ${idsEqual ? 'the recorded ones' : 'NOT the recorded ones'} in every row`);
  lines.push(`  ${good ? 'ok' : 'WRONG'}`);
  return lines.join('\n');
}
