// How much the windows seen say about the next one. Some loads wander (only the last window counts), some come back
// (prefill and decode in turn: all windows count alike), and wandering loads return towards the mean: what was hot
// cools down. How far a forecast can be trusted, the windows themselves tell: by how it would have predicted each of
// them from those before.
import type { Loads } from './loads.js';

export interface Forecast {
  /** Weight of a window relative to the one after it. */
  decay: number;
  /** The part of an expert's deviation from the mean load that is to be expected of the next window, 0..1. */
  keep: number;
  /** Mean square of the forecast's error over that of the loads; 0 where nothing can be said. */
  error: number;
}

const decays = [0, 0.3, 0.6, 1];
/** Used until there is anything to judge by. */
const untried = 0.6;
/** A decay is taken only if its error is this part of that of the faster ones. */
const margin = 0.999;
/** An error from which on experts switch rather than wander: then neither their mean nor noise around it says more. */
const switching = 0.5;

/** Loads of a layer in units of the mean expert's, minus 1: of a window, and of those before it, oldest first. */
interface Test {
  target: Float64Array;
  earlier: readonly Float64Array[];
}

/** Sums over experts of what was predicted (x) and what came (y). */
interface Fit {
  experts: number;
  xx: number;
  xy: number;
  yy: number;
}

function deviations(totals: Float64Array, layer: number, experts: number): Float64Array {
  const row = totals.subarray(layer * experts, (layer + 1) * experts);
  const sum = row.reduce((all, value) => all + value, 0);
  return sum > 0 ? row.map((value) => (value * experts) / sum - 1) : new Float64Array(experts);
}

/** How well the mean of the windows before, weighted by age, predicts the targets. */
function fitOf(tests: readonly Test[], decay: number): Fit {
  const fit = { experts: 0, xx: 0, xy: 0, yy: 0 };
  for (const { target, earlier } of tests) {
    const weights = earlier.map((_, index) => decay ** (earlier.length - 1 - index));
    const norm = weights.reduce((sum, weight) => sum + weight, 0);
    for (let expert = 0; expert < target.length; expert++) {
      let x = 0;
      for (let index = 0; index < earlier.length; index++) x += weights[index]! * earlier[index]![expert]!;
      x /= norm;
      fit.xx += x * x;
      fit.xy += x * target[expert]!;
      fit.yy += target[expert]! ** 2;
    }
    fit.experts += target.length;
  }
  return fit;
}

/** Sum of squared errors when `keep` of every deviation is predicted. */
const errorOf = ({ xx, xy, yy }: Fit, keep: number): number => yy - 2 * keep * xy + keep ** 2 * xx;

/**
 * The forecast that suits this trace. `history` holds totals of earlier windows, f64[layers, experts], oldest first;
 * `leastDecay` is what an earlier window counts in any case. The tests are: every window from those before it and, for
 * the decay alone, the second half of the last one from its first half and the windows before.
 */
export function forecastOf(loads: Loads, history: readonly Float64Array[], leastDecay: number): Forecast {
  if (history.length === 0) return { decay: 0, keep: 1, error: 0 };
  const { layers, experts, steps } = loads;
  const halves: Test[] = [];
  const whole: Test[] = [];
  for (let layer = 0; layer < layers; layer++) {
    const windows = history.map((window) => deviations(window, layer, experts));
    if (steps >= 4) {
      const half = [new Float64Array(experts), new Float64Array(experts)];
      for (let step = 0; step < steps; step++) {
        const sum = half[step < steps >> 1 ? 0 : 1]!;
        const row = (step * layers + layer) * experts;
        for (let expert = 0; expert < experts; expert++) sum[expert]! += loads.counts[row + expert]!;
      }
      const [first, second] = half.map((sum) => deviations(sum, 0, experts));
      halves.push({ target: second!, earlier: [...windows, first!] });
    }
    windows.push(deviations(loads.total(layer), 0, experts));
    for (let index = 2; index < windows.length; index++)
      whole.push({ target: windows[index]!, earlier: windows.slice(0, index) });
  }
  const tests = [...halves, ...whole];
  let best = tests.length > 0 ? 0 : untried;
  let lowest = Number.POSITIVE_INFINITY;
  if (tests.length > 0)
    for (const decay of decays) {
      const error = errorOf(fitOf(tests, decay), 1);
      if (error >= lowest * margin) continue;
      lowest = error;
      best = decay;
    }
  const decay = Math.max(leastDecay, best);
  const fit = fitOf(whole, decay);
  if (fit.xx === 0) return { decay, keep: 1, error: 0 };
  const slope = Math.max(0, Math.min(1, fit.xy / fit.xx));
  const error = errorOf(fit, slope) / (fit.experts + slope ** 2 * fit.xx);
  if (error >= switching) return { decay, keep: 1, error: 0 };
  return { decay, keep: 1 - (1 - error / switching) * (1 - slope), error };
}
