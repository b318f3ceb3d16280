// A full plan of one layer beside the placement in use: what it would move and gain, and how surely it is needed.
import { matchRows } from './assignment.js';
import { evidenceNeeded, likelyByChance, surplusEvidence } from './chance.js';
import type { LayerState } from './layer_state.js';
import { type Aim, buildLayer, rowsOf, windowTarget } from './rebuild.js';
import type { Scenarios } from './scenario.js';

/** A full plan finds this much more in noise than a search from the placement in use does. */
const fullSearch = 1.25;
/**
 * Part of the peaks that a full plan must be expected to save in the next steps, where every step is a scenario: by the
 * mean over such layers, or by a layer alone so many times as surely.
 */
const worthwhile = 0.05;
const alone = 3;
/** A difference of window peaks that is none. */
const barely = 1e-4;
/** How far above the optimum of the window a small layer may stay for the sake of earlier windows. */
const leewayOfReplans = 0.01;

/**
 * What a full plan aims at. A window of few tokens is not balanced for its own sake, which would fit what will not come
 * again; where nothing is to be spared for what may come, `thisWindow`, it is balanced all the same.
 */
export function aimOf({ rough, earlier }: Scenarios, slots: number, thisWindow = false): Aim {
  if (thisWindow) return { target: windowTarget(slots), leeway: 0 };
  return {
    target: rough ? Number.POSITIVE_INFINITY : windowTarget(slots),
    leeway: earlier > 0 ? leewayOfReplans : 0,
  };
}

/** A layer in the placement in use, its devices in canonical order. */
export interface Layer {
  order: number[];
  start: Int32Array;
  state: LayerState;
  /** f64[devices]: how a device's load varies from step to step. */
  noise: Float64Array;
  /** How surely its loads are not those of the window before; 0 where there is none. */
  change: number;
}

/** A full plan of a layer, and what it moves and gains in the layer's own state. */
export interface FullPlan {
  rows: Int32Array;
  moves: number;
  gain: number;
  /** How surely the layer needs it: from 1 on chance does not explain what it would gain. */
  evidence: number;
  /** True where the placement in use leaves the window less balanced than the plan. */
  uneven: boolean;
  /** The part of the next steps' peaks that it is expected to save; where nothing can be said, no bound. */
  expected: number;
}

/** The state must be at the start, and is left at the rows planned. */
export function fullPlan(layer: Layer, aim: Aim): FullPlan {
  const { start, state } = layer;
  const { devices, slots, scenarios } = state;
  const built = buildLayer(scenarios, devices, slots, aim);
  const rows = Int32Array.from(matchRows(rowsOf(built.rows, slots), rowsOf(start, slots)).flat());
  const before = state.value;
  const chance = likelyByChance(state, layer.noise);
  const surplus = surplusEvidence(state, layer.noise, built.windowPeak);
  const uneven = state.windowPeak > Math.max(built.windowPeak, windowTarget(slots)) + barely;
  const inUse = state.peaks;
  state.set(rows);
  const expected =
    scenarios.earlier > 0 ? expectedSaving(scenarios, inUse, state.meanPeak) : Number.POSITIVE_INFINITY;
  const gain = before - state.value;
  const evidence = scenarios.fine ? gain / chance : Math.max(surplus, gain / (chance * fullSearch));
  return { rows, moves: state.moves, gain, evidence, uneven, expected };
}

/**
 * What a plan saves in the next steps. The steps of this window are new to the rows in use, those of earlier windows
 * are not: by what they do worse in the new ones, rows do worse in any new steps, the less the more steps they were
 * made for. The plan was made for both.
 */
function expectedSaving(
  { blocks, earlier, weights }: Scenarios,
  inUse: Float64Array,
  plannedPeak: number,
): number {
  const recent = blocks - earlier;
  const meanOf = (from: number, to: number): number => {
    let sum = 0;
    let weight = 0;
    for (let block = from; block < to; block++) {
      sum += weights[block]! * inUse[block]!;
      weight += weights[block]!;
    }
    return sum / weight;
  };
  const known = meanOf(recent, blocks);
  const unknown = meanOf(0, recent);
  const planned = plannedPeak + Math.max(0, unknown - known) * (earlier / blocks);
  return 1 - planned / unknown;
}

/** Which layers need their full plans. */
export function needed(
  layers: readonly Layer[],
  plans: readonly FullPlan[],
  movesAreFree: boolean,
): boolean[] {
  if (movesAreFree) return plans.map(({ evidence, uneven }) => evidence >= 1 || uneven);
  const bar = evidenceNeeded(layers.map(({ change }) => change));
  const bySteps = plans.filter((_, index) => layers[index]!.state.scenarios.fine);
  const saving = bySteps.reduce((sum, { expected }) => sum + expected, 0) / bySteps.length;
  return plans.map(({ evidence, gain, expected }, index) => {
    if (layers[index]!.state.scenarios.fine && Math.max(saving, expected / alone) < worthwhile) return false;
    return evidence >= 1 || (evidence >= bar && gain > 0);
  });
}
