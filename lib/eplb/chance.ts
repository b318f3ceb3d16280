// What of an imbalance can be chance: the sampling noise of the window that a placement was planned for and of the
// window it is judged on. A planner that acts below these bounds moves experts for what will not come again.
import { type LayerState, peakDeviates } from './layer_state.js';
import type { Loads } from './loads.js';

/** Standard errors beyond which a gain is no chance; searches on noise reach 2.9. */
const surely = 3.2;
/** Those beyond which it is more likely a gain than not, where steps vary by more than sampling. */
const likely = 1.6;
/** What a layer must gain in any case, in PAR. */
const leastGain = 0.002;
/** Standard deviations of the surplus of noise; noise alone reaches 3.7 in thousands of layers. */
const surelySurplus = 4.5;
/** A surplus that is nothing even without noise. */
const smallest = 1e-4;

/**
 * What a search may gain, in units of the state's value, by fitting nothing but the sampling noise of the mean: the
 * difference of the expected peaks sqrt(2 ln D) sd with and without an imbalance of `errors` standard errors of the
 * mean. Searches on pure noise stay below it (test/eplb/adaptive.test.ts measures that over sizes and batches).
 */
function noiseGain(state: LayerState, noise: Float64Array, errors: number, uncertainty: number): number {
  const variance = state.noise + state.spread + 1e-9;
  const measured = noise.reduce((sum, value) => sum + value, 0) / noise.length;
  const chance = errors ** 2 * Math.max(state.noise, measured) * uncertainty;
  return (
    peakDeviates(state.devices) *
    Math.min(Math.sqrt(variance + chance) - Math.sqrt(variance), 0.375 * Math.sqrt(chance))
  );
}

/** What a layer must gain to be no chance. `noise` is f64[devices], as of deviceNoise. */
const byChance = (state: LayerState, noise: Float64Array): number =>
  Math.max(leastGain, noiseGain(state, noise, surely, state.scenarios.uncertainty));

/**
 * What it must gain for moves that a budget allows. Real steps vary by more than sampling, and every window tells more
 * about how: there what is likely pays, because rows made for few steps are far from what more steps allow.
 */
export const likelyByChance = (state: LayerState, noise: Float64Array): number =>
  state.scenarios.fine
    ? Math.max(leastGain, noiseGain(state, noise, likely, state.scenarios.pooledUncertainty))
    : byChance(state, noise);

/** Steps that what experts' own noise makes likely counts for, beside what the steps of the window show. */
const priorSteps = 8;

/**
 * f64[devices]: variance of a device's load from step to step, under the rows of the state. Experts that are chosen
 * together make it larger than the sum of their own noise, so it is measured, and evened out where steps are few.
 */
export function deviceNoise(state: LayerState, loads: Loads, layer: number): Float64Array {
  const { steps, layers, experts, counts } = loads;
  const { devices, slots, rows, replicas } = state;
  const last = new Float64Array(devices);
  const changes = new Float64Array(devices);
  let used = 0;
  for (let step = 0; step < steps; step++) {
    const row = (step * layers + layer) * experts;
    const tokens = loads.tokens(step, layer);
    if (tokens === 0) continue;
    for (let device = 0; device < devices; device++) {
      let load = 0;
      for (let slot = device * slots; slot < (device + 1) * slots; slot++)
        load += counts[row + rows[slot]!]! / replicas[rows[slot]!]!;
      load *= devices / tokens;
      if (used > 0) changes[device]! += (load - last[device]!) ** 2 / 2;
      last[device] = load;
    }
    used++;
  }
  const pairs = Math.max(0, used - 1);
  const likely = last.map((_, device) => state.noiseOf(device) * state.scenarios.fresh);
  const measured = changes.reduce((sum, value) => sum + value, 0);
  const expected = pairs * likely.reduce((sum, value) => sum + value, 0);
  const ratio = expected > 0 ? Math.max(1, measured / expected) : 1;
  return likely.map(
    (value, device) => (changes[device]! + priorSteps * ratio * value) / (pairs + priorSteps),
  );
}

/**
 * How surely devices exceed `peak`, the window's peak of a fresh plan: 1 and more where the sampling noise of two
 * windows does not explain it. The sum of squared standardised surpluses, whose mean is D/2 and variance 5/4 D on pure
 * noise, in units of `surelySurplus` standard deviations.
 */
export function surplusEvidence(state: LayerState, noise: Float64Array, peak: number): number {
  const { devices, window } = state;
  const { uncertainty } = state.scenarios;
  let sum = 0;
  for (let device = 0; device < devices; device++) {
    const surplus = Math.max(0, window[device]! - peak);
    sum += surplus ** 2 / (2 * (noise[device]! * uncertainty + smallest ** 2));
  }
  return (sum - devices / 2) / (surelySurplus * Math.sqrt(1.25 * devices));
}

/**
 * How surely the device loads of the window are not those of an earlier one (f64[experts] totals) under the rows of
 * the state: 1 and more where the sampling noise of both does not explain it. Says that loads have changed, not that
 * a plan would gain from it.
 */
export function changeEvidence(state: LayerState, noise: Float64Array, earlier: Float64Array): number {
  const { devices, slots, rows, replicas, window } = state;
  const { uncertainty } = state.scenarios;
  const scale = devices / earlier.reduce((sum, value) => sum + value, 0);
  if (!Number.isFinite(scale)) return 0;
  let sum = 0;
  for (let device = 0; device < devices; device++) {
    let load = 0;
    for (let slot = device * slots; slot < (device + 1) * slots; slot++)
      load += (scale * earlier[rows[slot]!]!) / replicas[rows[slot]!]!;
    sum += (window[device]! - load) ** 2 / (2 * (noise[device]! * uncertainty + smallest ** 2));
  }
  return (sum - devices) / (surelySurplus * Math.sqrt(2 * devices));
}

/** The median change over very many layers that chance does not reach, and the evidence that is enough beyond it. */
const mostByChance = 0.6;
const enoughAmongMany = 0.1;

/**
 * The evidence that is enough to plan one layer anew, given how surely every layer has changed. Noise is each layer's
 * own but traffic changes for all, so that many layers tell the two apart long before a single one can.
 */
export function evidenceNeeded(changes: readonly number[]): number {
  const sorted = [...changes].sort((one, two) => one - two);
  const median = sorted[(sorted.length - 1) >> 1]!;
  return median >= mostByChance + (1 - mostByChance) / Math.sqrt(sorted.length) ? enoughAmongMany : 1;
}
