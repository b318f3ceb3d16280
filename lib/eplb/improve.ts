// Which single change gains most per expert moved: an exchange between the hottest device and one of the coldest, or
// a further replica of one of its experts in place of a less needed one there. The cost is convex, so its slope
// bounds what a change can gain; only changes whose bound beats the best so far are worked out.
import type { Change, LayerState } from './layer_state.js';

/** How many of the coldest devices are looked at as partners of the hottest. */
const coldest = 12;
/** How many of the costliest devices are tried. */
const costliest = 4;

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

/**
 * The change with the largest gain per transfer among those that relieve the costliest device. Where none gains
 * `least`, as on a device that one hot expert fills, the next costliest devices are tried; undefined if none gains it.
 */
export function propose(state: LayerState, least: number): Proposal | undefined {
  const order = state.byCost();
  const partners = order.slice(-Math.min(coldest, state.devices - 1)).reverse();
  for (const hot of order.slice(0, costliest)) {
    const best: Best = { change: undefined, rate: 0, transfers: 1 };
    const others = partners.filter((device) => device !== hot);
    proposeExchange(state, hot, others, best);
    proposeReplica(state, hot, others, best);
    const gain = state.gainOf(best.rate * best.transfers) / best.transfers;
    if (best.change !== undefined && gain >= least) return { change: best.change, gain };
  }
  return undefined;
}

function proposeExchange(state: LayerState, hot: number, partners: readonly number[], best: Best): void {
  const { slots, experts, rows, holds, cost, blocks } = state;
  const first = hot * slots;
  const slope = new Float64Array(blocks);
  const otherSlope = new Float64Array(blocks);
  const hotSlope = new Float64Array(slots);
  const partnerSlope = new Float64Array(slots);
  const noiseHot = state.slopeOf(hot, slope);
  for (let index = 0; index < slots; index++)
    hotSlope[index] = state.slopeFor(rows[first + index]!, slope, noiseHot);
  for (const other of partners) {
    const noiseOther = state.slopeOf(other, otherSlope);
    const both = cost[hot]! + cost[other]!;
    for (let index = 0; index < slots; index++)
      partnerSlope[index] = state.slopeFor(rows[first + index]!, otherSlope, noiseOther);
    for (let slotB = other * slots; slotB < (other + 1) * slots; slotB++) {
      const b = rows[slotB]!;
      if (holds[hot * experts + b]) continue;
      const leavesHot = state.slopeFor(b, slope, noiseHot);
      const leavesOther = state.slopeFor(b, otherSlope, noiseOther);
      for (let index = 0; index < slots; index++) {
        const bound = Math.min(cost[hot]!, hotSlope[index]! - leavesHot) - partnerSlope[index]! + leavesOther;
        if (bound <= best.rate * 0.5) continue;
        const a = rows[first + index]!;
        if (holds[other * experts + a]) continue;
        const transfers = Math.max(0.5, state.transfers(hot, a, b) + state.transfers(other, b, a));
        if (bound <= best.rate * transfers) continue;
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

/** A further replica of an expert of the hot device, in place of a replica of a less needed one on a partner. */
function proposeReplica(state: LayerState, hot: number, partners: readonly number[], best: Best): void {
  const { slots, devices, experts, rows, holds, replicas, meanShare } = state;
  const { mean } = state.scenarios;
  const ripples = new Map<number, number>();
  for (let slotA = hot * slots; slotA < (hot + 1) * slots; slotA++) {
    const a = rows[slotA]!;
    const count = replicas[a]!;
    if (count >= devices) continue;
    const relief = rippleOf(state, a, 1);
    if (-relief <= best.rate * 0.5) continue;
    for (const device of partners) {
      if (holds[device * experts + a]) continue;
      for (let slotB = device * slots; slotB < (device + 1) * slots; slotB++) {
        const old = rows[slotB]!;
        const oldCount = replicas[old]!;
        if (oldCount < 2 || mean[old]! / (oldCount - 1) > meanShare[a]! * 1.5) continue;
        const transfers = Math.max(0.5, state.transfers(device, old, a));
        if (-relief <= best.rate * transfers) continue;
        let ripple = ripples.get(old);
        if (ripple === undefined) {
          ripple = rippleOf(state, old, -1);
          ripples.set(old, ripple);
        }
        // `ripple` counts this device as a holder; it stops being one
        const up = 1 / (oldCount - 1) - 1 / oldCount;
        const upNoise = 1 / (oldCount - 1) ** 2 - 1 / oldCount ** 2;
        const here = state.costWith(device, old, up, upNoise, old, 0, 0);
        const after = state.costWith(
          device,
          old,
          -1 / oldCount,
          -1 / oldCount ** 2,
          a,
          1 / (count + 1),
          1 / (count + 1) ** 2,
        );
        const rate = -(relief + ripple - here + after) / transfers;
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
