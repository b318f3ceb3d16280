// The project's own planner, the default.
// 1. Earlier windows are scenarios beside this one, weighted by how well the past predicted so far.
// 2. A layer whose devices are balanced but for sampling noise stays as it is, unless moves were said to be free.
// 3. Without a budget every other layer gets a full plan: this window balanced, the scenarios as far as that allows.
// 4. With a budget every layer is searched from the placement in use, largest PAR gain per expert moved first
//    (course.ts); the budget is spent over all layers where it gains most per move, and on full plans where it
//    reaches so far.
import { Placement } from '../placement/placement.js';
import { matchRows } from './assignment.js';
import { byChance, changeEvidence, deviceNoise, evidenceNeeded, surplusEvidence } from './chance.js';
import { choose, drawCourses, type Steps } from './course.js';
import { forecastOf } from './forecast.js';
import { LayerState } from './layer_state.js';
import { type Memory, pastOf, remember, totalsOf } from './memory.js';
import type { PlanProblem, Policy } from './policy.js';
import { type Aim, buildLayer, rowsOf, windowTarget } from './rebuild.js';
import { fineBlocks, type Scenarios, scenariosOf } from './scenario.js';

/** A full plan finds this much more in noise than a search from the placement in use does; among single steps more. */
const fullSearch = 1.25;
const fineSearch = 4;
/** Surplus of steps that differ by more than sampling reaches this many times what chance alone makes. */
const fineSurplus = 1.5;
/** A difference of window peaks that is none. */
const barely = 1e-4;
/** How far above the optimum of the window a small layer may stay for the sake of earlier windows. */
const leewayOfReplans = 0.01;
/** Variance of a device's load in a step, by sampling alone, from which on a window is not worth balancing exactly. */
const rough = 0.02;
/**
 * Least weight of an earlier window relative to the one after it: what was may come back, whatever came since. From
 * `fewWindows` on it gives way to what the windows themselves tell.
 */
const leastDecay = 0.3;
const fewWindows = 3;

type Shape = Pick<PlanProblem, 'devices' | 'slots'>;

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
function placementOf({ devices, slots, experts, rows }: LayerState, order: readonly number[]): Placement {
  const byDevice = new Array<Int32Array>(devices);
  for (let row = 0; row < devices; row++)
    byDevice[order[row]!] = rows.subarray(row * slots, (row + 1) * slots);
  return Placement.fromRows(byDevice, { experts });
}

/**
 * What a full plan aims at. How far from balanced the window's own sum may stay: nothing to speak of when it has many
 * tokens, much when single steps are so few tokens that its sampling error is large, because balancing such a sum
 * exactly would fit what will not come again. Thirty times the variance of a device's mean load. Where nothing is to
 * be spared for what may come, `thisWindow`, it is balanced all the same.
 */
function aimOf(
  { noise, sampling, uncertainty, fine, earlier }: Scenarios,
  { devices, slots }: Shape,
  thisWindow: boolean,
): Aim {
  const target = windowTarget(slots);
  if (thisWindow) return { target, leeway: 0 };
  const variance = noise.reduce((sum, value) => sum + value, 0) / devices;
  return {
    target: target + (fine && sampling >= rough ? 30 * variance * uncertainty : 0),
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
  const chance = byChance(state, layer.noise);
  const surplus = surplusEvidence(state, layer.noise, built.windowPeak);
  const uneven = state.windowPeak > Math.max(built.windowPeak, windowTarget(slots)) + barely;
  state.set(rows);
  const gain = before - state.value;
  const evidence = scenarios.fine
    ? Math.max(surplus / fineSurplus, gain / (chance * fineSearch))
    : Math.max(surplus, gain / (chance * fullSearch));
  return { rows, moves: state.moves, gain, evidence, uneven };
}

/** Which layers need their full plans. */
function needed(layers: readonly Layer[], plans: readonly FullPlan[], movesAreFree: boolean): boolean[] {
  if (movesAreFree) return plans.map(({ evidence, uneven }) => evidence >= 1 || uneven);
  const bar = evidenceNeeded(layers.map(({ change }) => change));
  return plans.map(({ evidence, gain }) => evidence >= 1 || (evidence >= bar && gain > 0));
}

/** Plans within a budget; rows are left in the layers' states. */
function planWithin(
  layers: readonly Layer[],
  maxMoves: number,
  maxMovesPerLayer: number,
  layerDone: () => void,
): void {
  const courses = drawCourses(layers, maxMoves, maxMovesPerLayer, layerDone);
  const wanted = courses.reduce((sum, { certain, moved }) => sum + (certain ? moved : 0), 0);
  const full = wanted < maxMoves ? neededPlans(layers) : layers.map(() => undefined);
  const all = full.reduce((sum, plan) => sum + (plan?.moves ?? 0), 0);
  const fit = all <= maxMoves && full.every((plan) => plan === undefined || plan.moves <= maxMovesPerLayer);
  const steps = courses.map((course, index) => {
    const plan = full[index];
    const { moves, gains } = course.certain && !(fit && plan !== undefined) ? course : none;
    return !fit && plan !== undefined && plan.gain > (gains.at(-1) ?? 0)
      ? { moves: [...moves, plan.moves], gains: [...gains, plan.gain] }
      : { moves, gains };
  });
  const taken = choose(steps, fit ? maxMoves - all : maxMoves, maxMovesPerLayer);
  for (const [index, { state, start }] of layers.entries()) {
    const { changes, certain } = courses[index]!;
    const plan = full[index];
    if (plan !== undefined && (fit || taken[index]! > (certain ? changes.length : 0))) state.set(plan.rows);
    else {
      state.set(start);
      for (const change of changes.slice(0, taken[index])) state.apply(change);
    }
  }
}

const none: Steps = { moves: [], gains: [] };

/** The full plans of the layers that need them. */
function neededPlans(layers: readonly Layer[]): (FullPlan | undefined)[] {
  const plans = layers.map((layer) => {
    layer.state.set(layer.start);
    return fullPlan(layer, aimOf(layer.state.scenarios, layer.state, false));
  });
  const need = needed(layers, plans, false);
  return plans.map((plan, index) => (need[index] ? plan : undefined));
}

export const adaptive: Policy = {
  name: 'adaptive',
  summary: 'the default: a full plan, or with a budget the moves that pay most; nothing for noise',
  keepsBudget: true,
  plan(problem, layerDone) {
    const { loads, devices, slots, current, first, maxMoves, maxMovesPerLayer, movesAreFree } = problem;
    const history = (problem.memory as Memory | undefined)?.windows ?? [];
    const least = leastDecay * Math.min(1, fewWindows / (history.length + 1));
    const past = pastOf(history, forecastOf(loads, history.map(totalsOf), least));
    const scenarios = current.map((_, layer) => scenariosOf(loads, layer, devices, past));
    const memory = remember(history, loads, scenarios.some(({ fine }) => fine) ? fineBlocks : 1);
    const unlimited = maxMoves === Number.POSITIVE_INFINITY && maxMovesPerLayer === Number.POSITIVE_INFINITY;
    if (first && unlimited) {
      const placements = scenarios.map((ofLayer, layer) => {
        const state = buildLayer(ofLayer, devices, slots, aimOf(ofLayer, problem, movesAreFree));
        const rows = matchRows(rowsOf(state.rows, slots), current[layer]!.toRows());
        layerDone();
        return Placement.fromRows(rows, { experts: loads.experts });
      });
      return { placements, memory };
    }

    const last = history.length > 0 ? totalsOf(history.at(-1)!) : undefined;
    const layers = current.map((placement, layer) => {
      const order = canonicalOrder(placement);
      const start = canonicalRows(placement, order);
      const state = new LayerState(scenarios[layer]!, devices, slots);
      state.start(start);
      const noise = deviceNoise(state, loads, layer);
      const before = last?.subarray(layer * loads.experts, (layer + 1) * loads.experts);
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
