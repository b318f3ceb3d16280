// A plan by whoever calls simulate or serveTrace. Their planner is code of others: what it gives is checked before
// anything is judged by it.
import type { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { Placement } from '../placement/placement.js';
import type { Plan, PlanRequest } from './plan.js';

/** How a plan is made: `planSync`, `planner.plan` of a `Planner`, or anything that answers alike. */
export type PlannerFunction = (request: PlanRequest) => Plan | Promise<Plan>;

/** What `planner` makes of the request. Throws what it throws, ERR_MOE_INVALID_ARG where that is no plan for it. */
export async function planBy(
  planner: PlannerFunction,
  request: PlanRequest,
  check: Arguments,
): Promise<Plan> {
  const { layers, experts } = request.loads;
  const plan = check.object('planner()', await planner(request));
  const field = (name: string): string => `planner().${name}`;
  if (check.instances(field('placements'), plan.placements, Placement).length !== layers)
    check.refuse(field('placements'), `a placement for each of ${layers} layers`, plan.placements);
  const shapeOf = (shape: { experts: number; devices: number; slots: number }): string =>
    `${shape.experts} experts on ${shape.devices} devices x ${shape.slots} slots`;
  const wanted = shapeOf({ ...request, experts });
  for (const [layer, placement] of plan.placements.entries())
    if (shapeOf(placement) !== wanted)
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${field(`placements[${layer}]`)} to hold ${wanted} but received ${shapeOf(placement)}`,
        { op: check.op, arg: field(`placements[${layer}]`) },
      );
  check.number(field('ms'), plan.ms, 0);
  for (const name of ['moves', 'layersTouched'] as const) check.integer(field(name), plan[name], 0);
  if (!(plan.movesPerLayer instanceof Int32Array) || plan.movesPerLayer.length !== layers)
    check.refuse(field('movesPerLayer'), `an Int32Array of ${layers}`, plan.movesPerLayer);
  for (const name of ['par', 'parStep'] as const) {
    const { after } = check.object(field(name), plan[name]);
    check.number(field(`${name}.after.mean`), check.object(field(`${name}.after`), after).mean, 0);
  }
  return plan;
}
