// What the default policy remembers: the last windows, each as its total or, where single steps are worth remembering,
// cut into a few runs of steps. Plain data, because it travels to the planning thread and back.
import type { Forecast } from './forecast.js';
import type { Loads } from './loads.js';

export interface SeenWindow {
  runs: number;
  /** f64[runs, layers, experts]: counts, summed over the steps of a run. */
  counts: Float64Array;
}

export interface Memory {
  /** Oldest first. */
  windows: SeenWindow[];
}

/** Loads of earlier windows, f64[layers, experts], and their weight relative to this window's 1. */
export interface EarlierLoads {
  counts: Float64Array;
  weight: number;
}

/** Earlier windows as totals, and the same cut into runs; what they say about the next window. */
export interface Past extends Pick<Forecast, 'keep' | 'error'> {
  windows: EarlierLoads[];
  runs: EarlierLoads[];
}

const windowsKept = 6;
const leastWeight = 0.02;

/** The memory after a window; `runs` is the most that it is cut into. */
export function remember(history: readonly SeenWindow[], loads: Loads, runs: number): Memory {
  return { windows: [...history, seen(loads, Math.min(runs, loads.steps))].slice(-windowsKept) };
}

function seen({ steps, layers, experts, counts }: Loads, runs: number): SeenWindow {
  const row = layers * experts;
  const sums = new Float64Array(runs * row);
  for (let step = 0; step < steps; step++) {
    const to = Math.floor((step * runs) / steps) * row;
    for (let index = 0; index < row; index++) sums[to + index]! += counts[step * row + index]!;
  }
  return { runs, counts: sums };
}

/** f64[layers * experts]: all runs summed. */
export function totalsOf({ runs, counts }: SeenWindow): Float64Array {
  const row = counts.length / runs;
  const sum = counts.slice(0, row);
  for (let index = row; index < counts.length; index++) sum[index % row]! += counts[index]!;
  return sum;
}

/** Earlier windows weighted by age: as runs, newest first, up to `mostRuns` in all; what is older, as totals. */
export function pastOf(
  history: readonly SeenWindow[],
  { decay, keep, error }: Forecast,
  mostRuns: number,
): Past {
  const past: Past = { windows: [], runs: [], keep, error };
  for (const [index, window] of [...history].reverse().entries()) {
    const weight = decay ** (index + 1);
    if (weight <= leastWeight) break;
    const whole = { counts: totalsOf(window), weight };
    past.windows.push(whole);
    if (past.runs.length + window.runs > mostRuns) past.runs.push(whole);
    else
      for (let run = 0; run < window.runs; run++)
        past.runs.push({ counts: runOf(window, run), weight: weight / window.runs });
  }
  return past;
}

const runOf = ({ runs, counts }: SeenWindow, run: number): Float64Array =>
  counts.subarray((run * counts.length) / runs, ((run + 1) * counts.length) / runs);
