// Replays a trace through policies, window by window: plan k sees window k and its own previous placement, and is
// judged on the window it saw (same) and on the one that follows (next). This is how every figure about planners in
// this project is measured; the even split over replicas applies throughout.
import { checkSignal } from '../abort.js';
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import type { Placement } from '../placement/placement.js';
import { Loads } from './loads.js';
import { stepPar, windowPar } from './metrics.js';
import { checkRequest, type Plan, type PlanRequest, planSync, requestFields } from './plan.js';
import { type PlannerFunction, planBy } from './plan_by.js';
import { policyNamed } from './registry.js';

export interface SimulateOptions extends Omit<PlanRequest, 'loads' | 'policy' | 'memory'> {
  policies: readonly string[];
  /** Steps per window. */
  window: number;
  /** How a plan is made; default on the calling thread. */
  planner?: PlannerFunction;
  /**
   * True: maxMoves and maxMovesPerLayer bind the first plan too. Default false: the first plan starts from the layout
   * the model was loaded with, before any traffic has to wait for moves.
   */
  budgetFirst?: boolean;
  onPlan?: (policy: string, plan: number, plans: number) => void;
  signal?: AbortSignal;
}

export interface PolicyFigures {
  name: string;
  /** PAR of window sums, mean over layers and plans: on the window planned on, and on the following one. */
  parSame: number;
  parNext: number;
  /** Mean over steps of the PAR of each step. */
  parStepSame: number;
  parStepNext: number;
  /** Mean of the later plans (of the first, if it is the only one). */
  moves: number;
  layersTouched: number;
  ms: number;
  /** The first plan, which starts from the layout the model was loaded with. */
  movesFirst: number;
  msFirst: number;
  movesTotal: number;
  plans: number;
  /** Step PAR of each following window, in order: the PAR over time. */
  parStepNextByWindow: number[];
  movesByPlan: number[];
}

const check = new Arguments('simulate');

/** Every option: those of a plan that are the same for all of them, and its own. */
const optionNames: readonly string[] = [
  ...requestFields.filter((name) => !['loads', 'policy', 'memory'].includes(name)),
  ...([
    'policies',
    'window',
    'planner',
    'budgetFirst',
    'onPlan',
    'signal',
  ] satisfies (keyof SimulateOptions)[]),
];

const mean = (values: readonly number[]): number =>
  values.length === 0 ? Number.NaN : values.reduce((sum, value) => sum + value, 0) / values.length;

/**
 * Figures of every policy on a trace. Plans are made after every window that has a successor. Throws
 * ERR_MOE_INVALID_ARG if the trace has fewer than two windows or `planner` gives no plan, ERR_MOE_ABORTED on abort.
 */
export async function simulate(trace: Loads, options: SimulateOptions): Promise<PolicyFigures[]> {
  check.instance('trace', trace, Loads);
  check.object('options', options, optionNames);
  const { policies, window, planner = planSync, onPlan, signal, budgetFirst = false, ...rest } = options;
  if (check.list('policies', policies).length === 0) check.refuse('policies', 'at least one name', policies);
  for (const name of policies) policyNamed(name);
  check.callback('planner', planner);
  check.callback('onPlan', onPlan);
  check.flag('budgetFirst', budgetFirst);
  checkSignal('simulate', signal);
  const windows = windowsOf(trace, window);
  checkRequest({ ...rest, loads: windows[0]! }); // the budget too, which the first plan may not have
  const figures: PolicyFigures[] = [];
  for (const name of policies) {
    let current: readonly Placement[] | undefined = rest.current;
    let memory: unknown;
    const same: number[] = [];
    const next: number[] = [];
    const stepSame: number[] = [];
    const stepNext: number[] = [];
    const plans: Plan[] = [];
    for (let index = 0; index + 1 < windows.length; index++) {
      if (signal?.aborted)
        throw new MoeError('ERR_MOE_ABORTED', `cancelled after ${index} plans of ${name}`, {
          op: 'simulate',
          cause: signal.reason,
        });
      const request: PlanRequest = {
        ...rest,
        loads: windows[index]!,
        policy: name,
        ...(current === undefined ? {} : { current }),
        ...(memory === undefined ? {} : { memory }),
      };
      if (index === 0 && rest.current === undefined && !budgetFirst) {
        // The first plan is made before serving starts
        if (request.maxMoves !== Number.POSITIVE_INFINITY) delete request.maxMoves;
        delete request.maxMovesPerLayer;
      }
      const plan = await planBy(planner, request, check);
      current = plan.placements;
      memory = plan.memory;
      plans.push(plan);
      same.push(plan.par.after.mean);
      stepSame.push(plan.parStep.after.mean);
      next.push(windowPar(windows[index + 1]!, current).mean);
      stepNext.push(stepPar(windows[index + 1]!, current).mean);
      onPlan?.(name, index + 1, windows.length - 1);
    }
    const later = plans.length > 1 ? plans.slice(1) : plans;
    figures.push({
      name,
      parSame: mean(same),
      parNext: mean(next),
      parStepSame: mean(stepSame),
      parStepNext: mean(stepNext),
      moves: mean(later.map((plan) => plan.moves)),
      layersTouched: mean(later.map((plan) => plan.layersTouched)),
      ms: mean(later.map((plan) => plan.ms)),
      movesFirst: plans[0]!.moves,
      msFirst: plans[0]!.ms,
      movesTotal: plans.reduce((sum, plan) => sum + plan.moves, 0),
      plans: plans.length,
      parStepNextByWindow: stepNext,
      movesByPlan: plans.map((plan) => plan.moves),
    });
  }
  return figures;
}

function windowsOf(trace: Loads, window: number): Loads[] {
  if (trace.steps < 2)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      'expected a trace of at least two steps, one window to plan on and one to judge the plan, ' +
        `but received ${trace.steps}`,
      { op: 'simulate', arg: 'trace' },
    );
  if (!Number.isInteger(window) || window < 1 || Math.floor(trace.steps / window) < 2)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected a window of at most ${Math.floor(trace.steps / 2)} steps ` +
        `(two windows of the trace's ${trace.steps} steps) but received ${describeValue(window)}`,
      { op: 'simulate', arg: 'window' },
    );
  return trace.windows(window);
}
