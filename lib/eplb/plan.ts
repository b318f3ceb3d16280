// One plan: checks the request, runs a policy, enforces what every plan must keep (legal, kept experts in their
// slots, pinned shared experts, budget) and measures before and after. Nothing is changed in place: the result is a
// complete set of placements or an error, so that a plan can never be half applied.
import { performance } from 'node:perf_hooks';
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import { countMoves, keepSlots } from '../placement/align.js';
import { Placement } from '../placement/placement.js';
import { redundantPlacement } from '../placement/strategies.js';
import { checkPlannable, Loads } from './loads.js';
import { deviceLoads, movesPerLayer, type Par, peakToAverage, stepPar, windowPar } from './metrics.js';
import type { PlanProblem, Policy } from './policy.js';
import { defaultPolicy, policyNamed } from './registry.js';
import { separateDoubles } from './separate.js';

export interface PlanRequest {
  /** Logical loads of the window, [steps, layers, experts], shared experts in the last `shared` columns. */
  loads: Loads;
  devices: number;
  /** Slots per device, redundant and shared ones included. */
  slots: number;
  /** Default: the project's own planner. */
  policy?: string;
  /** The placements in use, one per layer. Default: experts in order, copies appended, and everything is replanned. */
  current?: readonly Placement[];
  /** Number of shared experts among the experts; default 0. */
  shared?: number;
  /**
   * 'free' (default): replicas of shared experts are planned like any others (at least one each).
   * 'everyDevice': every device keeps one replica of each in its last slots; the planner sees the rest.
   */
  sharedPlacement?: 'free' | 'everyDevice';
  /** Expert groups and nodes for hierarchical planners; default 1. */
  groups?: number;
  nodes?: number;
  /** Blocks of flashlb's search; default 4, as in vllm-ascend. More is not always better. */
  depth?: number;
  /**
   * Most expert weights to move, all layers together. Default: as many as it takes, but none that chance alone could
   * ask for. Infinity: moves are free, and every layer is balanced for this very window, sampling noise included.
   */
  maxMoves?: number;
  /** Most expert weights to move in one layer; default unlimited. */
  maxMovesPerLayer?: number;
  seed?: number;
  /** `memory` of the plan before, for policies that learn from more than one window. */
  memory?: unknown;
  /** 'reject' (default): a layer that is all zero or has one used expert is an error. 'keep': it stays as it is. */
  degenerate?: 'reject' | 'keep';
}

export interface Plan {
  policy: string;
  /** Milliseconds the policy took, all layers. */
  ms: number;
  placements: Placement[];
  /** What the plan starts from: `current`, or the layout that a server starts with. */
  from: readonly Placement[];
  /** Expert weights that devices must receive, all layers and per layer. */
  moves: number;
  movesPerLayer: Int32Array;
  layersTouched: number;
  /** PAR of the window's sum, and mean of the PAR of its steps, before and after. */
  par: { before: Par; after: Par };
  parStep: { before: Par; after: Par };
  memory: unknown;
}

const check = new Arguments('plan');

const refuse = (message: string, arg: string): never => {
  throw new MoeError('ERR_MOE_INVALID_ARG', message, { op: 'plan', arg });
};

/** Every field of a request: a misspelt budget must not pass for none. */
export const requestFields: readonly string[] = [
  'loads',
  'devices',
  'slots',
  'policy',
  'current',
  'shared',
  'sharedPlacement',
  'groups',
  'nodes',
  'depth',
  'maxMoves',
  'maxMovesPerLayer',
  'seed',
  'memory',
  'degenerate',
] satisfies (keyof PlanRequest)[];

/**
 * The placements a server starts with: experts in order, copies appended. With `pinned` the last so many experts,
 * shared ones, have a replica in the last slots of every device, and the others are laid out in the rest.
 */
export function startPlacements(
  layers: number,
  experts: number,
  devices: number,
  slots: number,
  pinned = 0,
): Placement[] {
  check.integer('layers', layers, 1);
  check.integer('experts', experts, 1);
  check.integer('pinned', pinned, 0);
  const routed = experts - pinned;
  checkSizes(routed, devices, slots - pinned);
  const placement = withShared(
    redundantPlacement(routed, devices, devices * (slots - pinned) - routed),
    pinned,
  );
  return Array.from({ length: layers }, () => placement);
}

function checkSizes(experts: number, devices: number, slots: number): void {
  check.integer('devices', devices, 1);
  check.integer('slots', slots, 1);
  if (devices * slots < experts)
    refuse(
      `expected at least ${experts} slots for ${experts} experts but received ${devices} devices x ${slots} slots = ${devices * slots}`,
      'slots',
    );
  if (slots > experts)
    refuse(
      `expected at most ${experts} slots per device (one replica of each expert) but received ${slots}`,
      'slots',
    );
}

/** Checks everything about a request that does not depend on the policy; returns it complete. */
export function checkRequest(request: PlanRequest): {
  problem: PlanProblem;
  pinned: number;
  idle: Set<number>;
} {
  if (typeof request !== 'object' || request === null)
    refuse(`expected request: an object but received ${describeValue(request)}`, 'request');
  for (const name of Object.keys(request))
    if (!requestFields.includes(name))
      refuse(`unknown field '${name}'; the fields are: ${requestFields.join(', ')}`, name);
  const {
    loads,
    devices,
    slots,
    shared = 0,
    sharedPlacement = 'free',
    groups = 1,
    nodes = 1,
    depth = 4,
    seed = 1,
  } = request;
  const { maxMoves = Number.POSITIVE_INFINITY, maxMovesPerLayer = Number.POSITIVE_INFINITY } = request;
  check.instance('loads', loads, Loads);
  checkSizes(loads.experts, devices, slots);
  check.integer('shared', shared, 0);
  check.integer('seed', seed, 0);
  check.oneOf('sharedPlacement', sharedPlacement, ['free', 'everyDevice']);
  check.oneOf('degenerate', request.degenerate ?? 'reject', ['reject', 'keep']);
  if (request.policy !== undefined) policyNamed(request.policy);
  if (request.current !== undefined) check.instances('current', request.current, Placement);
  if (shared >= loads.experts)
    refuse(
      `expected shared to be less than the ${loads.experts} experts of the loads but received ${shared}`,
      'shared',
    );
  if (maxMoves !== Number.POSITIVE_INFINITY) check.integer('maxMoves', maxMoves, 0);
  if (maxMovesPerLayer !== Number.POSITIVE_INFINITY) check.integer('maxMovesPerLayer', maxMovesPerLayer, 0);
  check.integer('groups', groups, 1);
  check.integer('nodes', nodes, 1);
  check.integer('depth', depth, 1);
  if (devices % nodes !== 0)
    refuse(`expected devices to divide by ${nodes} nodes but received ${devices}`, 'nodes');
  if ((loads.experts - shared) % groups !== 0)
    refuse(
      `expected ${loads.experts - shared} routed experts to divide by groups but received ${groups}`,
      'groups',
    );
  const idle = new Set<number>();
  if (request.degenerate === 'keep') {
    for (let layer = 0; layer < loads.layers; layer++)
      if (loads.total(layer).filter((value) => value > 0).length < Math.min(2, loads.experts))
        idle.add(layer);
  } else checkPlannable(loads);
  const pinned = sharedPlacement === 'everyDevice' ? shared : 0;
  const routed = loads.experts - pinned;
  if (pinned > 0 && (slots - pinned < 1 || (slots - pinned) * devices < routed))
    refuse(
      `expected at least ${Math.ceil(routed / devices) + pinned} slots per device with ${pinned} shared experts on every device but received ${slots}`,
      'slots',
    );
  const current = request.current ?? startPlacements(loads.layers, loads.experts, devices, slots, pinned);
  if (current.length !== loads.layers)
    refuse(
      `expected a current placement for each of ${loads.layers} layers but received ${current.length}`,
      'current',
    );
  for (const [layer, placement] of current.entries())
    for (const [name, wanted] of [
      ['experts', loads.experts],
      ['devices', devices],
      ['slots', slots],
    ] as const)
      if (placement[name] !== wanted)
        refuse(
          `layer ${layer}: expected a current placement with ${wanted} ${name} but received ${placement[name]}`,
          'current',
        );
  const first = request.current === undefined && request.memory === undefined;
  const problem = {
    loads,
    devices,
    slots,
    current,
    first,
    shared,
    groups,
    nodes,
    depth,
    maxMoves,
    maxMovesPerLayer,
    movesAreFree:
      request.maxMoves === Number.POSITIVE_INFINITY && maxMovesPerLayer === Number.POSITIVE_INFINITY,
    seed,
    memory: request.memory,
  };
  return { problem, pinned, idle };
}

/** Runs one plan on the calling thread. `layerDone` is called after each layer and may throw to abandon the plan. */
export function planSync(request: PlanRequest, layerDone: () => void = () => {}): Plan {
  check.callback('layerDone', layerDone);
  const { problem, pinned, idle } = checkRequest(request);
  const policy = policyNamed(request.policy ?? defaultPolicy);
  const { loads, current } = problem;
  const legal = current.map((placement, layer) => withoutDoubles(placement, loads.total(layer)));
  const repaired = legal.some((placement, layer) => placement !== current[layer]);
  const usable = repaired ? { ...problem, current: legal } : problem;
  const reduced = pinned === 0 ? usable : withoutShared(usable, pinned);
  const start = performance.now();
  const result = policy.plan(reduced, layerDone);
  const ms = performance.now() - start;
  const wanted = result.placements.map((placement) => withShared(placement, pinned));
  const ordered = policy.ordersSlots === true && request.current === undefined;
  const aligned = wanted.map((placement, layer) => {
    if (idle.has(layer) || placement === legal[layer]) return current[layer]!;
    return ordered || placement === current[layer] ? placement : keepSlots(current[layer]!, placement);
  });
  const placements = policy.keepsBudget && pinned === 0 && !repaired ? aligned : fitBudget(problem, aligned);
  checkLegal(policy, problem, placements);
  const moves = movesPerLayer(current, placements);
  return {
    policy: policy.name,
    ms,
    placements,
    from: current,
    moves: moves.reduce((sum, value) => sum + value, 0),
    movesPerLayer: moves,
    layersTouched: moves.reduce((sum, value) => sum + (value > 0 ? 1 : 0), 0),
    par: { before: windowPar(loads, current), after: windowPar(loads, placements) },
    parStep: { before: stepPar(loads, current), after: stepPar(loads, placements) },
    memory: result.memory,
  };
}

/** The placement, or the nearest one without an expert twice on a device: maps of vLLM and SGLang may hold some. */
function withoutDoubles(placement: Placement, total: Float64Array): Placement {
  const rows = placement.toRows();
  if (rows.every((row) => new Set(row).size === row.length)) return placement;
  separateDoubles(
    rows,
    total.map((load, expert) => load / placement.replicaCount(expert)),
  );
  const separated = rows.every((row) => new Set(row).size === row.length);
  return separated
    ? Placement.fromRows(rows, { experts: placement.experts })
    : startPlacements(1, placement.experts, placement.devices, placement.slots)[0]!;
}

/** The problem of the routed experts alone, when every device keeps a replica of each shared expert. */
function withoutShared(problem: PlanProblem, pinned: number): PlanProblem {
  const { loads, slots, current } = problem;
  const routed = loads.experts - pinned;
  const counts = new Float64Array(loads.steps * loads.layers * routed);
  for (let row = 0; row < loads.steps * loads.layers; row++)
    counts.set(loads.counts.subarray(row * loads.experts, row * loads.experts + routed), row * routed);
  const start = startPlacements(1, routed, problem.devices, slots - pinned)[0]!;
  const rest = current.map((placement) => {
    const rows = placement.toRows().map((row) => row.filter((expert) => expert < routed));
    return rows.every((row) => row.length === slots - pinned)
      ? Placement.fromRows(rows, { experts: routed, duplicates: 'allow' })
      : start;
  });
  return {
    ...problem,
    loads: new Loads({ steps: loads.steps, layers: loads.layers, experts: routed }, counts),
    slots: slots - pinned,
    current: rest,
    shared: 0,
  };
}

function withShared(placement: Placement, pinned: number): Placement {
  if (pinned === 0) return placement;
  const ids = Array.from({ length: pinned }, (_, index) => placement.experts + index);
  return Placement.fromRows(
    placement.toRows().map((row) => [...row, ...ids]),
    { experts: placement.experts + pinned },
  );
}

/** Keeps the layers with the most PAR gained per move that fit the budget; the others stay as they are. */
function fitBudget(
  { loads, current, maxMoves, maxMovesPerLayer }: PlanProblem,
  placements: Placement[],
): Placement[] {
  if (maxMoves === Number.POSITIVE_INFINITY && maxMovesPerLayer === Number.POSITIVE_INFINITY)
    return placements;
  const candidates = placements.map((placement, layer) => {
    const moves = countMoves(current[layer]!, placement);
    const total = loads.total(layer);
    const gain =
      peakToAverage(deviceLoads(current[layer]!, total)) - peakToAverage(deviceLoads(placement, total));
    return { layer, moves, rate: gain / Math.max(1, moves) };
  });
  const result = [...current];
  let left = maxMoves;
  for (const { layer, moves } of candidates.sort(
    (one, two) => two.rate - one.rate || one.layer - two.layer,
  )) {
    if (moves > maxMovesPerLayer || moves > left) continue;
    left -= moves;
    result[layer] = placements[layer]!;
  }
  return result;
}

function checkLegal(
  policy: Policy,
  { loads, devices, slots, current, maxMoves, maxMovesPerLayer }: PlanProblem,
  placements: readonly Placement[],
): void {
  const broken = (message: string): never => {
    throw new MoeError('ERR_MOE_INTERNAL', `policy ${policy.name}: ${message}`, { op: 'plan' });
  };
  if (placements.length !== loads.layers)
    broken(`expected ${loads.layers} layers but received ${placements.length}`);
  let total = 0;
  for (const [layer, placement] of placements.entries()) {
    if (placement.experts !== loads.experts || placement.devices !== devices || placement.slots !== slots)
      broken(`layer ${layer} has the wrong shape`);
    const moves = countMoves(current[layer]!, placement);
    total += moves;
    if (moves > maxMovesPerLayer)
      broken(`layer ${layer} moves ${moves} experts, more than ${maxMovesPerLayer}`);
    if (placement === current[layer]) continue;
    for (let device = 0; device < devices; device++)
      if (new Set(placement.expertsOn(device)).size !== slots)
        broken(`layer ${layer} holds an expert twice on device ${device}`);
  }
  if (total > maxMoves) broken(`the plan moves ${total} experts, more than ${maxMoves}`);
}
