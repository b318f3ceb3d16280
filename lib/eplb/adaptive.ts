// The project's own planner, the default.
// 1. Earlier windows are scenarios beside this one, weighted by how well the past predicted so far.
// 2. A layer whose devices are balanced but for sampling noise stays as it is.
// 3. Without a budget every other layer gets a full plan: this window balanced, the scenarios as far as that allows.
// 4. With a budget every layer is searched from the placement in use, largest PAR gain per expert moved first, until
//    a move gains less than `worthwhile`; the budget is spent over all layers where it gains most per move, and on
//    full plans where it reaches so far.
import { Placement } from '../placement/placement.js';
import { matchRows } from './assignment.js';
import { exceedsNoise, noiseGain } from './chance.js';
import { pastDecay } from './forecast.js';
import { propose } from './improve.js';
import { type Change, LayerState } from './layer_state.js';
import type { PlanProblem, Policy } from './policy.js';
import { buildLayer, windowTarget } from './rebuild.js';
import { type PastWindow, type Scenarios, scenariosOf } from './scenario.js';

/** PAR that one expert moved must gain in its layer. */
const worthwhile = 1e-4;
/** A layer is left alone unless it gains this much PAR, and more than a search on nothing but noise would. */
const leastGain = 0.002;
/** A full plan finds this much more in noise than a search from the placement in use does. */
const fullSearch = 1.25;
const windowsKept = 4;
const mostChanges = 64;
/** Least weight of an earlier window relative to the one after it: what was may come back, whatever came since. */
const leastDecay = 0.3;
const leastWeight = 0.02;

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
 * exactly would fit what will not come again. Thirty times the variance of a device's mean load.
 */
function targetOf({ noise, uncertainty, fine }: Scenarios, devices: number, slots: number): number {
  const variance = noise.reduce((sum, value) => sum + value, 0) / devices;
  return windowTarget(slots) + (fine ? 30 * variance * uncertainty : 0);
}

/** A layer in the placement in use, its devices in canonical order. */
interface Layer {
  order: number[];
  start: Int32Array;
  state: LayerState;
}

/** A full plan of a layer, and what it moves and gains in the layer's own state. */
interface FullPlan {
  rows: Int32Array;
  moves: number;
  gain: number;
  /** False where all it would gain can be chance. */
  needed: boolean;
}

/** The state must be at the start, and is left at the rows planned. */
function fullPlan({ start, state }: Layer): FullPlan {
  const { devices, slots, scenarios } = state;
  const built = buildLayer(scenarios, devices, slots, targetOf(scenarios, devices, slots));
  const rows = Int32Array.from(matchRows(rowsOf(built.rows, slots), rowsOf(start, slots)).flat());
  const before = state.value;
  const chance = Math.max(leastGain, noiseGain(state));
  const exceeds = exceedsNoise(state, built.windowPeak);
  state.set(rows);
  const gain = before - state.value;
  return { rows, moves: state.moves, gain, needed: exceeds || gain >= fullSearch * chance };
}

const rowsOf = (flat: Int32Array, slots: number): Int32Array[] =>
  Array.from({ length: flat.length / slots }, (_, row) => flat.subarray(row * slots, (row + 1) * slots));

/** The changes of one layer in the order they would be taken, and what has been moved and gained after each. */
interface Course {
  changes: Change[];
  moves: number[];
  gains: number[];
}

function courseOf(state: LayerState): Course {
  const start = state.value;
  const chance = Math.max(leastGain, noiseGain(state));
  const course: Course = { changes: [], moves: [], gains: [] };
  while (course.changes.length < mostChanges) {
    const proposal = propose(state, worthwhile);
    if (proposal === undefined) break;
    state.apply(proposal.change);
    course.changes.push(proposal.change);
    course.moves.push(state.moves);
    course.gains.push(start - state.value);
  }
  return (course.gains.at(-1) ?? 0) >= chance ? course : { changes: [], moves: [], gains: [] };
}

/** How many changes of each course to take: over all layers the best gain per move first, within the budget. */
function choose(
  courses: readonly Pick<Course, 'moves' | 'gains'>[],
  maxMoves: number,
  maxMovesPerLayer: number,
): Int32Array {
  const taken = new Int32Array(courses.length);
  let left = maxMoves;
  for (;;) {
    let best = -1;
    let upTo = 0;
    let bestRate = 0;
    for (const [layer, { moves, gains }] of courses.entries()) {
      const from = taken[layer]!;
      const movesBefore = from > 0 ? moves[from - 1]! : 0;
      const gainsBefore = from > 0 ? gains[from - 1]! : 0;
      for (let end = from; end < moves.length; end++) {
        const added = moves[end]! - movesBefore;
        if (added > left || moves[end]! > maxMovesPerLayer) continue;
        const rate = (gains[end]! - gainsBefore) / Math.max(0.5, added);
        if (rate > bestRate) {
          bestRate = rate;
          best = layer;
          upTo = end + 1;
        }
      }
    }
    if (best < 0) return taken;
    const { moves } = courses[best]!;
    left -= moves[upTo - 1]! - (taken[best]! > 0 ? moves[taken[best]! - 1]! : 0);
    taken[best] = upTo;
  }
}

/** Plans within a budget; rows are left in the layers' states. */
function planWithin(
  layers: readonly Layer[],
  maxMoves: number,
  maxMovesPerLayer: number,
  layerDone: () => void,
): void {
  const courses = layers.map(({ state }) => {
    const course = courseOf(state);
    layerDone();
    return course;
  });
  const wanted = courses.reduce((sum, { moves }) => sum + (moves.at(-1) ?? 0), 0);
  const full: FullPlan[] = [];
  if (wanted < maxMoves)
    for (const layer of layers) {
      layer.state.set(layer.start);
      full.push(fullPlan(layer));
    }
  const all = full.reduce((sum, { moves, needed }) => sum + (needed ? moves : 0), 0);
  if (
    full.length > 0 &&
    all <= maxMoves &&
    full.every(({ moves, needed }) => !needed || moves <= maxMovesPerLayer)
  ) {
    for (const [index, { state, start }] of layers.entries())
      state.set(full[index]!.needed ? full[index]!.rows : start);
    return;
  }
  const steps = courses.map(({ moves, gains }, index) => {
    const { needed = false, moves: most = 0, gain = 0 } = full[index] ?? {};
    return needed && gain > (gains.at(-1) ?? 0)
      ? { moves: [...moves, most], gains: [...gains, gain] }
      : { moves, gains };
  });
  const taken = choose(steps, maxMoves, maxMovesPerLayer);
  for (const [index, { state, start }] of layers.entries()) {
    const { changes } = courses[index]!;
    if (taken[index]! > changes.length) state.set(full[index]!.rows);
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
    const { loads, devices, slots, current, first, maxMoves, maxMovesPerLayer } = problem;
    const totals = totalsOf(problem);
    const history = (problem.memory as Memory | undefined)?.windows ?? [];
    const memory: Memory = { windows: [...history, totals].slice(-windowsKept) };
    const unlimited = maxMoves === Number.POSITIVE_INFINITY && maxMovesPerLayer === Number.POSITIVE_INFINITY;
    if (first && unlimited) {
      const placements = current.map((_, layer) => {
        const scenarios = scenariosOf(loads, layer, devices, []);
        const state = buildLayer(scenarios, devices, slots, targetOf(scenarios, devices, slots));
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
      if (unlimited) {
        if (!fullPlan({ order, start, state }).needed) state.set(start);
        layerDone();
      }
      return { order, start, state };
    });
    if (!unlimited) planWithin(layers, maxMoves, maxMovesPerLayer, layerDone);
    const placements = layers.map(({ order, state }, layer) =>
      state.moves === 0 ? current[layer]! : placementOf(state, order),
    );
    return { placements, memory };
  },
};
