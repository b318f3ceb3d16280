// How an op is measured: work is enqueued in batches long enough for the clock, each batch ends in one wait, and the
// median batch counts. Beside the time stand the floor (the bytes that must move and the operations that must be done,
// at the speeds measured in this run, whichever takes longer) and, as the baseline, the same case in pure TypeScript.
import { availableParallelism, cpus } from 'node:os';
import { type Context, createContext, type Roofline } from '../lib/index.js';

export interface BenchCase {
  /** Sizes and dtypes, for people. */
  readonly name: string;
  /** Bytes that the op must read and write at least once. */
  readonly bytes: number;
  /** Floating-point operations, where they matter. */
  readonly flops?: number;
  /** Enqueues the op once and disposes what it returned. */
  run(): void;
  /** Gives back what the case holds. */
  dispose(): void;
}

export interface Bench {
  readonly op: string;
  /** Cases to be made one at a time; `smallest` ones also run on the oracle as the baseline. */
  readonly cases: readonly ((context: Context) => BenchCase)[];
}

export interface Measurement {
  readonly op: string;
  readonly case: string;
  readonly microseconds: number;
  /** Slowest of the middle half of the batches over the median. */
  readonly spread: number;
  readonly floorMicroseconds: number;
  readonly timesFloor: number;
  readonly gflops: number | null;
  readonly baselineMicroseconds: number | null;
  readonly path: string;
}

const BATCH_MS = 20;
const BATCHES = 11;
/** A baseline that takes longer than this is not worth waiting for. */
const BASELINE_MS = 1500;

const milliseconds = (work: () => void): number => {
  const begun = performance.now();
  work();
  return performance.now() - begun;
};

/** Median and spread of the time of one run, in milliseconds. */
function time(context: Context, run: () => void): { median: number; spread: number } {
  const batch = (repeats: number) =>
    milliseconds(() => {
      for (let i = 0; i < repeats; i++) run();
      context.synchronizeSync();
    }) / repeats;
  batch(1); // the first run pays for threads, pages and the JIT
  const repeats = Math.max(1, Math.round(BATCH_MS / Math.max(batch(1), 1e-3)));
  const times = Array.from({ length: BATCHES }, () => batch(repeats)).sort((a, b) => a - b);
  const median = times[BATCHES >> 1];
  return { median, spread: times[Math.floor(BATCHES * 0.75)] / median };
}

/** Bytes per second read and written by a large copy, one thread: the ceiling of this run. */
function copySpeed(): number {
  const from = new Float64Array(8 << 20).fill(1);
  const to = new Float64Array(from.length);
  to.set(from);
  const best = Math.min(...Array.from({ length: 5 }, () => milliseconds(() => to.set(from))));
  return (2 * from.byteLength) / (best / 1e3);
}

/** The ceilings of this run: measured by the backend itself, or the copy speed of one thread alone. */
export function ceilings(context: Context): Partial<Roofline> & { readAllThreads: number } {
  return context.backend === 'cpu' ? context.measureRoofline() : { readAllThreads: copySpeed() };
}

export async function measure(
  bench: Bench,
  context: Context,
  { readAllThreads, flopsAllThreads = Number.POSITIVE_INFINITY }: ReturnType<typeof ceilings>,
): Promise<Measurement[]> {
  const results: Measurement[] = [];
  for (const make of bench.cases) {
    const current = make(context);
    const { median, spread } = time(context, () => current.run());
    current.dispose();
    const floorMicroseconds =
      Math.max(current.bytes / readAllThreads, (current.flops ?? 0) / flopsAllThreads) * 1e6;
    results.push({
      op: bench.op,
      case: current.name,
      microseconds: median * 1e3,
      spread,
      floorMicroseconds,
      timesFloor: (median * 1e3) / floorMicroseconds,
      gflops: current.flops === undefined ? null : current.flops / (median * 1e6),
      baselineMicroseconds: context.backend === 'oracle' ? null : await baseline(make),
      path: context.describe().paths[bench.op] ?? '',
    });
  }
  return results;
}

/** One run in pure TypeScript after one to warm up, or null where that takes too long. */
async function baseline(make: (context: Context) => BenchCase): Promise<number | null> {
  await using oracle = await createContext({ backend: 'oracle' });
  const current = make(oracle);
  const first = milliseconds(() => current.run());
  const result = first > BASELINE_MS ? null : milliseconds(() => current.run()) * 1e3;
  current.dispose();
  return result;
}

/** What a result must say to be worth keeping. */
export function circumstances(
  context: Context,
  roofline: Partial<Roofline>,
): Record<string, string | number> {
  const tenths = (value: number | undefined) =>
    value === undefined ? 'not measured' : Math.round(value / 1e8) / 10;
  return {
    date: new Date().toISOString().slice(0, 10),
    backend: context.backend,
    device: context.describe().device,
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    threads: availableParallelism(),
    node: process.version,
    command: `moe-kernels ${process.argv.slice(2).join(' ')}`,
    readGigabytesPerSecondOneThread: tenths(roofline.readOneThread),
    readGigabytesPerSecond: tenths(roofline.readAllThreads),
    gigaflopsOneThread: tenths(roofline.flopsOneThread),
    gigaflops: tenths(roofline.flopsAllThreads),
  };
}
