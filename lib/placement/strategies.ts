// The layouts a model starts with, before any load is known. Each is a pure function of sizes; the loader and the
// maps must both come from its result. Formulas: vLLM determine_expert_map (linear, round_robin) and vllm-ascend
// generate_global_placement (redundant, mixed).
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { Placement } from './placement.js';

/** More experts than any model has: beyond it is a mistake, not a layout. */
const mostExperts = 2 ** 24;

const count = (op: string, arg: string, value: number, least: number): void => {
  new Arguments(op).integer(arg, value, least, mostExperts);
};

const sizes = (op: string, experts: number, devices: number): void => {
  count(op, 'experts', experts, 1);
  count(op, 'devices', devices, 1);
  if (devices > experts)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected at most ${experts} devices for ${experts} experts but received ${devices}`,
      { op, arg: 'devices' },
    );
};

/** Consecutive runs; a remainder goes to the first devices: 10 experts on 4 devices are {0,1,2},{3,4,5},{6,7},{8,9}. */
export function linearPlacement(experts: number, devices: number): Placement {
  sizes('linear_placement', experts, devices);
  const base = Math.floor(experts / devices);
  const remainder = experts % devices;
  const rows = Array.from({ length: devices }, (_, device) => {
    const start = device * base + Math.min(device, remainder);
    return Array.from({ length: base + (device < remainder ? 1 : 0) }, (_, slot) => start + slot);
  });
  return Placement.fromRows(rows, { experts, slots: 'ragged' });
}

export interface RoundRobinModel {
  /** Expert groups of the router (n_group); round-robin spreads each group over all devices. */
  groups: number;
  /** Redundant experts asked for. */
  redundant?: number;
  /** True if a planner will move experts at run time. */
  rebalancing?: boolean;
  /** True if the all-to-all backend takes a routing table from global to physical ids, or none is used. */
  routingTables?: boolean;
}

/**
 * Device r owns r, r + devices, ... ("zigzag"): 10 experts on 4 devices are {0,4,8},{1,5,9},{2,6},{3,7}.
 * With `model` given, throws ERR_MOE_UNSUPPORTED, one message per rule, where vLLM would fall back to linear: no
 * expert groups, redundant experts, rebalancing on, or an all-to-all backend that computes the owner from the id.
 */
export function roundRobinPlacement(experts: number, devices: number, model?: RoundRobinModel): Placement {
  sizes('round_robin_placement', experts, devices);
  if (model !== undefined) checkRoundRobin(model);
  const rows = Array.from({ length: devices }, (_, device) => {
    const local = Math.floor(experts / devices) + (device < experts % devices ? 1 : 0);
    return Array.from({ length: local }, (_, slot) => device + slot * devices);
  });
  return Placement.fromRows(rows, { experts, slots: 'ragged' });
}

const roundRobin = new Arguments('round_robin_placement');

/** Throws ERR_MOE_UNSUPPORTED with the rule that forbids round-robin placement for this model, if one does. */
export function checkRoundRobin(model: RoundRobinModel): void {
  const {
    groups,
    redundant = 0,
    rebalancing = false,
    routingTables = true,
  } = roundRobin.object('model', model, ['groups', 'redundant', 'rebalancing', 'routingTables']);
  roundRobin.flag('rebalancing', rebalancing);
  roundRobin.flag('routingTables', routingTables);
  const refuse = (arg: string, message: string): never => {
    throw new MoeError('ERR_MOE_UNSUPPORTED', `${message}; use the linear placement`, {
      op: 'round_robin_placement',
      arg,
    });
  };
  count('round_robin_placement', 'groups', groups, 1);
  count('round_robin_placement', 'redundant', redundant, 0);
  if (groups === 1) refuse('groups', 'expected more than one expert group but received groups = 1');
  if (redundant > 0)
    refuse('redundant', `expected no redundant experts but received redundant = ${redundant}`);
  if (rebalancing) refuse('rebalancing', 'expected rebalancing to be off but received rebalancing = true');
  if (!routingTables)
    refuse(
      'routingTables',
      'expected an all-to-all backend with routing tables but received routingTables = false',
    );
}

/**
 * The flat list [0..experts-1, then redundant copies 0,1,... in turn] cut into equal devices: the start layout of
 * vLLM and vllm-ascend. Throws ERR_MOE_INVALID_ARG unless experts + redundant divides by devices and no device
 * would have to hold an expert twice.
 */
export function redundantPlacement(experts: number, devices: number, redundant: number): Placement {
  const op = 'redundant_placement';
  count(op, 'experts', experts, 1);
  count(op, 'devices', devices, 1);
  count(op, 'redundant', redundant, 0);
  const physical = experts + redundant;
  if (physical % devices !== 0)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected experts + redundant (${experts} + ${redundant}) to divide by ${devices} devices but received ${physical}`,
      { op, arg: 'redundant' },
    );
  if (physical / devices > experts)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected at most ${experts} slots per device (one replica of each expert) but received ${physical / devices}`,
      { op, arg: 'redundant' },
    );
  const flat = Int32Array.from({ length: physical }, (_, slot) =>
    slot < experts ? slot : (slot - experts) % experts,
  );
  return Placement.fromPhysical(flat, devices, { experts });
}

export interface MixedOptions {
  /** Routed experts, ids 0..routed-1. */
  routed: number;
  /** Shared experts, ids routed..routed+shared-1. 0 gives exactly the standard placement. */
  shared: number;
  devices: number;
  /** Redundant copies of routed experts. */
  redundant?: number;
  /**
   * 'everyDevice' (default): every device ends with a copy of every shared expert, so that a token finds all of
   * them at home. 'onePerDevice': device r ends with the shared expert r mod shared (vllm-ascend's layout).
   */
  copies?: 'everyDevice' | 'onePerDevice';
}

/**
 * Mixed placement ("Top9"): shared experts as ids after the routed ones, in the last slots of every device; 256 + 1
 * experts on 32 devices give 9 slots each. Routed experts are split into consecutive runs; redundant copy i goes to
 * the device i-th from the end and continues its run. Golden: 8 routed, 4 devices, 4 redundant, 1 shared =>
 * [[0,1,2,8],[2,3,4,8],[4,5,6,8],[6,7,0,8]].
 */
export function mixedPlacement(options: MixedOptions): Placement {
  const op = 'mixed_placement';
  const known = ['routed', 'shared', 'devices', 'redundant', 'copies'];
  const check = new Arguments(op);
  const {
    routed,
    shared,
    devices,
    redundant = 0,
    copies = 'everyDevice',
  } = check.object('options', options, known);
  check.oneOf('copies', copies, ['everyDevice', 'onePerDevice']);
  count(op, 'shared', shared, 0);
  if (shared === 0) return redundantPlacement(routed, devices, redundant);
  sizes(op, routed, devices);
  count(op, 'redundant', redundant, 0);
  if ((routed + redundant) % devices !== 0)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected routed + redundant (${routed} + ${redundant}) to divide by ${devices} devices but received ${routed + redundant}`,
      { op, arg: 'redundant' },
    );
  if (copies === 'onePerDevice' && shared > devices)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected at most ${devices} shared experts with one per device but received ${shared}`,
      { op, arg: 'shared' },
    );
  const rows = linearPlacement(routed, devices).toRows();
  for (let copy = 0; copy < redundant; copy++) {
    const row = rows[devices - 1 - (copy % devices)]!;
    row.push((row.at(-1)! + 1) % routed);
  }
  for (const [device, row] of rows.entries()) {
    if (copies === 'onePerDevice') row.push(routed + (device % shared));
    else for (let id = 0; id < shared; id++) row.push(routed + id);
  }
  return Placement.fromRows(rows, { experts: routed + shared, where: 'mixed placement' });
}

/** The layouts that need no load, by the name the command line and configuration files use. */
export const placementStrategies = {
  linear: linearPlacement,
  round_robin: roundRobinPlacement,
  redundant: redundantPlacement,
  mixed: mixedPlacement,
} as const;
