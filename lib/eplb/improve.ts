// Which single change gains most per expert moved: an exchange between one of the costliest devices and any other, or
// a further replica of one of its experts in place of a less needed one elsewhere. The cost is convex, so its slope
// bounds what a change can gain; only changes whose bound beats the best so far are worked out.
import type { Change, LayerState } from './layer_state.js';

/** How many of the costliest devices are tried. */
const costliest = 8;
/** Partners of a costly device: so many of the coldest devices, and so many that hold the lightest experts. */
const coldest = 8;
const lightest = 8;
/** A change counts as at least this part of a transfer: changes that need none are near free, not infinitely good. */
const leastTransfers = 0.5;

export interface Proposal {
  change: Change;
  /** Gain per transfer, in units of the state's value (of PAR). */
  gain: number;
}

/** The best change so far: what costs fall by per transfer, and the transfers. */
interface Best {
  change: Change | undefined;
  rate: number;
  transfers: number;
}

/** The device to relieve. */
interface Hot {
  device: number;
  /** f64[experts]: what its cost falls by, to first order, when a replica of an expert leaves. */
  relief: Float64Array;
  /** f64[slots]: that of the experts in its slots. */
  leaves: Float64Array;
  /** f64[slots]: what costs fall by, on all that hold the expert in a slot, when it gets one more replica elsewhere. */
  shared: Float64Array;
}

/** Memory that proposals share. */
interface Scratch {
  /** f64[blocks]: slopes of the partner's cost. */
  slope: Float64Array;
  /**
   * f64[slots]: what the partner's cost rises by, to first order, when the expert in a slot of the hot device comes,
   * and the transfers that its coming and leaving add. Infinite where the partner holds it.
   */
  arrives: Float64Array;
  transfers: Float64Array;
  /** f64[experts]: what costs rise by on all that hold an expert when it loses a replica; NaN where not worked out. */
  ripples: Float64Array;
}

/**
 * The change with the largest gain per transfer among those that relieve the costliest device. Where none gains
 * `least`, as on a device that one hot expert fills, the next costliest devices are tried; undefined if none gains it.
 */
export function propose(state: LayerState, least: number): Proposal | undefined {
  const { experts, devices, slots, rows, replicas, blocks } = state;
  const order = state.byCost();
  const coldestFirst = order.toReversed();
  const scratch: Scratch = {
    slope: new Float64Array(blocks),
    arrives: new Float64Array(slots),
    transfers: new Float64Array(slots),
    ripples: new Float64Array(experts).fill(Number.NaN),
  };
  const relief = new Float64Array(experts);
  const leaves = new Float64Array(slots);
  const shared = new Float64Array(slots);
  for (const device of order.slice(0, costliest)) {
    const best: Best = { change: undefined, rate: 0, transfers: 1 };
    const noiseSlope = state.slopeOf(device, scratch.slope);
    for (let expert = 0; expert < experts; expert++)
      relief[expert] = state.slopeFor(expert, scratch.slope, noiseSlope);
    for (let index = 0; index < slots; index++) {
      const expert = rows[device * slots + index]!;
      leaves[index] = relief[expert]!;
      shared[index] = replicas[expert]! < devices ? -state.ripple(expert, 1) : 0;
    }
    const hot = { device, relief, leaves, shared };
    for (const other of partnersOf(state, hot, coldestFirst)) tryPartner(state, hot, other, best, scratch);
    const gain = state.gainOf(best.rate * best.transfers) / best.transfers;
    if (best.change !== undefined && gain >= least) return { change: best.change, gain };
  }
  return undefined;
}

/** The coldest devices have most room; where one hot expert fills a device, what it needs is a lighter companion. */
function partnersOf(
  { rows, slots }: LayerState,
  { device, relief }: Hot,
  coldestFirst: readonly number[],
): number[] {
  const others = coldestFirst.filter((other) => other !== device);
  const lightestOn = (other: number): number => {
    let least = Number.POSITIVE_INFINITY;
    for (let slot = other * slots; slot < (other + 1) * slots; slot++)
      least = Math.min(least, relief[rows[slot]!]!);
    return least;
  };
  const rest = others.slice(coldest).map((other) => ({ other, least: lightestOn(other) }));
  rest.sort((one, two) => one.least - two.least || one.other - two.other);
  return [...others.slice(0, coldest), ...rest.slice(0, lightest).map(({ other }) => other)];
}

/**
 * What the hot device can do with another one: exchange two experts, or have a further replica of one of its experts
 * there, in place of a less needed one.
 */
function tryPartner(
  state: LayerState,
  { device: hot, relief, leaves, shared }: Hot,
  other: number,
  best: Best,
  { slope, arrives, transfers, ripples }: Scratch,
): void {
  const { slots, experts, rows, holds, replicas, meanShare, cost } = state;
  const { mean } = state.scenarios;
  const first = hot * slots;
  const noiseSlope = state.slopeOf(other, slope);
  const costHot = cost[hot]!;
  const costOther = cost[other]!;
  let mostNet = 0;
  let mostShared = 0;
  for (let index = 0; index < slots; index++) {
    const a = rows[first + index]!;
    arrives[index] = Number.POSITIVE_INFINITY;
    if (holds[other * experts + a]) continue;
    arrives[index] = state.slopeFor(a, slope, noiseSlope);
    transfers[index] = state.isNew(other, a) - state.isNew(hot, a);
    mostNet = Math.max(mostNet, leaves[index]! - arrives[index]!);
    mostShared = Math.max(mostShared, shared[index]!);
  }
  for (let slotB = other * slots; slotB < (other + 1) * slots; slotB++) {
    const b = rows[slotB]!;
    const comes = relief[b]!;
    const freed = state.slopeFor(b, slope, noiseSlope);
    if (!holds[hot * experts + b] && mostNet - comes + freed > best.rate * leastTransfers) {
      const back = state.isNew(hot, b) - state.isNew(other, b);
      for (let index = 0; index < slots; index++) {
        const moved = Math.max(leastTransfers, transfers[index]! + back);
        const enough = best.rate * moved;
        if (Math.min(costHot, leaves[index]! - comes) - arrives[index]! + freed <= enough) continue;
        const least =
          state.leastCost(hot, comes - leaves[index]!) + state.leastCost(other, arrives[index]! - freed);
        if (costHot + costOther - least <= enough) continue;
        const gain = costHot + costOther - state.exchangeCost(hot, rows[first + index]!, other, b);
        if (gain <= enough) continue;
        best.rate = gain / moved;
        best.transfers = moved;
        best.change = { slotA: first + index, slotB, replaceBy: -1 };
      }
    }
    const count = replicas[b]!;
    if (count === 1 || mostShared + freed <= best.rate * leastTransfers) continue;
    let lost = Number.NaN; // what the other replicas of b cost more
    for (let index = 0; index < slots; index++) {
      const a = rows[first + index]!;
      if (shared[index] === 0 || arrives[index] === Number.POSITIVE_INFINITY) continue;
      if (mean[b]! / (count - 1) > meanShare[a]! * 1.5) continue;
      const moved = Math.max(leastTransfers, state.isNew(other, a) - state.isNew(other, b));
      const enough = best.rate * moved;
      // The new share is smaller than today's by kept, its noise by the square of that
      const kept = replicas[a]! / (replicas[a]! + 1);
      const most = shared[index]! + costOther - state.leastCost(other, kept ** 2 * arrives[index]! - freed);
      if (most <= enough) continue;
      if (Number.isNaN(lost)) lost = lostBy(state, b, other, ripples);
      if (most - lost <= enough) continue;
      const part = 1 / (replicas[a]! + 1);
      const after = state.costWith(other, b, -1 / count, -1 / count ** 2, a, part, part ** 2);
      const gain = shared[index]! - lost + costOther - after;
      if (gain <= enough) continue;
      best.rate = gain / moved;
      best.transfers = moved;
      best.change = { slotA: -1, slotB, replaceBy: a };
    }
  }
}

/** What costs rise by on the other devices that hold `expert` when `device` gives up its replica. */
function lostBy(state: LayerState, expert: number, device: number, ripples: Float64Array): number {
  if (Number.isNaN(ripples[expert])) ripples[expert] = state.ripple(expert, -1);
  const count = state.replicas[expert]!;
  const part = 1 / (count - 1) - 1 / count;
  const noisePart = 1 / (count - 1) ** 2 - 1 / count ** 2;
  const here = state.costWith(device, expert, part, noisePart, expert, 0, 0);
  return ripples[expert]! - (here - state.cost[device]!);
}
