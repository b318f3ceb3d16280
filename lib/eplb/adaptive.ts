// The project's own planner, the default.
// 1. Earlier windows are scenarios beside this one, weighted by how well the past predicted so far. Where single steps
//    are uneven, they are the scenarios (scenario.ts).
// 2. A layer whose devices are balanced but for noise stays as it is, unless moves were said to be free (chance.ts,
//    full_plan.ts).
// 3. Without a budget every other layer gets a full plan: this window balanced, the scenarios as far as that allows,
//    or, in windows of few tokens, the scenarios alone (rebuild.ts).
// 4. With a budget every layer has a route of steps: changes from the placement in use, largest PAR gain per expert
//    moved first (course.ts), or the way back from a full plan (retreat.ts). The budget is spent over all layers where
//    it gains most per move, and on full plans where it reaches so far (budget.ts).
import { Placement } from '../placement/placement.js';
import { matchRows } from './assignment.js';
import { planWithin } from './budget.js';
import { changeEvidence, deviceNoise } from './chance.js';
import { forecastOf } from './forecast.js';
import { aimOf, fullPlan, needed } from './full_plan.js';
import { LayerState } from './layer_state.js';
import { type Memory, pastOf, remember, totalsOf } from './memory.js';
import type { Policy } from './policy.js';
import { buildLayer, rowsOf } from './rebuild.js';
import { fineBlocks, isRough, roughBlocks, samplingOf, scenariosOf } from './scenario.js';

/**
 * Least weight of an earlier window relative to the one after it: what was may come back, whatever came since. From
 * `fewWindows` on it gives way to what the windows themselves tell.
 */
const leastDecay = 0.3;
const fewWindows = 3;
/** Runs of steps that earlier windows are taken as, at most; more where steps of few tokens are all there is. */
const fineRuns = 32;
const roughRuns = 64;

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

export const adaptive: Policy = {
  name: 'adaptive',
  summary: 'the default: a full plan, or with a budget the moves that pay most; nothing for noise',
  keepsBudget: true,
  plan(problem, layerDone) {
    const { loads, devices, slots, current, first, maxMoves, maxMovesPerLayer, movesAreFree } = problem;
    const history = (problem.memory as Memory | undefined)?.windows ?? [];
    const least = leastDecay * Math.min(1, fewWindows / (history.length + 1));
    const rough = current.some((_, layer) => isRough(samplingOf(loads, layer, devices), loads.steps));
    const past = pastOf(
      history,
      forecastOf(loads, history.map(totalsOf), least),
      rough ? roughRuns : fineRuns,
    );
    const scenarios = current.map((_, layer) => scenariosOf(loads, layer, devices, past));
    const memory = remember(
      history,
      loads,
      scenarios.some(({ fine }) => fine) ? (rough ? roughBlocks : fineBlocks) : 1,
    );
    const unlimited = maxMoves === Number.POSITIVE_INFINITY && maxMovesPerLayer === Number.POSITIVE_INFINITY;
    if (first && unlimited) {
      const placements = scenarios.map((ofLayer, layer) => {
        const state = buildLayer(ofLayer, devices, slots, aimOf(ofLayer, slots, movesAreFree));
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
        const plan = fullPlan(layer, aimOf(layer.state.scenarios, slots, movesAreFree));
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
