// Times ops on a device backend as a captured sequence over rotating buffers, so that neither launches nor a warm L2
// are in the number: R launches on R sets of inputs (more bytes than the L2 holds twice) make one capture; replays run
// back to back until the clock is good; the median over 11 batches counts. A copy is timed in the same run as a control;
// floors are bytes over the copy speed that was recorded for the device.
//
//   node dist/bench/device.js [results.json]
import { writeFileSync } from 'node:fs';
import {
  type Context,
  createContext,
  type FloatDType,
  moeCombine,
  moeDispatch,
  moeFusedGate,
  moeRouter,
  packExperts,
  sharedExperts,
  type Tensor,
} from '../lib/index.js';

const BATCHES = 11;
const BATCH_MS = 20;
const ROTATED_BYTES = 192 * 2 ** 20;
const MOST_SETS = 40;
/** Bytes per second of the best copy kernel recorded on a device; other devices use the copy of the run. */
const COPY_SPEED: Readonly<Record<string, number>> = { 'NVIDIA H200': 4.27e12 };
/** What an empty node of a graph takes on an H200: no floor is below it. */
const EMPTY_NODE_US = 1.0;

interface Case {
  readonly op: string;
  readonly name: string;
  /** Bytes that have to move once. */
  readonly bytes: number;
  readonly flops?: number;
  /** What the best public kernel took on an H200, recorded once. */
  readonly peer?: number;
  /** Makes one set of inputs; its `run` is what is captured. */
  readonly make: (context: Context, set: number) => { run(): unknown; dispose(): void };
}

let noise = new Uint16Array(0);

/** Random values of about [-1, 1): a megabyte of them, repeated. */
function random(context: Context, dtype: FloatDType, shape: readonly number[]): Tensor<FloatDType> {
  const elements = shape.reduce((a, b) => a * b, 1);
  const halves = dtype === 'f32' ? 2 * elements : elements;
  if (noise.length < halves) {
    noise = new Uint16Array(halves);
    let state = 12345;
    const first = Math.min(halves, 1 << 20) & ~1;
    for (let i = 0; i < first; i++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      noise[i] = (0x3f00 | (state >>> 25)) ^ (state & 0x8000); // +-[0.5, 1) as bf16, and as the upper half of f32
    }
    for (let done = first; done < halves; done *= 2) noise.copyWithin(done, 0, Math.min(done, halves - done));
  }
  const data = dtype === 'f32' ? new Float32Array(noise.buffer, 0, elements) : noise.subarray(0, elements);
  return context.tensor(dtype, shape, data as never);
}

const disposer = (...tensors: { dispose(): void }[]) => ({
  dispose: () => tensors.forEach((tensor) => void tensor.dispose()),
});

function combine(
  tokens: number,
  columns: number,
  hidden: number,
  dtype: 'bf16' | 'f32',
  peer?: number,
): Case {
  const bytes = tokens * (columns + 1) * hidden * (dtype === 'f32' ? 4 : 2) + 8 * tokens * columns;
  return {
    op: 'moe_combine',
    name: `${tokens} tokens x ${columns} x ${hidden} ${dtype}`,
    bytes,
    ...(peer === undefined ? {} : { peer }),
    make: (context) => {
      const choices = tokens * columns;
      const rows = random(context, dtype, [choices, hidden]);
      // As a dispatch leaves it: the last column is one shared expert, the others are uniform over 256 experts
      let state = 1;
      const experts = Int32Array.from({ length: choices }, (_, choice) => {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
        return columns === 1 ? 0 : choice % columns === columns - 1 ? 256 : state >>> 24;
      });
      const next = new Int32Array(258);
      for (const expert of experts) next[expert + 1]++;
      for (let expert = 0; expert < 257; expert++) next[expert + 1] += next[expert];
      const places = experts.map((expert) => next[expert]++);
      const inverse = context.tensor('i32', [tokens, columns], places);
      const weights = random(context, 'f32', [tokens, columns]) as Tensor<'f32'>;
      return { run: () => moeCombine({ rows, inverse, weights }), ...disposer(rows, inverse, weights) };
    },
  };
}

function router(tokens: number, hidden: number, experts: number, dtype: 'bf16' | 'f32'): Case {
  return {
    op: 'moe_router',
    name: `${tokens} tokens, ${hidden} -> ${experts} ${dtype}`,
    bytes: (tokens + experts) * hidden * (dtype === 'f32' ? 4 : 2) + 4 * tokens * experts,
    flops: 2 * tokens * hidden * experts,
    make: (context) => {
      const x = random(context, dtype, [tokens, hidden]);
      const weight = random(context, dtype, [experts, hidden]);
      return { run: () => moeRouter({ hidden: x, weight }), ...disposer(x, weight) };
    },
  };
}

function shared(tokens: number, hidden: number, intermediate: number): Case {
  return {
    op: 'shared_experts',
    name: `${tokens} tokens, hidden ${hidden}, intermediate ${intermediate} bf16`,
    bytes: 2 * (3 * hidden * intermediate + 2 * tokens * hidden),
    flops: 6 * tokens * hidden * intermediate,
    make: (context) => {
      const x = random(context, 'bf16', [tokens, hidden]);
      const w13 = random(context, 'bf16', [1, 2 * intermediate, hidden]);
      const w2 = random(context, 'bf16', [1, hidden, intermediate]);
      const experts = packExperts({ w13, w2 });
      return { run: () => sharedExperts({ hidden: x, experts }), ...disposer(x, w13, w2, experts) };
    },
  };
}

const copy: Case = {
  ...combine(65536, 1, 7168, 'bf16'),
  op: 'copy',
  name: 'moe_combine of one column, 0.94 GB',
};

const cases: readonly Case[] = [
  combine(1, 9, 7168, 'bf16'),
  combine(64, 9, 7168, 'bf16'),
  combine(512, 9, 7168, 'bf16'),
  combine(4096, 9, 7168, 'bf16', 147),
  combine(4096, 8, 2048, 'bf16'),
  combine(4096, 9, 7168, 'f32'),
  router(1, 7168, 256, 'bf16'),
  router(16, 7168, 256, 'bf16'),
  router(64, 7168, 256, 'bf16'),
  router(512, 7168, 256, 'bf16'),
  router(4096, 7168, 256, 'bf16'),
  router(4096, 7168, 256, 'f32'),
  router(40000, 7168, 256, 'bf16'),
  shared(1, 7168, 2048),
  shared(64, 7168, 2048),
  shared(1024, 7168, 2048),
];

const milliseconds = (work: () => void): number => {
  const begun = performance.now();
  work();
  return performance.now() - begun;
};

/** Median and spread (upper quartile over median) of one launch, in us. */
function time(
  context: Context,
  { bytes, make }: Case,
): { microseconds: number; spread: number; sets: number } {
  const sets = Math.max(2, Math.min(MOST_SETS, Math.ceil(ROTATED_BYTES / bytes)));
  const inputs = Array.from({ length: sets }, (_, set) => make(context, set));
  const step = context.capture(() => inputs.map((input) => input.run()));
  const batch = (replays: number) =>
    milliseconds(() => {
      for (let i = 0; i < replays; i++) step.replay();
      context.synchronizeSync();
    }) /
    (replays * sets);
  batch(1);
  const replays = Math.max(1, Math.ceil(BATCH_MS / (batch(2) * sets)));
  const times = Array.from({ length: BATCHES }, () => batch(replays)).sort((a, b) => a - b);
  step.dispose();
  for (const input of inputs) input.dispose();
  const median = times[BATCHES >> 1];
  return { microseconds: 1e3 * median, spread: times[Math.floor(BATCHES * 0.75)] / median, sets };
}

/** What a captured gate and dispatch cost the JS thread, and what their plain calls do. */
async function threadTime(context: Context) {
  const logits = random(context, 'bf16', [64, 256]);
  const bias = random(context, 'f32', [256]) as Tensor<'f32'>;
  const run = () => {
    const options = {
      scoring: 'sigmoid',
      groups: 8,
      topGroups: 4,
      topK: 8,
      sharedExperts: 1,
      renormalize: true,
    } as const;
    const { ids, weights } = moeFusedGate({ logits, bias }, { ...options, routedScalingFactor: 2.5 });
    const { order, inverse, counts, offsets } = moeDispatch({ ids }, { experts: 257 });
    return [ids, weights, order, inverse, counts, offsets];
  };
  const each = async (work: () => void, calls: number) => {
    const times: number[] = [];
    for (let i = 0; i < BATCHES; i++) {
      times.push(
        (1e3 *
          milliseconds(() => {
            for (let j = 0; j < calls; j++) work();
          })) /
          calls,
      );
      await context.synchronize();
    }
    return times.sort((a, b) => a - b)[BATCHES >> 1];
  };
  const plain = () => run().forEach((tensor) => void tensor.dispose());
  await each(plain, 200);
  const step = context.capture(run);
  await each(() => step.replay(), 200);
  const result = {
    replayMicroseconds: await each(() => step.replay(), 200),
    plainMicroseconds: await each(plain, 200),
  };
  step.dispose();
  const waits: number[] = [];
  for (let i = 0; i < 200; i++) {
    const begun = performance.now();
    await context.synchronize();
    waits.push(1e3 * (performance.now() - begun));
  }
  logits.dispose();
  bias.dispose();
  return { ...result, idleWaitMicroseconds: waits.sort((a, b) => a - b)[100] };
}

const context = await createContext({ backend: 'cuda' });
const ceiling = time(context, copy);
const { device, backend } = context.describe();
const copyBytesPerSecond = copy.bytes / (ceiling.microseconds * 1e-6);
const bytesPerSecond = COPY_SPEED[device] ?? copyBytesPerSecond;
const terabytes = (speed: number) => `${(speed / 1e12).toFixed(2)} TB/s`;
console.log(
  `${device}, floors at ${terabytes(bytesPerSecond)}; control: a copy at ${terabytes(copyBytesPerSecond)} (spread ${ceiling.spread.toFixed(3)})`,
);
console.log(['op', 'case', 'us', 'spread', 'floor', 'x floor', 'TFLOP/s', 'peer'].join('\t'));
const results = [];
for (const each of cases) {
  try {
    const { microseconds, spread, sets } = time(context, each);
    const floor = Math.max(EMPTY_NODE_US, (1e6 * each.bytes) / bytesPerSecond);
    const path = context.describe().paths[each.op];
    const tflops = each.flops === undefined ? null : each.flops / microseconds / 1e6;
    const { op, name, peer = null } = each;
    results.push({
      op,
      case: name,
      microseconds,
      spread,
      sets,
      floorMicroseconds: floor,
      tflops,
      peerMicroseconds: peer,
      path,
    });
    const shown = [
      op,
      name,
      microseconds.toFixed(2),
      spread.toFixed(3),
      floor.toFixed(2),
      (microseconds / floor).toFixed(2),
    ];
    console.log([...shown, tflops?.toFixed(1) ?? '-', peer ?? '-'].join('\t'));
  } catch (error) {
    console.log([each.op, each.name, (error as Error).message].join('\t'));
  }
}
let thread: unknown = null;
try {
  thread = await threadTime(context);
} catch (error) {
  thread = (error as Error).message;
}
console.log('gate + dispatch of 64 tokens on the JS thread:', JSON.stringify(thread));
const about = {
  date: new Date().toISOString().slice(0, 10),
  backend,
  device,
  node: process.version,
  bytesPerSecond,
  copyBytesPerSecond,
};
const report = {
  ...about,
  method: 'captured launches over rotating inputs, wall clock of replays',
  results,
  gateAndDispatch: thread,
};
if (process.argv[2] !== undefined) writeFileSync(process.argv[2], `${JSON.stringify(report, null, 2)}\n`);
await context.close();
