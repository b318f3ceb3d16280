// The local search of one layer. State: rows of experts, and per device the load in every scenario, the noise
// variance and the window's load, all kept up to date by the two changes there are: exchanging two experts, and
// replacing a replica of one expert by a replica of another.
//
// Objective: sum over devices of sum over scenarios of weight x (load + p/2 x noise variance)^p, p = 2^squarings.
// Its p-th root is close to the expected peak of a step: like a soft maximum it looks at the hottest devices, and p
// is chosen so that an imbalance that drowns in the noise of a step counts for little (scale sqrt(2 ln D) / noise).
// Invariants: no expert twice on a device, at least one replica each, at most one per device.
import { uniform } from './random.js';
import type { Scenarios } from './scenario.js';

/** Exchange of the experts in two slots, or (replaceBy >= 0) a replica of `replaceBy` for the one in slotB. */
export interface Change {
  slotA: number;
  slotB: number;
  replaceBy: number;
}

/** Standard errors beyond which an imbalance is no chance; searches on noise reach 2.9. */
const surely = 3.2;

/** How many of the coldest devices are looked at as partners of the hottest. */
const coldest = 12;

export class LayerSearch {
  readonly experts: number;
  readonly devices: number;
  readonly slots: number;
  readonly blocks: number;
  /** i32[devices * slots]. */
  readonly rows: Int32Array;
  readonly replicas: Int32Array;
  readonly #scenarios: Scenarios;
  /** u8[devices * experts]: which device holds what, now and before the search. */
  readonly #holds: Uint8Array;
  readonly #before: Uint8Array;
  /** Load of one replica: per scenario, its mean, its window load; and its noise variance. */
  readonly #share: Float64Array;
  readonly #meanShare: Float64Array;
  readonly #windowShare: Float64Array;
  readonly #noiseShare: Float64Array;
  readonly #load: Float64Array;
  readonly #noise: Float64Array;
  readonly #mean: Float64Array;
  readonly #window: Float64Array;
  readonly #cost: Float64Array;
  #squarings = 5;
  #lift = 16;
  #noiseGain = 0;
  #moves = 0;
  #total = 0;
  #slotA = -1;
  #slotB = -1;
  #replaceBy = -1;
  #rate = 0;
  #transfersOfBest = 1;
  readonly #slope: Float64Array;
  readonly #otherSlope: Float64Array;
  readonly #hotSlope: Float64Array;
  readonly #partnerSlope: Float64Array;

  constructor(scenarios: Scenarios, devices: number, slots: number) {
    const { experts, blocks } = scenarios;
    this.experts = experts;
    this.devices = devices;
    this.slots = slots;
    this.blocks = blocks;
    this.rows = new Int32Array(devices * slots);
    this.replicas = new Int32Array(experts);
    this.#scenarios = scenarios;
    this.#holds = new Uint8Array(devices * experts);
    this.#before = new Uint8Array(devices * experts);
    this.#share = new Float64Array(experts * blocks);
    this.#meanShare = new Float64Array(experts);
    this.#windowShare = new Float64Array(experts);
    this.#noiseShare = new Float64Array(experts);
    this.#load = new Float64Array(devices * blocks);
    this.#noise = new Float64Array(devices);
    this.#mean = new Float64Array(devices);
    this.#window = new Float64Array(devices);
    this.#cost = new Float64Array(devices);
    this.#slope = new Float64Array(blocks);
    this.#otherSlope = new Float64Array(blocks);
    this.#hotSlope = new Float64Array(slots);
    this.#partnerSlope = new Float64Array(slots);
  }

  /** Starts from rows (i32[devices * slots]); moves are counted from `before`. */
  start(rows: ArrayLike<number>, before: ArrayLike<number> = rows): void {
    const { experts, devices, slots } = this;
    this.rows.set(rows);
    this.replicas.fill(0);
    this.#holds.fill(0);
    this.#before.fill(0);
    for (let device = 0; device < devices; device++)
      for (let slot = device * slots; slot < (device + 1) * slots; slot++) {
        this.replicas[rows[slot]!]!++;
        this.#holds[device * experts + rows[slot]!] = 1;
        this.#before[device * experts + before[slot]!] = 1;
      }
    this.#moves = 0;
    for (let index = 0; index < this.#holds.length; index++)
      if (this.#holds[index]! > this.#before[index]!) this.#moves++;
    for (let expert = 0; expert < experts; expert++) this.#setShare(expert);
    this.#recompute();
    const noise = this.#noise.reduce((sum, value) => sum + value, 0) / devices;
    let spread = 0;
    for (let device = 0; device < devices; device++)
      for (let block = 0; block < this.blocks; block++)
        spread +=
          (this.#scenarios.weights[block]! *
            (this.#load[device * this.blocks + block]! - this.#mean[device]!) ** 2) /
          devices;
    const deviates = Math.sqrt(2 * Math.log(Math.max(2, devices)));
    const variance = noise + spread + 1e-9;
    const chance = surely ** 2 * noise * this.#scenarios.uncertainty;
    this.#noiseGain =
      deviates * Math.min(Math.sqrt(variance + chance) - Math.sqrt(variance), 0.375 * Math.sqrt(chance));
    const scale = deviates / Math.sqrt(variance);
    this.#squarings = Math.max(3, Math.min(6, Math.round(Math.log2(scale))));
    this.#lift = 2 ** this.#squarings / 2;
    this.#costs();
  }

  /** Expert weights to move from `before` to the rows now. */
  get moves(): number {
    return this.#moves;
  }

  /** The objective's p-th root: near the expected PAR of a step. */
  get value(): number {
    return this.#total ** (1 / 2 ** this.#squarings);
  }

  /**
   * What a search may gain, in units of `value`, by fitting nothing but the sampling noise of the mean: the difference
   * of the expected peaks sqrt(2 ln D) sd with and without an imbalance of `surely` standard errors of the mean.
   * Searches on pure noise stay below it (test/eplb/adaptive.test.ts measures that over sizes and batches).
   */
  get noiseGain(): number {
    return this.#noiseGain;
  }

  /** Highest window load over the mean device load. */
  get windowPeak(): number {
    let peak = 0;
    for (let device = 0; device < this.devices; device++) peak = Math.max(peak, this.#window[device]!);
    return peak;
  }

  #setShare(expert: number): void {
    const { loads, mean, window, noise } = this.#scenarios;
    const factor = 1 / this.replicas[expert]!;
    const row = expert * this.blocks;
    for (let block = 0; block < this.blocks; block++) this.#share[row + block] = loads[row + block]! * factor;
    this.#meanShare[expert] = mean[expert]! * factor;
    this.#windowShare[expert] = window[expert]! * factor;
    this.#noiseShare[expert] = noise[expert]! * factor * factor;
  }

  #recompute(): void {
    this.#load.fill(0);
    this.#noise.fill(0);
    this.#mean.fill(0);
    this.#window.fill(0);
    for (let device = 0; device < this.devices; device++)
      for (let slot = device * this.slots; slot < (device + 1) * this.slots; slot++)
        this.#add(device, this.rows[slot]!, 1);
  }

  #add(device: number, expert: number, sign: number): void {
    const from = expert * this.blocks;
    const to = device * this.blocks;
    for (let block = 0; block < this.blocks; block++)
      this.#load[to + block]! += sign * this.#share[from + block]!;
    this.#noise[device]! += sign * this.#noiseShare[expert]!;
    this.#mean[device]! += sign * this.#meanShare[expert]!;
    this.#window[device]! += sign * this.#windowShare[expert]!;
  }

  #costs(): void {
    this.#total = 0;
    for (let device = 0; device < this.devices; device++) {
      this.#cost[device] = this.#costOf(device);
      this.#total += this.#cost[device]!;
    }
  }

  #costOf(device: number): number {
    const { weights } = this.#scenarios;
    const shift = this.#lift * this.#noise[device]!;
    const row = device * this.blocks;
    const squarings = this.#squarings;
    let cost = 0;
    for (let block = 0; block < this.blocks; block++) {
      let value = this.#load[row + block]! + shift;
      for (let step = 0; step < squarings; step++) value *= value;
      cost += weights[block]! * value;
    }
    return cost;
  }

  /** Cost of both devices after a (on one) and b (on two) change places. */
  #exchangeCost(one: number, a: number, two: number, b: number): number {
    const { weights } = this.#scenarios;
    const { blocks } = this;
    const share = this.#share;
    const load = this.#load;
    const squarings = this.#squarings;
    const shift = this.#noiseShare[a]! - this.#noiseShare[b]!;
    const shiftOne = this.#lift * (this.#noise[one]! - shift);
    const shiftTwo = this.#lift * (this.#noise[two]! + shift);
    const rowA = a * blocks;
    const rowB = b * blocks;
    const rowOne = one * blocks;
    const rowTwo = two * blocks;
    let cost = 0;
    for (let block = 0; block < blocks; block++) {
      const delta = share[rowA + block]! - share[rowB + block]!;
      let first = load[rowOne + block]! - delta + shiftOne;
      let second = load[rowTwo + block]! + delta + shiftTwo;
      for (let step = 0; step < squarings; step++) {
        first *= first;
        second *= second;
      }
      cost += weights[block]! * (first + second);
    }
    return cost;
  }

  #transfers(device: number, leaves: number, comes: number): number {
    const row = device * this.experts;
    return (this.#before[row + comes]! ? 0 : 1) - (this.#before[row + leaves]! ? 0 : 1);
  }

  #put(slot: number, expert: number): void {
    const device = Math.floor(slot / this.slots);
    const old = this.rows[slot]!;
    this.#moves += this.#transfers(device, old, expert);
    this.#holds[device * this.experts + old] = 0;
    this.#holds[device * this.experts + expert] = 1;
    this.#add(device, old, -1);
    this.#add(device, expert, 1);
    this.rows[slot] = expert;
  }

  #exchange(slotA: number, slotB: number): void {
    const a = this.rows[slotA]!;
    const b = this.rows[slotB]!;
    const one = Math.floor(slotA / this.slots);
    const two = Math.floor(slotB / this.slots);
    this.#total -= this.#cost[one]! + this.#cost[two]!;
    this.#put(slotA, b);
    this.#put(slotB, a);
    this.#cost[one] = this.#costOf(one);
    this.#cost[two] = this.#costOf(two);
    this.#total += this.#cost[one]! + this.#cost[two]!;
  }

  /** Cost of a device with parts of the loads of two experts added (noise in its own parts). */
  #costWith(
    device: number,
    a: number,
    partA: number,
    noiseA: number,
    b: number,
    partB: number,
    noiseB: number,
  ): number {
    const { weights, loads, noise } = this.#scenarios;
    const { blocks } = this;
    const load = this.#load;
    const shift = this.#lift * (this.#noise[device]! + noiseA * noise[a]! + noiseB * noise[b]!);
    const squarings = this.#squarings;
    const row = device * blocks;
    const rowA = a * blocks;
    const rowB = b * blocks;
    let cost = 0;
    for (let block = 0; block < blocks; block++) {
      let value = load[row + block]! + partA * loads[rowA + block]! + partB * loads[rowB + block]! + shift;
      for (let step = 0; step < squarings; step++) value *= value;
      cost += weights[block]! * value;
    }
    return cost;
  }

  /** Change of cost on the devices that hold `expert`, all but `except`, if it had `more` replicas more. */
  #rippleOf(expert: number, more: number, except: number): number {
    const count = this.replicas[expert]!;
    const part = 1 / (count + more) - 1 / count;
    const noisePart = 1 / (count + more) ** 2 - 1 / count ** 2;
    let delta = 0;
    for (let device = 0, at = expert; device < this.devices; device++, at += this.experts)
      if (this.#holds[at] && device !== except)
        delta += this.#costWith(device, expert, part, noisePart, expert, 0, 0) - this.#cost[device]!;
    return delta;
  }

  /** w p L^(p-1) of every scenario and its sum times lift: the slope of a device's cost in load and in noise. */
  #slopeOf(device: number, into: Float64Array): number {
    const { weights } = this.#scenarios;
    const power = 2 ** this.#squarings;
    const shift = this.#lift * this.#noise[device]!;
    let sum = 0;
    for (let block = 0; block < this.blocks; block++) {
      const base = this.#load[device * this.blocks + block]! + shift;
      let value = base;
      for (let step = 0; step < this.#squarings; step++) value *= value;
      into[block] = base > 0 ? (weights[block]! * power * value) / base : 0;
      sum += into[block]!;
    }
    return sum * this.#lift;
  }

  /** First-order change of a device's cost when one replica's share of `expert` is added. */
  #slopeFor(expert: number, slope: Float64Array, noiseSlope: number): number {
    let sum = noiseSlope * this.#noiseShare[expert]!;
    const row = expert * this.blocks;
    for (let block = 0; block < this.blocks; block++) sum += slope[block]! * this.#share[row + block]!;
    return sum;
  }

  #replace(slot: number, expert: number): void {
    const { devices, experts } = this;
    const device = Math.floor(slot / this.slots);
    const old = this.rows[slot]!;
    for (const one of [old, expert])
      for (let other = 0; other < devices; other++)
        if (this.#holds[other * experts + one]) this.#add(other, one, -1);
    this.#moves += this.#transfers(device, old, expert);
    this.#holds[device * experts + old] = 0;
    this.#holds[device * experts + expert] = 1;
    this.rows[slot] = expert;
    this.replicas[old]!--;
    this.replicas[expert]!++;
    for (const one of [old, expert]) {
      this.#setShare(one);
      for (let other = 0; other < devices; other++)
        if (this.#holds[other * experts + one]) this.#add(other, one, 1);
    }
    this.#costs();
  }

  /** Devices by falling cost. */
  #byCost(): number[] {
    return Array.from(this.#cost.keys()).sort(
      (left, right) => this.#cost[right]! - this.#cost[left]! || left - right,
    );
  }

  /**
   * Looks for the change with the largest gain per transfer among those that relieve the hottest device
   * with the help of the coldest ones and keep the moves within `budget`. Returns the gain per transfer in units of the objective's value (of
   * PAR), 0 when nothing gains; `apply` makes the change.
   */
  propose(budget: number): number {
    const order = this.#byCost();
    const hot = order[0]!;
    const partners = order.slice(-Math.min(coldest, this.devices - 1)).reverse();
    this.#slotA = -1;
    this.#slotB = -1;
    this.#replaceBy = -1;
    this.#rate = 0;
    this.#transfersOfBest = 1;
    this.#proposeExchange(hot, partners, budget);
    this.#proposeReplica(hot, partners, budget);
    return this.#gainOfBest();
  }

  /**
   * Like `propose` without a budget, but only exchanges that leave the window's load of both devices at or below
   * `cap`, with any device as the partner.
   */
  proposeWithin(cap: number): number {
    const { devices, slots, experts, rows } = this;
    let hot = 0;
    for (let device = 1; device < devices; device++) if (this.#cost[device]! > this.#cost[hot]!) hot = device;
    this.#slotA = -1;
    this.#slotB = -1;
    this.#replaceBy = -1;
    this.#rate = 0;
    this.#transfersOfBest = 1;
    const room = cap - this.#window[hot]!;
    for (let slotA = hot * slots; slotA < (hot + 1) * slots; slotA++) {
      const a = rows[slotA]!;
      const least = this.#windowShare[a]! + room;
      for (let other = 0; other < devices; other++) {
        if (other === hot || this.#holds[other * experts + a]) continue;
        const most = this.#windowShare[a]! - (cap - this.#window[other]!);
        for (let slotB = other * slots; slotB < (other + 1) * slots; slotB++) {
          const b = rows[slotB]!;
          const share = this.#windowShare[b]!;
          if (share > least || share < most || this.#holds[hot * experts + b]) continue;
          const gain = this.#cost[hot]! + this.#cost[other]! - this.#exchangeCost(hot, a, other, b);
          if (gain > this.#rate) {
            this.#rate = gain;
            this.#slotA = slotA;
            this.#slotB = slotB;
          }
        }
      }
    }
    return this.#gainOfBest();
  }

  /** The best change's gain per transfer in units of the objective's value. */
  #gainOfBest(): number {
    if (this.#rate <= 0) return 0;
    const power = 1 / 2 ** this.#squarings;
    const transfers = this.#transfersOfBest;
    return (
      (this.#total ** power - Math.max(1e-12, this.#total - this.#rate * transfers) ** power) / transfers
    );
  }

  /**
   * Exchanges of an expert of the hot device with one of a partner. The cost is convex, so its slope bounds what an
   * exchange can gain; only exchanges whose bound beats the best so far are worked out.
   */
  #proposeExchange(hot: number, partners: readonly number[], budget: number): void {
    const { slots, experts, rows } = this;
    const first = hot * slots;
    const noiseHot = this.#slopeOf(hot, this.#slope);
    for (let index = 0; index < slots; index++)
      this.#hotSlope[index] = this.#slopeFor(rows[first + index]!, this.#slope, noiseHot);
    for (const other of partners) {
      const noiseOther = this.#slopeOf(other, this.#otherSlope);
      const both = this.#cost[hot]! + this.#cost[other]!;
      for (let index = 0; index < slots; index++)
        this.#partnerSlope[index] = this.#slopeFor(rows[first + index]!, this.#otherSlope, noiseOther);
      for (let slotB = other * slots; slotB < (other + 1) * slots; slotB++) {
        const b = rows[slotB]!;
        if (this.#holds[hot * experts + b]) continue;
        const leavesHot = this.#slopeFor(b, this.#slope, noiseHot);
        const leavesOther = this.#slopeFor(b, this.#otherSlope, noiseOther);
        for (let index = 0; index < slots; index++) {
          const bound =
            Math.min(this.#cost[hot]!, this.#hotSlope[index]! - leavesHot) -
            this.#partnerSlope[index]! +
            leavesOther;
          if (bound <= this.#rate * 0.5) continue;
          const a = rows[first + index]!;
          if (this.#holds[other * experts + a]) continue;
          const transfers = this.#transfers(hot, a, b) + this.#transfers(other, b, a);
          if (this.#moves + transfers > budget) continue;
          const per = Math.max(0.5, transfers);
          if (bound <= this.#rate * per) continue;
          const rate = (both - this.#exchangeCost(hot, a, other, b)) / per;
          if (rate > this.#rate) {
            this.#rate = rate;
            this.#transfersOfBest = per;
            this.#slotA = first + index;
            this.#slotB = slotB;
          }
        }
      }
    }
  }

  /** A further replica of an expert of the hot device, in place of a replica of a less needed one on a partner. */
  #proposeReplica(hot: number, partners: readonly number[], budget: number): void {
    const { slots, devices, experts, rows } = this;
    const ripples = new Map<number, number>();
    for (let slotA = hot * slots; slotA < (hot + 1) * slots; slotA++) {
      const a = rows[slotA]!;
      const count = this.replicas[a]!;
      if (count >= devices) continue;
      const relief = this.#rippleOf(a, 1, -1);
      if (-relief <= this.#rate * 0.5) continue;
      for (const device of partners) {
        if (this.#holds[device * experts + a]) continue;
        for (let slotB = device * slots; slotB < (device + 1) * slots; slotB++) {
          const old = rows[slotB]!;
          const oldCount = this.replicas[old]!;
          if (oldCount < 2 || this.#scenarios.mean[old]! / (oldCount - 1) > this.#meanShare[a]! * 1.5)
            continue;
          const transfers = this.#transfers(device, old, a);
          if (this.#moves + transfers > budget) continue;
          const per = Math.max(0.5, transfers);
          if (-relief <= this.#rate * per) continue;
          let ripple = ripples.get(old);
          if (ripple === undefined) {
            ripple = this.#rippleOf(old, -1, -1);
            ripples.set(old, ripple);
          }
          // `ripple` counts this device as a holder; it stops being one
          const up = 1 / (oldCount - 1) - 1 / oldCount;
          const upNoise = 1 / (oldCount - 1) ** 2 - 1 / oldCount ** 2;
          const here = this.#costWith(device, old, up, upNoise, old, 0, 0);
          const after = this.#costWith(
            device,
            old,
            -1 / oldCount,
            -1 / oldCount ** 2,
            a,
            1 / (count + 1),
            1 / (count + 1) ** 2,
          );
          const rate = -(relief + ripple - here + after) / per;
          if (rate > this.#rate) {
            this.#rate = rate;
            this.#transfersOfBest = per;
            this.#slotA = -1;
            this.#slotB = slotB;
            this.#replaceBy = a;
          }
        }
      }
    }
  }

  /** The change that `propose` found last. */
  get proposed(): Change {
    return { slotA: this.#slotA, slotB: this.#slotB, replaceBy: this.#replaceBy };
  }

  /** Makes a change; the rows must be those for which it was proposed. */
  apply({ slotA, slotB, replaceBy }: Change): void {
    if (replaceBy >= 0) this.#replace(slotB, replaceBy);
    else this.#exchange(slotA, slotB);
  }

  /**
   * Exchanges until the window's peak is at most `target`; among exchanges that reach it, the one of least cost. Where
   * no exchange lowers the peak, the hottest device gives load to another one all the same (at most `mostKicks`
   * times) and the search goes on from there; the rows with the lowest peak are kept.
   */
  polish(target: number, mostSteps: number, mostKicks: number): void {
    let best: Int32Array | undefined;
    let lowest = Number.POSITIVE_INFINITY;
    let kicks = 0;
    const random = uniform(1);
    for (let step = 0; step < mostSteps; step++) {
      const hot = this.#hottestOfWindow();
      const peak = this.#window[hot]!;
      if (peak <= target) return;
      if (this.#coolWindow(hot, peak, target)) continue;
      if (peak < lowest) {
        lowest = peak;
        best = this.rows.slice();
      }
      if (kicks++ >= mostKicks || !this.#kick(hot, target, random)) break;
    }
    if (best !== undefined && this.windowPeak > lowest) this.#restore(best);
  }

  #hottestOfWindow(): number {
    let hot = 0;
    for (let device = 1; device < this.devices; device++)
      if (this.#window[device]! > this.#window[hot]!) hot = device;
    return hot;
  }

  /** The exchange that best lowers the peak of the window; false if there is none. */
  #coolWindow(hot: number, peak: number, target: number): boolean {
    const { devices, slots, experts, rows } = this;
    let bestA = -1;
    let bestB = -1;
    let lowest = peak - 1e-9;
    let cost = Number.POSITIVE_INFINITY;
    for (let other = 0; other < devices; other++) {
      const load = this.#window[other]!;
      // Shifts that leave both devices at or below what is already reached, or the target
      let bound = Math.max(lowest, target);
      if (other === hot || peak - bound > bound - load) continue;
      for (let slotB = other * slots; slotB < (other + 1) * slots; slotB++) {
        const b = rows[slotB]!;
        if (this.#holds[hot * experts + b]) continue;
        const shareB = this.#windowShare[b]!;
        const least = shareB + Math.max(peak - bound, 1e-12);
        const most = shareB + bound - load;
        for (let slotA = hot * slots; slotA < (hot + 1) * slots; slotA++) {
          const a = rows[slotA]!;
          const shareA = this.#windowShare[a]!;
          if (shareA < least || shareA > most || this.#holds[other * experts + a]) continue;
          const shift = shareA - shareB;
          const higher = Math.max(peak - shift, load + shift);
          if (higher <= target) {
            const added = this.#exchangeCost(hot, a, other, b) - this.#cost[other]!;
            if (added >= cost) continue;
            cost = added;
          } else if (cost < Number.POSITIVE_INFINITY || higher >= lowest) continue;
          lowest = higher;
          bound = Math.max(lowest, target);
          bestA = slotA;
          bestB = slotB;
        }
      }
    }
    if (bestA < 0) return false;
    this.#exchange(bestA, bestB);
    return true;
  }

  /** Brings the hottest device to the target at the expense of a random other one. */
  #kick(hot: number, target: number, random: () => number): boolean {
    const { slots, experts, devices, rows } = this;
    for (let trial = 0; trial < 4 * devices; trial++) {
      const slotA = hot * slots + Math.floor(random() * slots);
      const slotB = Math.floor(random() * devices * slots);
      const other = Math.floor(slotB / slots);
      const a = rows[slotA]!;
      const b = rows[slotB]!;
      const shift = this.#windowShare[a]! - this.#windowShare[b]!;
      if (other === hot || this.#window[hot]! - shift > target || shift > 0.1) continue;
      if (this.#holds[other * experts + a] || this.#holds[hot * experts + b]) continue;
      this.#exchange(slotA, slotB);
      return true;
    }
    return false;
  }

  /** Goes back to earlier rows of the same replica counts. */
  #restore(rows: Int32Array): void {
    for (let slot = 0; slot < rows.length; slot++)
      if (this.rows[slot] !== rows[slot]) this.#put(slot, rows[slot]!);
    this.#holds.fill(0);
    for (let slot = 0; slot < rows.length; slot++)
      this.#holds[Math.floor(slot / this.slots) * this.experts + rows[slot]!] = 1;
    this.#costs();
  }
}
