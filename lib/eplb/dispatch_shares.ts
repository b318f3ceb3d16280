// How to split each expert's tokens over its replicas so that devices are loaded alike under a given placement: the
// linear program of DeepSeek's LPLB and SGLang's lp dispatch, solved without an LP solver. Minimising the sum of
// squared device loads over the splits also minimises the peak (the loads reachable by splitting form a base
// polytope, on which the least-squares point is lexicographically least), and the squares are minimised by filling
// one expert's tokens at a time to a common water level of its holders. Experts of two holders, which are most, go past
// that level: over-relaxation saves a third of the sweeps where load has to pass through many devices.
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

export interface DispatchSharesOptions {
  /** Stop when peak <= (1 + tolerance) x bound; default 1e-4. */
  tolerance?: number;
  /** Most passes over the replicated experts; default 200. */
  sweeps?: number;
}

/** How far beyond the common level an expert of two holders goes, as a factor: 1 would be to the level. */
const relaxation = 1.5;

/**
 * Who holds what, whatever the counts: built once for each placement. A device that holds an expert in several slots is
 * one holder of it.
 */
interface Holders {
  /** i32[experts + 1] and i32[holders]: the devices of every expert. */
  readonly offsets: Int32Array;
  readonly device: Int32Array;
  /** Slots of the expert on that device. */
  readonly slots: Int32Array;
  /** i32[experts]: slots on all devices. */
  readonly replicas: Int32Array;
  /** The experts of each device: i32[devices + 1] and i32[holders], as places in `device`, and the expert of a place. */
  readonly onOffsets: Int32Array;
  readonly on: Int32Array;
  readonly expertOf: Int32Array;
}

const known = new WeakMap<Placement, Holders>();

function holdersOf(placement: Placement): Holders {
  const built = known.get(placement);
  if (built !== undefined) return built;
  const { experts, devices } = placement;
  const offsets = new Int32Array(experts + 1);
  const replicas = new Int32Array(experts);
  const device: number[] = [];
  const slots: number[] = [];
  const expertOf: number[] = [];
  for (let expert = 0; expert < experts; expert++) {
    for (const physical of placement.replicasOf(expert)) {
      const at = placement.deviceOfPhysical(physical);
      replicas[expert]!++;
      if (device.length > offsets[expert]! && device.at(-1) === at) slots[slots.length - 1]!++;
      else {
        device.push(at);
        slots.push(1);
        expertOf.push(expert);
      }
    }
    offsets[expert + 1] = device.length;
  }
  const onOffsets = new Int32Array(devices + 1);
  for (const at of device) onOffsets[at + 1]!++;
  for (let at = 0; at < devices; at++) onOffsets[at + 1]! += onOffsets[at]!;
  const next = onOffsets.slice();
  const on = new Int32Array(device.length);
  for (const [place, at] of device.entries()) on[next[at]!++] = place;
  const holders: Holders = {
    offsets,
    device: Int32Array.from(device),
    slots: Int32Array.from(slots),
    replicas,
    onOffsets,
    on,
    expertOf: Int32Array.from(expertOf),
  };
  known.set(placement, holders);
  return holders;
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
  for (let expert = 0; expert < experts; expert++)
    if (!(counts[expert]! >= 0 && counts[expert]! < 2 ** 53))
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected a count from 0 to 2^53 for expert ${expert} but received ${counts[expert]}`,
        { op: 'dispatch_shares', arg: 'counts' },
      );

  // The even split
  const holders = holdersOf(placement);
  const { offsets, device, slots, replicas } = holders;
  let tokens = new Float64Array(device.length);
  const load = new Float64Array(devices);
  const split: number[] = [];
  for (let expert = 0; expert < experts; expert++) {
    const count = counts[expert]!;
    for (let place = offsets[expert]!; place < offsets[expert + 1]!; place++) {
      tokens[place] = (count * slots[place]!) / replicas[expert]!;
      load[device[place]!]! += tokens[place]!;
    }
    if (count > 0 && offsets[expert + 1]! - offsets[expert]! > 1) split.push(expert);
  }
  split.sort((left, right) => counts[right]! - counts[left]! || left - right);

  // Sweeps, of which the best is kept: beyond the level the peak may rise for a while
  let peak = highest(load);
  let bound = lowerBound(holders, counts, load, tokens);
  let best = peak;
  const bestTokens = tokens.slice();
  let sweep = 0;
  const order = new Int32Array(devices);
  while (sweep < sweeps && best > bound * (1 + tolerance)) {
    for (const expert of split) fill(holders, expert, counts[expert]!, tokens, load, order);
    sweep++;
    peak = highest(load);
    if (peak < best) {
      best = peak;
      bestTokens.set(tokens);
    }
    if (sweep % 4 === 0 || sweep === 1) bound = Math.max(bound, lowerBound(holders, counts, load, tokens));
  }
  tokens = bestTokens;

  load.fill(0);
  for (let place = 0; place < tokens.length; place++) load[device[place]!]! += tokens[place]!;
  const shares = new Float64Array(placement.physicalExperts);
  for (let expert = 0; expert < experts; expert++) {
    const count = counts[expert]!;
    let place = offsets[expert]!;
    for (const physical of placement.replicasOf(expert)) {
      if (placement.deviceOfPhysical(physical) !== device[place]) place++;
      shares[physical] = count > 0 ? tokens[place]! / count / slots[place]! : 1 / replicas[expert]!;
    }
  }
  peak = highest(load);
  return { shares, deviceLoads: load, peak, bound: Math.min(bound, peak), sweeps: sweep };
}

function highest(load: Float64Array): number {
  let most = 0;
  for (let device = 0; device < load.length; device++) if (load[device]! > most) most = load[device]!;
  return most;
}

/** Splits one expert's tokens so that the holders that get some end at one level, below all that get none. */
function fill(
  { offsets, device }: Holders,
  expert: number,
  count: number,
  tokens: Float64Array,
  load: Float64Array,
  order: Int32Array,
): void {
  const start = offsets[expert]!;
  const holders = offsets[expert + 1]! - start;
  if (holders === 2) {
    const [left, right] = [device[start]!, device[start + 1]!];
    const had = tokens[start]!;
    const wanted = had + (relaxation * (load[right]! - load[left]!)) / 2;
    const part = Math.min(count, Math.max(0, wanted));
    tokens[start] = part;
    tokens[start + 1] = count - part;
    load[left]! += part - had;
    load[right]! -= part - had;
    return;
  }
  for (let index = 0; index < holders; index++) {
    const place = start + index;
    const base = load[device[place]!]! - tokens[place]!;
    load[device[place]!] = base;
    let at = index;
    for (; at > 0 && load[device[order[at - 1]!]!]! > base; at--) order[at] = order[at - 1]!;
    order[at] = place;
  }
  let sum = count;
  let level = 0;
  for (let used = 0; used < holders; used++) {
    const base = load[device[order[used]!]!]!;
    if (used > 0 && level <= base) break;
    sum += base;
    level = sum / (used + 1);
  }
  for (let place = start; place < start + holders; place++) {
    const at = device[place]!;
    tokens[place] = Math.max(0, level - load[at]!);
    load[at]! += tokens[place]!;
  }
}

/**
 * Tokens that only a set of devices can take, over the size of the set. The sets tried are every single expert's
 * holders, every device alone, and what the hottest device can pass load to, on and on: if that is all as hot, nothing
 * can be better.
 */
function lowerBound(
  { offsets, device, onOffsets, on, expertOf }: Holders,
  counts: ArrayLike<number>,
  load: Float64Array,
  tokens: Float64Array,
): number {
  const devices = load.length;
  const experts = offsets.length - 1;
  let hottest = 0;
  for (let at = 1; at < devices; at++) if (load[at]! > load[hottest]!) hottest = at;
  const inside = new Uint8Array(devices);
  inside[hottest] = 1;
  const queue = [hottest];
  for (let head = 0; head < queue.length; head++)
    for (let index = onOffsets[queue[head]!]!; index < onOffsets[queue[head]! + 1]!; index++) {
      if (tokens[on[index]!]! <= 0) continue;
      const expert = expertOf[on[index]!]!;
      for (let place = offsets[expert]!; place < offsets[expert + 1]!; place++)
        if (inside[device[place]!] === 0) {
          inside[device[place]!] = 1;
          queue.push(device[place]!);
        }
    }
  let bound = 0;
  let total = 0;
  let captive = 0;
  const alone = new Float64Array(devices);
  for (let expert = 0; expert < experts; expert++) {
    const count = counts[expert]!;
    const [start, end] = [offsets[expert]!, offsets[expert + 1]!];
    let all = true;
    for (let place = start; place < end; place++) all = all && inside[device[place]!] === 1;
    if (all) captive += count;
    if (end - start === 1) alone[device[start]!]! += count;
    bound = Math.max(bound, count / (end - start));
    total += count;
  }
  return Math.max(bound, total / devices, captive / queue.length, highest(alone));
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
