// How much earlier windows say about the next one. Some loads wander (only the last window counts), some come back
// (prefill and decode in turn: all windows count alike); which of the two, the windows themselves tell: the decay
// under which the past best predicted what came after it is used for the future.
import type { Loads } from './loads.js';

/** Weight of a window relative to the one after it. */
const decays = [0, 0.3, 0.6, 1];
/** Used until there is anything to judge by. */
const untried = 0.6;

const scaled = (totals: Float64Array, layer: number, experts: number): Float64Array => {
  const row = totals.subarray(layer * experts, (layer + 1) * experts);
  const sum = row.reduce((all, value) => all + value, 0);
  return sum > 0 ? row.map((value) => value / sum) : row.slice();
};

/**
 * The decay that suits this trace. `history` holds totals of earlier windows, f64[layers, experts], oldest first.
 * The tests are: the window's second half from its first half and the past, and every past window from those before.
 */
export function pastDecay(loads: Loads, history: readonly Float64Array[]): number {
  if (history.length === 0) return 0;
  const { layers, experts, steps } = loads;
  const errors = new Float64Array(decays.length);
  const judge = (target: Float64Array, latest: Float64Array, earlier: readonly Float64Array[]): void => {
    for (const [index, decay] of decays.entries()) {
      let error = 0;
      let norm = 1;
      for (let age = 1; age <= earlier.length; age++) norm += decay ** age;
      for (let expert = 0; expert < experts; expert++) {
        let sum = latest[expert]!;
        for (let age = 1; age <= earlier.length; age++)
          sum += decay ** age * earlier[earlier.length - age]![expert]!;
        error += (sum / norm - target[expert]!) ** 2;
      }
      errors[index]! += error;
    }
  };
  let judged = false;
  for (let layer = 0; layer < layers; layer++) {
    const past = history.map((window) => scaled(window, layer, experts));
    if (steps >= 4) {
      judged = true;
      const halves = [new Float64Array(experts), new Float64Array(experts)];
      for (let step = 0; step < steps; step++) {
        const half = halves[step < steps >> 1 ? 0 : 1]!;
        const row = (step * layers + layer) * experts;
        for (let expert = 0; expert < experts; expert++) half[expert]! += loads.counts[row + expert]!;
      }
      judge(scaled(halves[1]!, 0, experts), scaled(halves[0]!, 0, experts), past);
    }
    if (history.length >= 2) {
      judged = true;
      const windows = [...past, scaled(loads.total(layer), 0, experts)];
      for (let index = 2; index < windows.length; index++)
        judge(windows[index]!, windows[index - 1]!, windows.slice(0, index - 1));
    }
  }
  if (!judged) return untried;
  let best = 0;
  for (let index = 1; index < decays.length; index++)
    if (errors[index]! < errors[best]! * 0.999) best = index;
  return decays[best]!;
}
