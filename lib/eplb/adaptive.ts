// The project's own planner, the default.
// 1. Earlier windows are scenarios beside this one, weighted by how well the past predicted so far.
// 2. A layer whose devices are balanced but for sampling noise stays as it is, unless moves were said to be free.
// 3. Without a budget every other layer gets a full plan: this window balanced, the scenarios as far as that allows.
// 4. With a budget every layer is searched from the placement in use, largest PAR gain per expert moved first
//    (course.ts); the budget is spent over all layers where it gains most per move, and on full plans where it
//    reaches so far.
import { Placement } from '../placement/placement.js';
import { matchRows } from './assignment.js';
import { changeEvidence, deviceNoise, evidenceNeeded, surplusEvidence } from './chance.js';
import { choose, drawCourses, leastOf } from './course.js';
import { pastDecay } from './forecast.js';
import { LayerState } from './layer_state.js';
import type { PlanProblem, Policy } from './policy.js';
import { type Aim, buildLayer, windowTarget } from './rebuild.js';
import { type PastWindow, type Scenarios, scenariosOf } from './scenario.js';

/** A full plan finds this much more in noise than a search from the placement in use does; among single steps more. */
const fullSearch = 1.25;
const fineSearch = 3;
/** A difference of window peaks that is none. */
const barely = 1e-4;
/** How far above the optimum of the window a small layer may stay for the sake of earlier windows. */
const leewayOfReplans = 0.01;
const windowsKept = 4;
/** Least weight of an earlier window relative to the one after it: what was may come back, whatever came since. */
const leastDecay = 0.3;
const leastWeight = 0.02;

type Shape = Pick<PlanProblem, 'devices' | 'slots'>;

interface Memory {
  /** Totals of the windows seen, oldest first, f64[layers * experts] each. */
  windows: Float64Array[];
}

function totalsOf({ loads }: PlanProblem): Float64Array {
  const totals = new Float64Array(loads.layers * loads.experts);
  for (let layer = 0; layer < loads.layers; layer++) totals.set(loads.total(layer), layer * loads.experts);
  return totals;
}

/** Devices by what they hold. The search sees them in this order, so that their names cannot change a plan. */
function canonicalOrder(placement: Placement): number[] {
  const held = placement.toRows().map((row) => row.sort((left, right) => left - right));
  return held
    .map((_, device) => device)
    .sort((left, right) => {
      const differs = held[left]!.findIndex((expert, index) => expert !== held[right]![index]);
      return differs < 0 ? left - right : held[left]![differs]! - held[right]![differs]!;
    });
}

function canonicalRows(placement: Placement, order: readonly number[]): Int32Array {
  const rows = order.map((device) =>
    Array.from(placement.expertsOn(device)).sort((left, right) => left - right),
  );
  return Int32Array.from(rows.flat());
}

/** The rows of a search as a placement; order[row] is the device of each row. */
function placementOf({ devices, slots, experts, rows }: LayerState, order?: readonly number[]): Placement {
  const byDevice = new Array<Int32Array>(devices);
  for (let row = 0; row < devices; row++)
    byDevice[order?.[row] ?? row] = rows.subarray(row * slots, (row + 1) * slots);
  return Placement.fromRows(byDevice, { experts });
}

/**
 * What a full plan aims at. How far from balanced the window's own sum may stay: nothing to speak of when it has many
 * tokens, much when single steps are so few tokens that its sampling error is large, because balancing such a sum
 * exactly would fit what will not come again. Thirty times the variance of a device's mean load. Where nothing is to
 * be spared for what may come, `thisWindow`, it is balanced all the same.
 */
function aimOf(
  { noise, uncertainty, fine, earlier }: Scenarios,
  { devices, slots }: Shape,
  thisWindow: boolean,
): Aim {
  const target = windowTarget(slots);
  if (thisWindow) return { target, leeway: 0 };
  const variance = noise.reduce((sum, value) => sum + value, 0) / devices;
  return {
    target: target + (fine ? 30 * variance * uncertainty : 0),
    leeway: earlier > 0 ? leewayOfReplans : 0,
  };
}

/** A layer in the placement in use, its devices in canonical order. */
interface Layer {
  order: number[];
  start: Int32Array;
  state: LayerState;
  /** f64[devices]: how a device's load varies from step to step. */
  noise: Float64Array;
  /** How surely its loads are not those of the window before; 0 where there is none. */
  change: number;
}

/** A full plan of a layer, and what it moves and gains in the layer's own state. */
interface FullPlan {
  rows: Int32Array;
  moves: number;
  gain: number;
  /** How surely the layer needs it: from 1 on chance does not explain what it would gain. */
  evidence: number;
  /** True where the placement in use leaves the window less balanced than the plan. */
  uneven: boolean;
}

/** The state must be at the start, and is left at the rows planned. */
function fullPlan(layer: Layer, aim: Aim): FullPlan {
  const { start, state } = layer;
  const { devices, slots, scenarios } = state;
  const built = buildLayer(scenarios, devices, slots, aim);
  const rows = Int32Array.from(matchRows(rowsOf(built.rows, slots), rowsOf(start, slots)).flat());
  const before = state.value;
  const chance = leastOf(state, layer.noise);
  const surplus = surplusEvidence(state, layer.noise, built.windowPeak);
  const uneven = state.windowPeak > Math.max(built.windowPeak, windowTarget(slots)) + barely;
  state.set(rows);
  const gain = before - state.value;
  const evidence = Math.max(surplus, gain / (chance * (scenarios.fine ? fineSearch : fullSearch)));
  return { rows, moves: state.moves, gain, evidence, uneven };
}

/** Which layers need their full plans. */
function needed(layers: readonly Layer[], plans: readonly FullPlan[], movesAreFree: boolean): boolean[] {
  if (movesAreFree) return plans.map(({ evidence, uneven }) => evidence >= 1 || uneven);
  const bar = evidenceNeeded(layers.map(({ change }) => change));
  return plans.map(({ evidence, gain }) => evidence >= 1 || (evidence >= bar && gain > 0));
}

const rowsOf = (flat: Int32Array, slots: number): Int32Array[] =>
  Array.from({ length: flat.length / slots }, (_, row) => flat.subarray(row * slots, (row + 1) * slots));

/** Plans within a budget; rows are left in the layers' states. */
function planWithin(
  layers: readonly Layer[],
  maxMoves: number,
  maxMovesPerLayer: number,
  layerDone: () => void,
): void {
  const courses = drawCourses(layers, maxMoves, maxMovesPerLayer, layerDone);
  const wanted = courses.reduce((sum, course) => sum + (course.certain ? course.moved : 0), 0);
  const full: (FullPlan | undefined)[] = layers.map(() => undefined);
  if (wanted < maxMoves) {
    const plans = layers.map((layer) => {
      layer.state.set(layer.start);
      return fullPlan(layer, aimOf(layer.state.scenarios, layer.state, false));
    });
    for (const [index, need] of needed(layers, plans, false).entries()) if (need) full[index] = plans[index];
    const all = full.reduce((sum, plan) => sum + (plan?.moves ?? 0), 0);
    if (all <= maxMoves && full.every((plan) => plan === undefined || plan.moves <= maxMovesPerLayer)) {
      for (const [index, { state, start }] of layers.entries()) state.set(full[index]?.rows ?? start);
      return;
    }
  }
  const steps = courses.map((course, index) => {
    const { moves, gains } = course.certain ? course : { moves: [], gains: [] };
    const plan = full[index];
    return plan !== undefined && plan.gain > (gains.at(-1) ?? 0)
      ? { moves: [...moves, plan.moves], gains: [...gains, plan.gain] }
      : { moves, gains };
  });
  const taken = choose(steps, maxMoves, maxMovesPerLayer);
  for (const [index, { state, start }] of layers.entries()) {
    const { changes, certain } = courses[index]!;
    if (taken[index]! > (certain ? changes.length : 0)) state.set(full[index]!.rows);
    else {
      state.set(start);
      for (const change of changes.slice(0, taken[index])) state.apply(change);
    }
  }
}

export const adaptive: Policy = {
  name: 'adaptive',
  summary: 'the default: a full plan, or with a budget the moves that pay most; nothing for noise',
  keepsBudget: true,
  plan(problem, layerDone) {
    const { loads, devices, slots, current, first, maxMoves, maxMovesPerLayer, movesAreFree } = problem;
    const totals = totalsOf(problem);
    const history = (problem.memory as Memory | undefined)?.windows ?? [];
    const memory: Memory = { windows: [...history, totals].slice(-windowsKept) };
    const unlimited = maxMoves === Number.POSITIVE_INFINITY && maxMovesPerLayer === Number.POSITIVE_INFINITY;
    if (first && unlimited) {
      const placements = current.map((_, layer) => {
        const scenarios = scenariosOf(loads, layer, devices, []);
        const state = buildLayer(scenarios, devices, slots, aimOf(scenarios, problem, movesAreFree));
        layerDone();
        return placementOf(state);
      });
      return { placements, memory };
    }

    const decay = Math.max(leastDecay, pastDecay(loads, history, totals));
    const past: PastWindow[] = history
      .map((window, index) => ({ totals: window, weight: decay ** (history.length - index) }))
      .filter(({ weight }) => weight > leastWeight);
    const layers = current.map((placement, layer) => {
      const order = canonicalOrder(placement);
      const start = canonicalRows(placement, order);
      const state = new LayerState(scenariosOf(loads, layer, devices, past), devices, slots);
      state.start(start);
      const noise = deviceNoise(state, loads, layer);
      const before = history.at(-1)?.subarray(layer * loads.experts, (layer + 1) * loads.experts);
      const change = before === undefined ? 0 : changeEvidence(state, noise, before);
      return { order, start, state, noise, change };
    });
    if (unlimited) {
      const plans = layers.map((layer) => {
        const plan = fullPlan(layer, aimOf(layer.state.scenarios, problem, movesAreFree));
        layerDone();
        return plan;
      });
      for (const [index, need] of needed(layers, plans, movesAreFree).entries())
        if (!need) layers[index]!.state.set(layers[index]!.start);
    } else planWithin(layers, maxMoves, maxMovesPerLayer, layerDone);
    const placements = layers.map(({ order, state }, layer) =>
      state.moves === 0 ? current[layer]! : placementOf(state, order),
    );
    return { placements, memory };
  },
};
