// How to split each expert's tokens over its replicas so that devices are loaded alike under a given placement: the
// linear program of DeepSeek's LPLB and SGLang's lp dispatch, solved without an LP solver. Minimising the sum of
// squared device loads over the splits also minimises the peak (the loads reachable by splitting form a base
// polytope, on which the least-squares point is lexicographically least), and the squares are minimised by filling
// one expert's tokens at a time to a common water level of its holders.
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { Placement } from '../placement/placement.js';

export interface DispatchShares {
  /** f64[physical]: the part of its expert's tokens that each replica takes; sums to 1 over an expert's replicas. */
  shares: Float64Array;
  /** f64[devices] under these shares. */
  deviceLoads: Float64Array;
  /** Highest device load, and a proven lower bound of it for any split. */
  peak: number;
  bound: number;
  sweeps: number;
}

const check = new Arguments('dispatch_shares');
const checkRounds = new Arguments('dispatch_rounds');

export interface DispatchSharesOptions {
  /** Stop when peak <= (1 + tolerance) x bound; default 1e-4. */
  tolerance?: number;
  /** Most passes over the replicated experts; default 200. */
  sweeps?: number;
}

/**
 * Shares for the counts [experts] of one step or window; a BigInt64Array is what `load` of `moeFusedGate` reads as.
 * Throws ERR_MOE_INVALID_ARG for counts of the wrong length, NaN, negative or infinite ones.
 */
export function dispatchShares(
  placement: Placement,
  given: ArrayLike<number> | BigInt64Array,
  options: DispatchSharesOptions = {},
): DispatchShares {
  const { experts, devices } = check.instance('placement', placement, Placement);
  const { tolerance = 1e-4, sweeps = 200 } = check.object('options', options, ['tolerance', 'sweeps']);
  check.number('tolerance', tolerance, 0);
  check.integer('sweeps', sweeps, 0);
  check.numbers('counts', given);
  const counts =
    given instanceof Float64Array ? given : Float64Array.from(given as ArrayLike<number>, Number);
  if (counts.length !== experts)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected counts of ${experts} experts but received ${counts.length}`,
      { op: 'dispatch_shares', arg: 'counts' },
    );
  const wrong = counts.findIndex((count) => !(count >= 0 && count < 2 ** 53));
  if (wrong >= 0)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected a count from 0 to 2^53 for expert ${wrong} but received ${counts[wrong]}`,
      { op: 'dispatch_shares', arg: 'counts' },
    );
  const tokens = new Float64Array(placement.physicalExperts);
  const load = new Float64Array(devices);
  const replicated: { physical: Int32Array; device: Int32Array; count: number }[] = [];
  for (let expert = 0; expert < experts; expert++) {
    const physical = placement.replicasOf(expert);
    const count = counts[expert]!;
    for (const id of physical) {
      tokens[id] = count / physical.length;
      load[placement.deviceOfPhysical(id)]! += tokens[id]!;
    }
    if (physical.length > 1 && count > 0)
      replicated.push({
        physical,
        device: Int32Array.from(physical, (id) => placement.deviceOfPhysical(id)),
        count,
      });
  }
  replicated.sort((left, right) => right.count - left.count);

  let sweep = 0;
  let bound = lowerBound(placement, counts, load, tokens);
  while (sweep < sweeps && Math.max(...load) > bound * (1 + tolerance)) {
    for (const { physical, device, count } of replicated) fill(physical, device, count, tokens, load);
    sweep++;
    if (sweep % 4 === 0 || sweep === 1) bound = Math.max(bound, lowerBound(placement, counts, load, tokens));
  }
  const shares = new Float64Array(tokens.length);
  for (let physical = 0; physical < tokens.length; physical++) {
    const expert = placement.physicalToLogical[physical]!;
    shares[physical] =
      counts[expert]! > 0 ? tokens[physical]! / counts[expert]! : 1 / placement.replicaCount(expert);
  }
  return {
    shares,
    deviceLoads: load,
    peak: Math.max(...load),
    bound: Math.min(bound, Math.max(...load)),
    sweeps: sweep,
  };
}

/** Splits one expert's tokens so that the holders that get some end at one level, below all that get none. */
function fill(
  physical: Int32Array,
  device: Int32Array,
  count: number,
  tokens: Float64Array,
  load: Float64Array,
): void {
  const holders = physical.length;
  for (let index = 0; index < holders; index++) load[device[index]!]! -= tokens[physical[index]!]!;
  const order = Array.from(device.keys()).sort(
    (left, right) => load[device[left]!]! - load[device[right]!]! || left - right,
  );
  let sum = count;
  let level = 0;
  for (let used = 0; used < holders; used++) {
    const base = load[device[order[used]!]!]!;
    if (used > 0 && level <= base) break;
    sum += base;
    level = sum / (used + 1);
  }
  for (let index = 0; index < holders; index++) {
    const at = device[index]!;
    const part = Math.max(0, level - load[at]!);
    tokens[physical[index]!] = part;
    load[at]! += part;
  }
}

/**
 * Tokens that only a set of devices can take, over the size of the set. The sets tried are those that the hottest
 * device cannot pass load out of: itself, then with every device its experts also live on while those are hotter.
 */
function lowerBound(
  placement: Placement,
  counts: ArrayLike<number>,
  load: Float64Array,
  tokens: Float64Array,
): number {
  const { experts, devices } = placement;
  const total = load.reduce((sum, value) => sum + value, 0);
  const hottest = load.indexOf(Math.max(...load));
  const inside = new Uint8Array(devices);
  inside[hottest] = 1;
  const queue = [hottest];
  for (let head = 0; head < queue.length; head++)
    for (const expert of placement.expertsOn(queue[head]!)) {
      const replicas = placement.replicasOf(expert);
      const sends = replicas.some((id) => placement.deviceOfPhysical(id) === queue[head] && tokens[id]! > 0);
      if (!sends) continue;
      for (const id of replicas) {
        const device = placement.deviceOfPhysical(id);
        if (inside[device] === 0) {
          inside[device] = 1;
          queue.push(device);
        }
      }
    }
  let bound = total / devices;
  let captive = 0;
  for (let expert = 0; expert < experts; expert++) {
    let all = true;
    for (const id of placement.replicasOf(expert)) all = all && inside[placement.deviceOfPhysical(id)] === 1;
    if (all) captive += counts[expert]!;
  }
  bound = Math.max(bound, captive / queue.length);
  for (let expert = 0; expert < experts; expert++)
    bound = Math.max(bound, counts[expert]! / placement.replicaCount(expert));
  for (let device = 0; device < devices; device++) {
    let alone = 0;
    for (const expert of placement.expertsOn(device))
      if (placement.replicaCount(expert) === 1) alone += counts[expert]!;
    bound = Math.max(bound, alone);
  }
  return bound;
}

const checkLength = (arg: string, { length }: ArrayLike<number>, wanted: number): void => {
  if (length !== wanted)
    throw new MoeError('ERR_MOE_INVALID_ARG', `expected ${wanted} ${arg} but received ${length}`, {
      op: 'dispatch_shares',
      arg,
    });
};

/** f64[devices]: device loads when counts are split by given shares. */
export function sharedDeviceLoads(
  placement: Placement,
  shares: Float64Array,
  counts: ArrayLike<number>,
): Float64Array {
  check.instance('placement', placement, Placement);
  check.instance('shares', shares, Float64Array);
  checkLength('shares', shares, placement.physicalExperts);
  checkLength('counts', check.numbers('counts', counts), placement.experts);
  const load = new Float64Array(placement.devices);
  for (let physical = 0; physical < shares.length; physical++)
    load[placement.deviceOfPhysical(physical)]! +=
      shares[physical]! * counts[placement.physicalToLogical[physical]!]!;
  return load;
}

/** Shares of another placement would send tokens to slots of other experts. */
function checkShares(placement: Placement, shares: Float64Array): void {
  const refuse = (message: string): never => {
    throw new MoeError('ERR_MOE_INVALID_ARG', message, { op: 'dispatch_rounds', arg: 'shares' });
  };
  if (checkRounds.numbers('shares', shares).length !== placement.physicalExperts)
    refuse(`expected shares of ${placement.physicalExperts} physical experts but received ${shares.length}`);
  for (let expert = 0; expert < placement.experts; expert++) {
    let sum = 0;
    for (const id of placement.replicasOf(expert)) sum += shares[id]! >= 0 ? shares[id]! : Number.NaN;
    if (!(Math.abs(sum - 1) < 1e-6))
      refuse(`expected shares >= 0 that sum to 1 for expert ${expert} but received a sum of ${sum}`);
  }
}

/**
 * i32[rounds * experts]: the dispatch table idMap of one source rank; token t uses row t mod rounds. Every replica
 * gets the rounds nearest to its share (largest remainders), spread evenly over the table; the replica on the rank
 * itself takes the first of its rounds before the others, and ranks start the others at different places.
 */
export function dispatchRounds(
  placement: Placement,
  shares: Float64Array,
  rank: number,
  rounds: number,
): Int32Array {
  checkRounds.instance('placement', placement, Placement);
  checkRounds.integer('rounds', rounds, 1, 2 ** 31 - 1);
  checkRounds.integer('rank', rank, 0, placement.devices - 1);
  checkShares(placement, shares);
  const { experts } = placement;
  const map = new Int32Array(rounds * experts);
  for (let expert = 0; expert < experts; expert++) {
    const replicas = Array.from(placement.replicasOf(expert));
    const home = replicas.findIndex((id) => placement.deviceOfPhysical(id) === rank);
    const turn = replicas.map((_, index) => replicas[(index + (home >= 0 ? home : rank)) % replicas.length]!);
    const exact = turn.map((id) => shares[id]! * rounds);
    const given = exact.map(Math.floor);
    const missing = rounds - given.reduce((sum, value) => sum + value, 0);
    const byRemainder = exact
      .map((_, index) => index)
      .sort((left, right) => exact[right]! - given[right]! - (exact[left]! - given[left]!) || left - right);
    for (const index of byRemainder.slice(0, missing)) given[index]!++;
    // Evenly spread: the replica furthest behind its share is next
    const done = given.map(() => 0);
    for (let round = 0; round < rounds; round++) {
      let next = -1;
      let furthest = Number.NEGATIVE_INFINITY;
      for (let index = 0; index < turn.length; index++) {
        if (done[index]! >= given[index]!) continue;
        const behind =
          (given[index]! * (round + 1)) / rounds -
          done[index]! +
          (round === 0 && index === 0 && home >= 0 ? 1 : 0);
        if (behind > furthest + 1e-12) {
          furthest = behind;
          next = index;
        }
      }
      done[next]!++;
      map[round * experts + expert] = turn[next]!;
    }
  }
  return map;
}
