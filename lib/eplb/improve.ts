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

/** The device to relieve: f64[experts] what its cost falls by, to first order, when a replica of an expert leaves. */
interface Hot {
  device: number;
  relief: Float64Array;
}

/**
 * The change with the largest gain per transfer among those that relieve the costliest device. Where none gains
 * `least`, as on a device that one hot expert fills, the next costliest devices are tried; undefined if none gains it.
 */
export function propose(state: LayerState, least: number): Proposal | undefined {
  const order = state.byCost();
  const coldestFirst = order.toReversed();
  const slope = new Float64Array(state.blocks);
  for (const device of order.slice(0, costliest)) {
    const best: Best = { change: undefined, rate: 0, transfers: 1 };
    const noiseSlope = state.slopeOf(device, slope);
    const relief = new Float64Array(state.experts);
    for (let expert = 0; expert < state.experts; expert++)
      relief[expert] = state.slopeFor(expert, slope, noiseSlope);
    const hot = { device, relief };
    const others = partnersOf(state, hot, coldestFirst);
    proposeExchange(state, hot, others, best);
    proposeReplica(state, hot, others, best);
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

function proposeExchange(
  state: LayerState,
  { device: hot, relief }: Hot,
  others: readonly number[],
  best: Best,
): void {
  const { slots, experts, rows, holds, cost, blocks } = state;
  const first = hot * slots;
  const slope = new Float64Array(blocks);
  const arrives = new Float64Array(slots);
  let most = 0;
  for (let slotA = first; slotA < first + slots; slotA++) most = Math.max(most, relief[rows[slotA]!]!);
  for (const other of others) {
    const noiseSlope = state.slopeOf(other, slope);
    const both = cost[hot]! + cost[other]!;
    let mostNet = 0;
    for (let index = 0; index < slots; index++) {
      const a = rows[first + index]!;
      arrives[index] = state.slopeFor(a, slope, noiseSlope);
      mostNet = Math.max(mostNet, relief[a]! - arrives[index]!);
    }
    for (let slotB = other * slots; slotB < (other + 1) * slots; slotB++) {
      const b = rows[slotB]!;
      if (most - relief[b]! <= best.rate * leastTransfers || holds[hot * experts + b]) continue;
      const leaves = state.slopeFor(b, slope, noiseSlope);
      if (mostNet - relief[b]! + leaves <= best.rate * leastTransfers) continue;
      for (let index = 0; index < slots; index++) {
        const a = rows[first + index]!;
        const bound = Math.min(cost[hot]!, relief[a]! - relief[b]!) - arrives[index]! + leaves;
        if (bound <= best.rate * leastTransfers || holds[other * experts + a]) continue;
        const transfers = Math.max(leastTransfers, state.transfers(hot, a, b) + state.transfers(other, b, a));
        if (bound <= best.rate * transfers) continue;
        const least =
          state.leastCost(hot, relief[b]! - relief[a]!) + state.leastCost(other, arrives[index]! - leaves);
        if (both - least <= best.rate * transfers) continue;
        const rate = (both - state.exchangeCost(hot, a, other, b)) / transfers;
        if (rate > best.rate) {
          best.rate = rate;
          best.transfers = transfers;
          best.change = { slotA: first + index, slotB, replaceBy: -1 };
        }
      }
    }
  }
}

/** A further replica of an expert of the hot device, in place of a replica of a less needed one elsewhere. */
function proposeReplica(
  state: LayerState,
  { device: hot }: Hot,
  others: readonly number[],
  best: Best,
): void {
  const { slots, devices, experts, rows, holds, replicas, meanShare, cost, blocks } = state;
  const { mean } = state.scenarios;
  const spare = others.map((device) => {
    const own: number[] = [];
    for (let slot = device * slots; slot < (device + 1) * slots; slot++)
      if (replicas[rows[slot]!]! > 1) own.push(slot);
    return own;
  });
  const slope = new Float64Array(blocks);
  const ripples = new Float64Array(experts).fill(Number.NaN);
  for (let slotA = hot * slots; slotA < (hot + 1) * slots; slotA++) {
    const a = rows[slotA]!;
    const count = replicas[a]!;
    if (count >= devices) continue;
    const relief = -rippleOf(state, a, 1);
    if (relief <= best.rate * leastTransfers) continue;
    const part = 1 / (count + 1);
    for (let partner = 0; partner < others.length; partner++) {
      const device = others[partner]!;
      if (spare[partner]!.length === 0 || holds[device * experts + a]) continue;
      const noiseSlope = state.slopeOf(device, slope);
      // The new share is smaller than today's by count / (count + 1), its noise by the square of that
      const arrives = (count * part) ** 2 * state.slopeFor(a, slope, noiseSlope);
      for (const slotB of spare[partner]!) {
        const old = rows[slotB]!;
        const oldCount = replicas[old]!;
        if (mean[old]! / (oldCount - 1) > meanShare[a]! * 1.5) continue;
        const transfers = Math.max(leastTransfers, state.transfers(device, old, a));
        const least = state.leastCost(device, arrives - state.slopeFor(old, slope, noiseSlope));
        if (relief + cost[device]! - least <= best.rate * transfers) continue;
        if (Number.isNaN(ripples[old])) ripples[old] = rippleOf(state, old, -1);
        // The ripple counts this device as a holder; it stops being one
        const up = 1 / (oldCount - 1) - 1 / oldCount;
        const upNoise = 1 / (oldCount - 1) ** 2 - 1 / oldCount ** 2;
        const here = state.costWith(device, old, up, upNoise, old, 0, 0);
        const after = state.costWith(device, old, -1 / oldCount, -1 / oldCount ** 2, a, part, part ** 2);
        const rate = (relief - ripples[old]! + here - after) / transfers;
        if (rate > best.rate) {
          best.rate = rate;
          best.transfers = transfers;
          best.change = { slotA: -1, slotB, replaceBy: a };
        }
      }
    }
  }
}

/** Change of cost on the devices that hold `expert` if it had `more` replicas more. */
function rippleOf(state: LayerState, expert: number, more: number): number {
  const { holds, experts, devices, cost } = state;
  const count = state.replicas[expert]!;
  const part = 1 / (count + more) - 1 / count;
  const noisePart = 1 / (count + more) ** 2 - 1 / count ** 2;
  let delta = 0;
  for (let device = 0, at = expert; device < devices; device++, at += experts)
    if (holds[at]) delta += state.costWith(device, expert, part, noisePart, expert, 0, 0) - cost[device]!;
  return delta;
}
