// A full plan of a layer with any number of moves: replica counts, packing, and a polish that balances the window
// under the scenarios; and the policy that makes nothing but such plans, for the window alone.
import { Placement } from '../placement/placement.js';
import { matchRows } from './assignment.js';
import { exactRows, isSmall } from './exact.js';
import { propose } from './improve.js';
import { LayerState } from './layer_state.js';
import { packReplicas } from './pack.js';
import type { Policy } from './policy.js';
import { polish } from './polish.js';
import { minMaxReplicas } from './replicate.js';
import { type Scenarios, scenariosOf } from './scenario.js';

/** Deviates of a step's noise and of the swing between scenarios that replica counts allow for. */
const noiseDeviates = 1.5;
const swingDeviates = 0.5;
/** p = 2^squarings of the norm of an expert's load over single steps. */
const squarings = 3;
/** Changes of a search, and what one must gain. */
const mostChanges = 32;
const leastGain = 1e-4;
/** Further above its target than this, a window is packed again for itself alone. */
const acceptable = 0.001;

/**
 * PAR of the window that a full plan aims at, near enough to 1 to be perfect to a user. With few slots on a device
 * there are few ways to get there, and most of them are bad for everything but this window.
 */
export const windowTarget = (slots: number): number => (slots < 8 ? 1.002 : 1.0008);

/** What a full plan is to reach: a peak of the window, and how far above the least one it may stay. */
export interface Aim {
  target: number;
  leeway: number;
}

/**
 * The state of one layer after a full plan: packed for the scenarios, the window's own peak polished to `target`.
 * Small layers get the optimum of the window, or rows within `leeway` of it that are better in the scenarios.
 */
export function buildLayer(
  scenarios: Scenarios,
  devices: number,
  slots: number,
  { target, leeway }: Aim = { target: windowTarget(slots), leeway: 0 },
): LayerState {
  const state = pack(scenarios, devices, slots, target);
  if (state.windowPeak > target + acceptable && scenarios.blocks > 1) {
    // Counts made for the scenarios can leave no way to balance the window: plan for the window itself
    const flat = pack(windowOnly(scenarios), devices, slots, target);
    if (flat.windowPeak < state.windowPeak) state.start(flat.rows);
  }
  if (isSmall(scenarios.experts, devices, slots)) {
    const { rows, value, windowPeak } = {
      rows: state.rows.slice(),
      value: state.value,
      windowPeak: state.windowPeak,
    };
    state.set(exactRows(scenarios.window, devices, slots, rows));
    if (state.value > value && windowPeak <= state.windowPeak * (1 + leeway)) state.set(rows);
  }
  return state;
}

function pack(scenarios: Scenarios, devices: number, slots: number, target: number): LayerState {
  const replicas = minMaxReplicas(riskOf(scenarios), devices * slots, devices);
  const state = new LayerState(scenarios, devices, slots);
  state.start(packReplicas(scenarios, replicas, devices, slots));
  if (target < Number.POSITIVE_INFINITY) polish(state, target);
  else search(state);
  return state;
}

/** Changes that lower the value, best first. */
function search(state: LayerState): void {
  for (let change = 0; change < mostChanges; change++) {
    const proposal = propose(state, leastGain);
    if (proposal === undefined) return;
    state.apply(proposal.change);
  }
}

/**
 * What replicas are handed out by. Where single steps are scenarios, an expert counts by its peaks, as a device does
 * (layer_state.ts): the p-norm of its load over the scenarios. Otherwise by its load plus what it may exceed it by:
 * replicas are worth most where they take variance out of the devices, be it noise of single steps (all that counts
 * where the scenarios show no structure) or swings between scenarios.
 */
function riskOf(scenarios: Scenarios): Float64Array {
  const { experts, blocks, loads, weights, mean, noise, fine, structure } = scenarios;
  const risk = new Float64Array(experts);
  for (let expert = 0; expert < experts; expert++) {
    if (fine) {
      let powers = 0;
      for (let block = 0; block < blocks; block++) {
        let value = loads[expert * blocks + block]!;
        for (let step = 0; step < squarings; step++) value *= value;
        powers += weights[block]! * value;
      }
      risk[expert] = powers ** (1 / (1 << squarings));
      continue;
    }
    let swing = 0;
    for (let block = 0; block < blocks; block++)
      swing += weights[block]! * (loads[expert * blocks + block]! - mean[expert]!) ** 2;
    risk[expert] =
      mean[expert]! +
      noiseDeviates * (1 - structure) * Math.sqrt(noise[expert]!) +
      swingDeviates * Math.sqrt(swing);
  }
  return risk;
}

function windowOnly(scenarios: Scenarios): Scenarios {
  const { window } = scenarios;
  return {
    ...scenarios,
    blocks: 1,
    loads: window,
    weights: new Float64Array([1]),
    mean: window,
    fine: false,
    structure: 1,
  };
}

/** Rows that lie one after the other, as views. */
export const rowsOf = (flat: Int32Array, slots: number): Int32Array[] =>
  Array.from({ length: flat.length / slots }, (_, row) => flat.subarray(row * slots, (row + 1) * slots));

export const rebuild: Policy = {
  name: 'rebuild',
  summary: 'full plan for the window just seen, whatever it moves',
  keepsBudget: false,
  plan({ loads, devices, slots, current }, layerDone) {
    const placements = current.map((placement, layer) => {
      const state = buildLayer(scenariosOf(loads, layer, devices), devices, slots);
      const rows = matchRows(rowsOf(state.rows, slots), placement.toRows());
      layerDone();
      return Placement.fromRows(rows, { experts: loads.experts });
    });
    return { placements };
  },
};
