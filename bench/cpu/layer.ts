// What the CPU backend is measured by: a MoE layer beside onnxruntime's, the gate and the dispatch on one thread, what a
// call, loading a layer and an import cost, with the ceilings of the same run.
//
//   node dist/bench/cpu/layer.js [--json FILE] [--peer FOLDER]
//
// The peer is a dependency of this bench alone; FOLDER is where it was installed:
//   npm install --prefix FOLDER --ignore-scripts onnxruntime-node
// Weights rotate through LAYERS layers, so that none comes from a cache. Medians count; every op is waited for.
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import {
  type Context,
  createContext,
  type ExpertWeights,
  type FloatDType,
  fusedMoe,
  moeDispatch,
  moeFusedGate,
  packExperts,
  type Tensor,
} from '../../lib/index.js';
import { Random } from '../../test/cases/random.js';
import { dtypeBytes, normal, routing } from '../layers.js';
import { gates } from './gates.js';
import { loads } from './load.js';
import { moeModel } from './onnx_model.js';

const shape = { name: 'layer', experts: 16, hidden: 1024, intermediate: 512, topK: 4 };
const gateOptions = {
  scoring: 'sigmoid',
  groups: 8,
  topGroups: 4,
  topK: 8,
  renormalize: true,
  routedScalingFactor: 2.5,
} as const;
const LAYERS = 3;
const TOKENS = [1, 4, 16, 64, 256, 1024];
const PEER_TOKENS = [1, 16, 256, 1024];
const GATE_TOKENS = 16384;
const ENQUEUED = 8;

/** The parts of onnxruntime-node that are used; it is no dependency, so its types are not there. */
interface Ort {
  readonly InferenceSession: {
    create(
      model: Uint8Array,
      options: object,
    ): Promise<{ run(feeds: object): Promise<Record<string, { data: Float32Array }>> }>;
  };
  readonly Tensor: new (type: 'float32', data: Float32Array, dims: readonly number[]) => object;
}

const now = () => performance.now();
const round = (value: number, digits = 3) => Number(value.toPrecision(digits));

async function median(work: (turn: number) => unknown, budgetMs = 800): Promise<number> {
  await work(0);
  await work(1);
  const times: number[] = [];
  for (const end = now() + budgetMs; now() < end || times.length < 7; ) {
    const begun = now();
    await work(times.length);
    times.push(now() - begun);
  }
  return times.sort((a, b) => a - b)[times.length >> 1];
}

/** Hidden states and router logits of one batch, as numbers. */
function batch(tokens: number) {
  const random = new Random(tokens);
  return {
    hidden: random.normals(tokens * shape.hidden, 1),
    logits: random.normals(tokens * shape.experts, 1),
  };
}

function layer(context: Context, dtype: FloatDType, seed: number): ExpertWeights {
  const { experts, hidden, intermediate } = shape;
  using w13 = normal(context, dtype, [experts, 2 * intermediate, hidden], seed, hidden ** -0.5);
  using w2 = normal(context, dtype, [experts, hidden, intermediate], seed + 1, intermediate ** -0.5);
  return packExperts({ w13, w2 }, { gateUp: 'interleaved' });
}

function forward(hidden: Tensor<'f32'>, logits: Tensor<'f32'>, experts: ExpertWeights): Tensor {
  const { ids, weights } = moeFusedGate({ logits }, { topK: shape.topK, renormalize: true });
  const output = fusedMoe({ hidden, ids, weights, experts });
  ids.dispose();
  weights.dispose();
  return output;
}

async function layers(context: Context, roofline: ReturnType<Context['measureRoofline']>) {
  const results = [];
  for (const dtype of ['f32', 'bf16'] as const) {
    const experts = Array.from({ length: LAYERS }, (_, i) => layer(context, dtype, 10 * i + 1));
    for (const tokens of TOKENS) {
      const given = batch(tokens);
      using hidden = context.tensor('f32', [tokens, shape.hidden], given.hidden);
      using logits = context.tensor('f32', [tokens, shape.experts], given.logits);
      const { ids } = moeFusedGate({ logits }, { topK: shape.topK });
      const hit = new Set(await ids.read()).size;
      const ms = await median((turn) => {
        forward(hidden, logits, experts[turn % LAYERS]).dispose();
        context.synchronizeSync();
      });
      const perExpert = 3 * shape.hidden * shape.intermediate;
      const read = (hit * perExpert * dtypeBytes(dtype)) / (ms / 1e3);
      const flops = (2 * perExpert * tokens * shape.topK) / (ms / 1e3);
      results.push({
        weights: dtype,
        tokens,
        ms: round(ms),
        gigabytesPerSecond: round(read / 1e9),
        ofReadBandwidth: round(read / roofline.readAllThreads),
        gigaflops: round(flops / 1e9),
        ofMultiplyAddPeak: round(flops / roofline.flopsAllThreads),
      });
    }
    for (const each of experts) each.dispose();
  }
  return results;
}

/** The same numbers through both, in turns; refuses to compare what does not agree. */
async function peer(context: Context, folder: string) {
  const require = createRequire(join(folder, 'package.json'));
  const ort = require('onnxruntime-node') as Ort;
  const { version } = require('onnxruntime-node/package.json') as { version: string };
  const { experts, hidden: width, intermediate } = shape;
  const random = new Random(5);
  const w13 = random.normals(experts * 2 * intermediate * width, width ** -0.5);
  const w2 = random.normals(experts * width * intermediate, intermediate ** -0.5);
  using w13Tensor = context.tensor('f32', [experts, 2 * intermediate, width], w13);
  using w2Tensor = context.tensor('f32', [experts, width, intermediate], w2);
  using weights = packExperts({ w13: w13Tensor, w2: w2Tensor }, { gateUp: 'interleaved' });
  const threads = cpus().length;
  const session = await ort.InferenceSession.create(moeModel(shape), { intraOpNumThreads: threads });
  const fixed = {
    w1: new ort.Tensor('float32', w13, [experts, 2 * intermediate, width]),
    w2: new ort.Tensor('float32', w2, [experts, width, intermediate]),
  };
  const results = [];
  for (const tokens of PEER_TOKENS) {
    const given = batch(tokens);
    using hidden = context.tensor('f32', [tokens, width], given.hidden);
    using logits = context.tensor('f32', [tokens, experts], given.logits);
    const feeds = {
      ...fixed,
      x: new ort.Tensor('float32', given.hidden, [tokens, width]),
      router: new ort.Tensor('float32', given.logits, [tokens, experts]),
    };
    const theirs = (await session.run(feeds)).y.data;
    using output = forward(hidden, logits, weights);
    const ours = (await output.read()) as Float32Array;
    const error = ours.reduce((most, value, i) => Math.max(most, Math.abs(value - theirs[i])), 0);
    if (!(error < 1e-3)) throw new Error(`the peer's output differs by ${error} at ${tokens} tokens`);
    const mine = await median(() => {
      forward(hidden, logits, weights).dispose();
      context.synchronizeSync();
    });
    const peerMs = await median(() => session.run(feeds));
    results.push({
      tokens,
      ms: round(mine),
      onnxruntimeMs: round(peerMs),
      timesFaster: round(peerMs / mine),
    });
  }
  return { onnxruntime: version, threads, results };
}

/**
 * Bytes per second of the gate and of dispatch (ids alone, and with bf16 rows) on one thread: of calls that are waited
 * for one by one, and of calls that are enqueued ENQUEUED at a time, where JavaScript works on the next one meanwhile.
 */
async function oneThread(readOneThread: number) {
  await using context = await createContext({ backend: 'cpu', threads: 1 });
  using logits = normal(context, 'f32', [GATE_TOKENS, 256], 1);
  using bias = normal(context, 'f32', [256], 2, 0.1);
  const line = async (op: string, bytes: number, call: () => object) => {
    const times = async (calls: number) => {
      const ms = await median(() => {
        for (let i = 0; i < calls; i++) for (const tensor of Object.values(call())) tensor?.dispose();
        context.synchronizeSync();
      });
      return {
        ms: round(ms / calls),
        gigabytesPerSecond: round((bytes * calls) / ms / 1e6),
        ofReadBandwidth: round((bytes * calls) / (ms / 1e3) / readOneThread),
      };
    };
    const waited = await times(1);
    return {
      op,
      ...waited,
      enqueued: await times(ENQUEUED),
      path: context.describe().paths[op.split(' ')[0]],
    };
  };
  const dispatch = async (tokens: number, rows: boolean) => {
    const { ids } = routing(context, tokens, { ...shape, experts: 256, topK: 8 });
    using hidden = rows ? normal(context, 'bf16', [tokens, shape.hidden], 3) : undefined;
    const inputs = hidden === undefined ? { ids } : { ids, hidden };
    return await line(
      `moe_dispatch ${tokens} x 8${rows ? ', bf16 rows of 1024' : ' ids'}`,
      tokens * 8 * (12 + (rows ? 4 * shape.hidden : 0)),
      () => moeDispatch(inputs, { experts: 256 }),
    );
  };
  return [
    await line('moe_fused_gate 256/8/4/8 f32', GATE_TOKENS * (256 * 4 + 8 * 8), () =>
      moeFusedGate({ logits, bias }, gateOptions),
    ),
    await dispatch(4096, false),
    await dispatch(GATE_TOKENS, false),
    await dispatch(4096, true),
  ];
}

/** Microseconds of the JavaScript thread for a call that is enqueued, and for a replay of one that was captured. */
async function calls(context: Context) {
  using logits = normal(context, 'f32', [1, 64], 1);
  const gate = () => moeFusedGate({ logits }, { topK: 4 });
  const cost = (work: () => void) => {
    const times = Array.from({ length: 21 }, () => {
      const begun = now();
      for (let i = 0; i < 500; i++) work();
      const spent = now() - begun;
      context.synchronizeSync();
      return spent / 500;
    }).sort((a, b) => a - b);
    return round(times[10] * 1e3);
  };
  const enqueued = cost(() => {
    const { ids, weights } = gate();
    ids.dispose();
    weights.dispose();
  });
  const step = context.capture(gate);
  const replayed = cost(() => step.replay());
  step.dispose();
  return { enqueuedMicroseconds: enqueued, replayedMicroseconds: replayed };
}

/** Milliseconds of `import`, in fresh processes, and the threads that it starts beyond those any import does. */
function imports() {
  const run = (file: string) => {
    const url = JSON.stringify(new URL(file, import.meta.url).href);
    const script = `
      const begun = performance.now();
      import(${url}).then(() => {
        const spent = performance.now() - begun;
        const threads = process.platform === 'linux' ? require('node:fs').readdirSync('/proc/self/task').length : 0;
        console.log(JSON.stringify([spent, threads]));
      });`;
    return JSON.parse(execFileSync(process.execPath, ['-e', script], { encoding: 'utf8' })) as number[];
  };
  const runs = Array.from({ length: 9 }, () => run('../../bundle/index.js'));
  const times = runs.map(([ms]) => ms).sort((a, b) => a - b);
  const [, threads] = run('./onnx_model.js');
  return { importMs: round(times[4]), threadsStarted: Math.max(...runs.map(([, all]) => all)) - threads };
}

const { values } = parseArgs({ options: { json: { type: 'string' }, peer: { type: 'string' } } });
await using context = await createContext({ backend: 'cpu' });
const roofline = context.measureRoofline();
const report = {
  date: new Date().toISOString().slice(0, 10),
  machine: `${cpus()[0]?.model.trim()}, ${cpus().length} threads`,
  node: process.version,
  command: `node dist/bench/cpu/layer.js ${process.argv.slice(2).join(' ')}`,
  roofline: {
    readGigabytesPerSecond: [round(roofline.readOneThread / 1e9), round(roofline.readAllThreads / 1e9)],
    gigaflops: [round(roofline.flopsOneThread / 1e9), round(roofline.flopsAllThreads / 1e9)],
  },
  layer: shape,
  layers: await layers(context, roofline),
  isa: context.describe().paths.fused_moe,
  peer: values.peer === undefined ? 'not measured' : await peer(context, values.peer),
  oneThread: await oneThread(roofline.readOneThread),
  gates: await gates(median),
  calls: await calls(context),
  loads: await loads(roofline.readAllThreads),
  ...imports(),
};
console.log(
  JSON.stringify(
    {
      ...report,
      layers: undefined,
      oneThread: undefined,
      gates: undefined,
      loads: undefined,
      peer: undefined,
    },
    null,
    2,
  ),
);
console.table(report.layers);
if (typeof report.peer === 'object') console.table(report.peer.results);
console.table(
  report.oneThread.map(({ enqueued, ...waited }) => ({ ...waited, enqueued: enqueued.ofReadBandwidth })),
);
console.table(report.gates);
console.table(report.loads);
if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(report, null, 2)}\n`);
