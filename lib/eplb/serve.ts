// Replays a trace as a server would live it: collect heat for some steps, let the planner work for some, then switch
// layers a few per step, then collect again. Every step is judged under the placement in force when it ran. The cycle
// is a plain reducer over the step number; a layer switches between two steps, never inside one, and a layer that does
// not change costs no step.
import { checkSignal } from '../abort.js';
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import type { Placement } from '../placement/placement.js';
import { Loads } from './loads.js';
import { stepPar } from './metrics.js';
import {
  checkRequest,
  type Plan,
  type PlanRequest,
  planSync,
  requestFields,
  startPlacements,
} from './plan.js';
import { type PlannerFunction, planBy } from './plan_by.js';

export interface ServeOptions extends Omit<PlanRequest, 'loads' | 'memory'> {
  /** Steps whose loads a plan sees. */
  collect: number;
  /** Steps between asking for a plan and having it. */
  plan: number;
  /** Layers whose experts are exchanged in one step. */
  layersPerStep: number;
  /** How a plan is made; default on the calling thread. */
  planner?: PlannerFunction;
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

/** Every option: those of a plan that are the same for all of them, and its own. */
const optionNames: readonly string[] = [
  ...requestFields.filter((name) => !['loads', 'memory'].includes(name)),
  ...(['collect', 'plan', 'layersPerStep', 'planner', 'signal'] satisfies (keyof ServeOptions)[]),
];

/**
 * Serves the whole trace with one policy. Throws ERR_MOE_INVALID_ARG for intervals below 1 or if `planner` gives no
 * plan, ERR_MOE_ABORTED on abort.
 */
export async function serveTrace(trace: Loads, options: ServeOptions): Promise<ServedTrace> {
  check.instance('trace', trace, Loads);
  check.object('options', options, optionNames);
  const { collect, plan: planning, layersPerStep, planner = planSync, signal, ...rest } = options;
  checkSignal('serve', signal);
  check.integer('collect', collect, 1);
  check.integer('plan', planning, 1);
  check.integer('layersPerStep', layersPerStep, 1);
  check.callback('planner', planner);
  checkRequest({ ...rest, loads: trace }); // now, not at the first plan, which a short trace never comes to
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
      const request: PlanRequest = {
        ...rest,
        loads: trace.window(step - collect + 1, collect),
        ...(planned ? { current: [...inForce] } : {}),
        ...(memory === undefined ? {} : { memory }),
      };
      const plan = await planBy(planner, request, check);
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
