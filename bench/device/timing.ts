// How an op is timed on a device: one capture holds R launches on R sets of buffers, another a read of 512 MiB, which
// leaves nothing of earlier launches in the L2 cache. Turns of some milliseconds replay both one after the other, and
// turns between them the read alone; the difference over R is a launch, with the gaps between kernels and its share of
// the start of a graph, as in the recorded figures of others. The median of 11 turns counts. The clock is the host's, but
// a turn is hundreds of times as long as what a wait costs, and launches are queued long before the device gets to them.
import { type Capture, type Context, moeRouter, type Tensor } from '../../lib/index.js';
import type { DeviceCase } from './case.js';
import { Inputs } from './inputs.js';

const TURNS = 11;
const MOST_LAUNCHES = 40;

export interface TimingOptions {
  /** Bytes read before the launches; more than twice the L2 cache. */
  readonly flushBytes: number;
  /** Length of a turn. */
  readonly turnMilliseconds: number;
  /** Bound of the bytes of all sets together. */
  readonly setBytes: number;
}

export const deviceTiming: TimingOptions = {
  flushBytes: 512 * 2 ** 20,
  turnMilliseconds: 10,
  setBytes: 2 * 2 ** 30,
};

export interface Timing {
  readonly microseconds: number;
  /** Upper quartile over median. */
  readonly spread: number;
  readonly launches: number;
}

const milliseconds = (work: () => void): number => {
  const begun = performance.now();
  work();
  return performance.now() - begun;
};

export class Timer {
  readonly #context: Context;
  readonly #options: TimingOptions;
  readonly #row: Tensor<'f32'>;
  readonly #weight: Tensor<'f32'>;
  readonly #flush: Capture<unknown>;

  constructor(context: Context, options: TimingOptions = deviceTiming) {
    const width = 65536;
    this.#context = context;
    this.#options = options;
    this.#row = context.tensor('f32', [1, width]);
    this.#weight = context.tensor('f32', [Math.ceil(options.flushBytes / (4 * width)), width]);
    // A router of one token goes over its weights once, with loads of ordinary priority, and writes hardly anything
    this.#flush = context.capture(() => moeRouter({ hidden: this.#row, weight: this.#weight }));
  }

  time(given: DeviceCase): Timing {
    const { setBytes, turnMilliseconds } = this.#options;
    const most = given.launches ?? MOST_LAUNCHES;
    const launches = Math.max(
      2,
      Math.min(most, Math.floor(setBytes / (given.setBytes ?? given.reads + given.writes))),
    );
    const inputs = new Inputs(this.#context);
    let step: Capture<unknown> | undefined;
    try {
      const launch = given.prepare(inputs);
      const runs = Array.from({ length: launches }, (_, set) => launch(set));
      step = this.#context.capture(() => runs.map((run) => run()));
      const turn = (captures: readonly Capture<unknown>[], replays: number) =>
        milliseconds(() => {
          for (let i = 0; i < replays; i++) for (const capture of captures) capture.replay();
          this.#context.synchronizeSync();
        }) / replays;
      const [read, both] = [[this.#flush], [this.#flush, step]];
      turn(both, 1);
      const replays = Math.max(1, Math.ceil(turnMilliseconds / turn(both, 2)));
      const times = Array.from(
        { length: TURNS },
        () => (1e3 * (turn(both, replays) - turn(read, replays))) / launches,
      ).sort((a, b) => a - b);
      const median = times[TURNS >> 1];
      return { microseconds: median, spread: times[Math.floor(TURNS * 0.75)] / median, launches };
    } finally {
      step?.dispose();
      inputs.dispose();
    }
  }

  dispose(): void {
    for (const each of [this.#flush, this.#row, this.#weight]) each.dispose();
  }
}
