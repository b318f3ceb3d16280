// A full plan from the window alone, with any number of moves: replica counts, packing, local search on the
// scenarios, and a last polish of the window's own peak.
import { Placement } from '../placement/placement.js';
import { matchRows } from './assignment.js';
import { exactRows, isSmall } from './exact.js';
import { LayerSearch } from './layer_search.js';
import { packReplicas } from './pack.js';
import type { Policy } from './policy.js';
import { minMaxReplicas } from './replicate.js';
import { type Scenarios, scenariosOf } from './scenario.js';

/** PAR of the window that polishing aims at. */
export const polishTarget = 1.0004;
/** Deviates of a step's noise and of the swing between scenarios that replica counts allow for. */
const noiseDeviates = 1.5;
const swingDeviates = 0.5;
/** Changes tried after polishing that improve the scenarios and leave the window as it is. */
const refinements = 16;
/** How much of it may be given back for better scenarios. */
const slack = 0.0005;

/**
 * The search of one layer after a full plan: packed for the scenarios, then polished until the window's own peak is
 * at most `target`. `acceptable` is the peak from which on it is packed again for the window alone.
 */
export function buildLayer(
  scenarios: Scenarios,
  devices: number,
  slots: number,
  target = polishTarget,
): LayerSearch {
  const acceptable = target + 2 * slack;
  const search = pack(scenarios, devices, slots, target);
  if (search.windowPeak > acceptable && scenarios.blocks > 1) {
    // Counts made for the forecast can leave no way to balance the window: plan for the window itself
    const flat = pack(windowOnly(scenarios), devices, slots, target);
    if (flat.windowPeak < search.windowPeak) search.start(flat.rows);
  }
  if (isSmall(scenarios.experts, devices, slots))
    search.start(exactRows(scenarios.window, devices, slots, search.rows));
  return search;
}

function pack(scenarios: Scenarios, devices: number, slots: number, target: number): LayerSearch {
  const replicas = minMaxReplicas(riskOf(scenarios), devices * slots, devices);
  const search = new LayerSearch(scenarios, devices, slots);
  search.start(packReplicas(scenarios, replicas, devices, slots));
  search.polish(target, 6 * devices, devices);
  const cap = Math.max(target, search.windowPeak) + slack;
  for (let step = 0; step < refinements && scenarios.blocks > 1; step++) {
    if (search.proposeWithin(cap) < 1e-4) break;
    search.apply(search.proposed);
  }
  return search;
}

/**
 * Load of every expert plus what it may exceed it by: replicas are worth most where they take variance out of the
 * devices, be it noise of single steps (all that counts where the scenarios show no structure) or swings between
 * scenarios.
 */
function riskOf({ experts, blocks, loads, weights, mean, noise, fine, structure }: Scenarios): Float64Array {
  const deviates = fine ? noiseDeviates : noiseDeviates * (1 - structure);
  const risk = new Float64Array(experts);
  for (let expert = 0; expert < experts; expert++) {
    let swing = 0;
    for (let block = 0; block < blocks; block++)
      swing += weights[block]! * (loads[expert * blocks + block]! - mean[expert]!) ** 2;
    risk[expert] = mean[expert]! + deviates * Math.sqrt(noise[expert]!) + swingDeviates * Math.sqrt(swing);
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

export const rebuild: Policy = {
  name: 'rebuild',
  summary: 'full plan for the window just seen, whatever it moves',
  keepsBudget: false,
  plan({ loads, devices, slots, current, first }, layerDone) {
    const placements = current.map((placement, layer) => {
      const search = buildLayer(scenariosOf(loads, layer, devices, []), devices, slots);
      let rows = Array.from({ length: devices }, (_, device) =>
        Array.from(search.rows.subarray(device * slots, (device + 1) * slots)),
      );
      if (!first) rows = matchRows(rows, placement.toRows());
      layerDone();
      return Placement.fromRows(rows, { experts: loads.experts });
    });
    return { placements };
  },
};
