// How an op is timed on a device: a capture of one read of 512 MiB, which leaves nothing of earlier launches in the L2
// cache, and then R launches on R sets of buffers; and a capture of the read alone. Both are replayed back to back, in
// turns of some milliseconds; the difference over R is a launch, kernel gaps included. The median of 11 turns counts.
// This is the wall clock, but of turns that are thousands of times longer than what a call or a wait costs.
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
    this.#flush = context.capture(() => this.#read());
  }

  /** One pass over the weights of a router that has one token: a read of ordinary priority, hardly a write. */
  #read(): unknown {
    return moeRouter({ hidden: this.#row, weight: this.#weight });
  }

  time(given: DeviceCase): Timing {
    const { setBytes, turnMilliseconds } = this.#options;
    const most = given.launches ?? MOST_LAUNCHES;
    const launches = Math.max(2, Math.min(most, Math.floor(setBytes / (given.setBytes ?? given.bytes))));
    const inputs = new Inputs(this.#context);
    let step: Capture<unknown> | undefined;
    try {
      const launch = given.prepare(inputs);
      const runs = Array.from({ length: launches }, (_, set) => launch(set));
      step = this.#context.capture(() => [this.#read(), ...runs.map((run) => run())]);
      const turn = (capture: Capture<unknown>, replays: number) =>
        milliseconds(() => {
          for (let i = 0; i < replays; i++) capture.replay();
          this.#context.synchronizeSync();
        }) / replays;
      const both = step;
      turn(both, 1);
      const replays = Math.max(1, Math.ceil(turnMilliseconds / turn(both, 2)));
      const times = Array.from(
        { length: TURNS },
        () => (1e3 * (turn(both, replays) - turn(this.#flush, replays))) / launches,
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
