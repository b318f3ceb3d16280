// The project's own planner, the default. The first plan is a full one (see rebuild.ts). After that it moves only what
// pays:
// 1. earlier windows are scenarios beside this one, weighted by how well the past predicted so far;
// 2. every layer is searched from the placement in use, largest PAR gain per expert moved first, until a move gains
//    less than `worthwhile`; a layer whose whole gain could come from fitting sampling noise stays as it is;
// 3. a budget is spent over all layers where it gains most per move.
import { Placement } from '../placement/placement.js';
import { pastDecay } from './forecast.js';
import { type Change, LayerSearch } from './layer_search.js';
import type { PlanProblem, Policy } from './policy.js';
import { buildLayer, polishTarget } from './rebuild.js';
import { type PastWindow, type Scenarios, scenariosOf } from './scenario.js';

/** PAR that one expert moved must gain in its layer. */
const worthwhile = 1e-4;
/** A layer is left alone unless it gains this much PAR, and more than a search on nothing but noise would. */
const leastGain = 0.002;
const windowsKept = 4;
const mostChanges = 64;

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
function placementOf({ devices, slots, experts, rows }: LayerSearch, order?: readonly number[]): Placement {
  const byDevice = new Array<Int32Array>(devices);
  for (let row = 0; row < devices; row++)
    byDevice[order?.[row] ?? row] = rows.subarray(row * slots, (row + 1) * slots);
  return Placement.fromRows(byDevice, { experts });
}

/**
 * How far from balanced the window's own sum may stay: nothing to speak of when it has many tokens, much when its
 * sampling error is large, because balancing such a sum exactly would fit what will not come again at the expense of
 * the steps. Ten times the variance of a device's mean load.
 */
function noiseAllowance({ noise, uncertainty, fine }: Scenarios, devices: number): number {
  if (!fine) return 0;
  const variance = noise.reduce((sum, value) => sum + value, 0) / devices;
  return 10 * variance * uncertainty;
}

function firstPlan(problem: PlanProblem, layerDone: () => void): Placement[] {
  const { loads, devices, slots } = problem;
  return problem.current.map((_, layer) => {
    const scenarios = scenariosOf(loads, layer, devices, []);
    const search = buildLayer(scenarios, devices, slots, polishTarget + noiseAllowance(scenarios, devices));
    layerDone();
    return placementOf(search);
  });
}

/** The changes of one layer in the order they would be taken, and what has been moved and gained after each. */
interface Course {
  changes: Change[];
  moves: number[];
  gains: number[];
}

function courseOf(search: LayerSearch): Course {
  const start = search.value;
  const course: Course = { changes: [], moves: [], gains: [] };
  while (course.changes.length < mostChanges && search.propose(Number.POSITIVE_INFINITY) >= worthwhile) {
    course.changes.push(search.proposed);
    search.apply(search.proposed);
    course.moves.push(search.moves);
    course.gains.push(start - search.value);
  }
  const gained = course.gains.at(-1) ?? 0;
  return gained >= Math.max(leastGain, search.noiseGain) ? course : { changes: [], moves: [], gains: [] };
}

/** How many changes of each course to take: over all layers the best gain per move first, within the budget. */
function choose(courses: readonly Course[], maxMoves: number, maxMovesPerLayer: number): Int32Array {
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

export const adaptive: Policy = {
  name: 'adaptive',
  summary: 'the default: full first plan, then only moves that pay, most gain per move first, none for noise',
  keepsBudget: true,
  plan(problem, layerDone) {
    const { loads, devices, slots, current, first, maxMoves, maxMovesPerLayer } = problem;
    const totals = totalsOf(problem);
    const memory = problem.memory as Memory | undefined;
    const history = memory?.windows ?? [];
    const windows = [...history, totals].slice(-windowsKept);
    if (first && maxMoves === Number.POSITIVE_INFINITY && maxMovesPerLayer === Number.POSITIVE_INFINITY)
      return { placements: firstPlan(problem, layerDone), memory: { windows } satisfies Memory };

    const decay = pastDecay(loads, history, totals);
    const past: PastWindow[] = history
      .map((window, index) => ({ totals: window, weight: decay ** (history.length - index) }))
      .filter(({ weight }) => weight > 0.02);
    const unlimited = maxMoves === Number.POSITIVE_INFINITY && maxMovesPerLayer === Number.POSITIVE_INFINITY;
    const searches: LayerSearch[] = [];
    const orders = current.map(canonicalOrder);
    const courses = current.map((placement, layer) => {
      const search = new LayerSearch(scenariosOf(loads, layer, devices, past), devices, slots);
      search.start(canonicalRows(placement, orders[layer]!));
      const course = courseOf(search);
      searches.push(search);
      layerDone();
      return course;
    });
    const taken = unlimited
      ? courses.map(({ changes }) => changes.length)
      : choose(courses, maxMoves, maxMovesPerLayer);
    const placements = searches.map((search, layer) => {
      const { changes } = courses[layer]!;
      if (taken[layer] === 0) return current[layer]!;
      if (taken[layer]! < changes.length) {
        search.start(canonicalRows(current[layer]!, orders[layer]!));
        for (const change of changes.slice(0, taken[layer])) search.apply(change);
      }
      return placementOf(search, orders[layer]);
    });
    return { placements, memory: { windows } satisfies Memory };
  },
};
