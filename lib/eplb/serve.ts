// Replays a trace as a server would live it: collect heat for some steps, let the planner work for some, then switch
// layers a few per step, then collect again. Every step is judged under the placement in force when it ran. The cycle
// is a plain reducer over the step number; a layer switches between two steps, never inside one, and a layer that does
// not change costs no step.
import { checkSignal } from '../abort.js';
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { Placement } from '../placement/placement.js';
import { Loads } from './loads.js';
import { stepPar } from './metrics.js';
import { type Plan, type PlanRequest, planSync, startPlacements } from './plan.js';

export interface ServeOptions extends Omit<PlanRequest, 'loads' | 'memory'> {
  /** Steps whose loads a plan sees. */
  collect: number;
  /** Steps between asking for a plan and having it. */
  plan: number;
  /** Layers whose experts are exchanged in one step. */
  layersPerStep: number;
  planner?: (request: PlanRequest) => Plan | Promise<Plan>;
  signal?: AbortSignal;
}

export interface ServedTrace {
  /** f64[steps]: mean over layers of the PAR of each step, as served. */
  par: Float64Array;
  /** i32[steps]: expert weights received in each step, all devices and layers. */
  moves: Int32Array;
  /** Mean of `par` over all steps, and over those since the first plan was in force everywhere. */
  mean: number;
  meanPlanned: number;
  plans: number;
}

const check = new Arguments('serve');

/** Serves the whole trace with one policy. Throws ERR_MOE_INVALID_ARG for intervals below 1, ERR_MOE_ABORTED on abort. */
export async function serveTrace(trace: Loads, options: ServeOptions): Promise<ServedTrace> {
  check.instance('trace', trace, Loads);
  check.object('options', options);
  const { collect, plan: planning, layersPerStep, planner = planSync, signal, ...rest } = options;
  checkSignal('serve', signal);
  check.integer('collect', collect, 1);
  check.integer('plan', planning, 1);
  check.integer('layersPerStep', layersPerStep, 1);
  check.callback('planner', planner);
  if (rest.current !== undefined) check.instances('current', rest.current, Placement);
  const pinned = rest.sharedPlacement === 'everyDevice' ? rest.shared : 0;
  const inForce: Placement[] = [
    ...(rest.current ?? startPlacements(trace.layers, trace.experts, rest.devices, rest.slots, pinned)),
  ];
  const par = new Float64Array(trace.steps);
  const moves = new Int32Array(trace.steps);
  let memory: unknown;
  let planned = rest.current !== undefined;
  let plans = 0;
  let cycleStart = 0;
  let waiting: { plan: Plan; layers: number[] } | undefined;
  let plannedFrom = trace.steps;
  for (let step = 0; step < trace.steps; step++) {
    if (signal?.aborted)
      throw new MoeError('ERR_MOE_ABORTED', `cancelled at step ${step}`, {
        op: 'serve',
        cause: signal.reason,
      });
    par[step] = stepPar(trace.window(step, 1), inForce).mean;
    const inCycle = step - cycleStart + 1;
    if (inCycle === collect) {
      const loads = trace.window(step - collect + 1, collect);
      const plan = await planner({
        ...rest,
        loads,
        ...(planned ? { current: [...inForce] } : {}),
        ...(memory === undefined ? {} : { memory }),
      });
      memory = plan.memory;
      plans++;
      waiting = {
        plan,
        layers: Array.from(plan.movesPerLayer.keys()).filter((layer) => plan.movesPerLayer[layer]! > 0),
      };
    }
    if (waiting !== undefined && inCycle >= collect + planning) {
      for (const layer of waiting.layers.splice(0, layersPerStep)) {
        inForce[layer] = waiting.plan.placements[layer]!;
        moves[step]! += waiting.plan.movesPerLayer[layer]!;
      }
      if (waiting.layers.length === 0) {
        waiting = undefined;
        planned = true;
        plannedFrom = Math.min(plannedFrom, step + 1);
        cycleStart = step + 1;
      }
    }
  }
  const mean = (from: number): number => {
    const part = par.subarray(from);
    return part.length === 0 ? Number.NaN : part.reduce((sum, value) => sum + value, 0) / part.length;
  };
  return { par, moves, mean: mean(0), meanPlanned: mean(plannedFrom), plans };
}
