// What of an imbalance can be chance: the sampling noise of the window that a placement was planned for and of the
// window it is judged on. A planner that acts below these bounds moves experts for what will not come again.
import { type LayerState, peakDeviates } from './layer_state.js';

/** Standard errors beyond which a gain is no chance; searches on noise reach 2.9. */
const surely = 3.2;
/** Standard deviations of the surplus of noise; noise alone reaches 3.7 in thousands of layers. */
const surelySurplus = 4.5;
/** A surplus that is nothing even without noise. */
const smallest = 1e-4;

/**
 * What a search may gain, in units of the state's value, by fitting nothing but the sampling noise of the mean: the
 * difference of the expected peaks sqrt(2 ln D) sd with and without an imbalance of `surely` standard errors of the
 * mean. Searches on pure noise stay below it (test/eplb/adaptive.test.ts measures that over sizes and batches).
 */
export function noiseGain(state: LayerState): number {
  const { noise } = state;
  const variance = noise + state.spread + 1e-9;
  const chance = surely ** 2 * noise * state.scenarios.uncertainty;
  return (
    peakDeviates(state.devices) *
    Math.min(Math.sqrt(variance + chance) - Math.sqrt(variance), 0.375 * Math.sqrt(chance))
  );
}

/**
 * True if devices exceed `peak`, the window's peak of a fresh plan, by more than the sampling noise of two windows
 * explains: the sum of squared standardised surpluses, whose mean is D/2 and variance 5/4 D on pure noise.
 */
export function exceedsNoise(state: LayerState, peak: number): boolean {
  const { devices, window } = state;
  const { fresh, uncertainty } = state.scenarios;
  let sum = 0;
  for (let device = 0; device < devices; device++) {
    const surplus = Math.max(0, window[device]! - peak);
    sum += surplus ** 2 / (2 * (state.noiseOf(device) * fresh * uncertainty + smallest ** 2));
  }
  return sum > devices / 2 + surelySurplus * Math.sqrt(1.25 * devices);
}
