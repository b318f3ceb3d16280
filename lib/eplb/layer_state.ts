// The placement of one layer while it is searched: rows of experts, and per device the load in every scenario, the
// noise variance and the window's load, all kept up to date by the two changes there are: exchanging two experts, and
// replacing a replica of one expert by a replica of another. Which change to make is decided elsewhere
// (improve.ts, polish.ts).
//
// Value: the expected peak of a step, sum over scenarios of weight x (sum over devices of (load + p/2 x noise
// variance)^p)^(1/p), p = 2^squarings. p is chosen so that an imbalance that drowns in the noise of a step, or in what
// changes from window to window, counts for little (scale sqrt(2 ln D) / both). A device's cost is its part of the
// value's p-th powers, each scenario scaled so that a small change of cost is p times the change of value.
// Invariants: no expert twice on a device, at least one replica each, at most one per device.
import type { Scenarios } from './scenario.js';

/** Exchange of the experts in two slots, or (replaceBy >= 0) a replica of `replaceBy` for the one in slotB. */
export interface Change {
  slotA: number;
  slotB: number;
  replaceBy: number;
}

export class LayerState {
  readonly experts: number;
  readonly devices: number;
  readonly slots: number;
  readonly blocks: number;
  readonly scenarios: Scenarios;
  /** i32[devices * slots]. */
  readonly rows: Int32Array;
  readonly replicas: Int32Array;
  /** u8[devices * experts]: which device holds what. */
  readonly holds: Uint8Array;
  /** Load of one replica: f64[experts, blocks] by scenario, f64[experts] its mean, in the window, and its noise. */
  readonly share: Float64Array;
  readonly meanShare: Float64Array;
  readonly windowShare: Float64Array;
  readonly noiseShare: Float64Array;
  /** f64[devices]: the window's load over the mean device load. */
  readonly window: Float64Array;
  /** f64[devices]. */
  readonly cost: Float64Array;
  readonly #before: Uint8Array;
  readonly #load: Float64Array;
  readonly #noise: Float64Array;
  /** f64[devices, blocks]: p-th powers and their slopes; f64[blocks]: sums of powers and what a unit of them costs. */
  readonly #powers: Float64Array;
  readonly #slopes: Float64Array;
  readonly #sums: Float64Array;
  readonly #price: Float64Array;
  #squarings = 5;
  #moves = 0;
  #value = 0;

  constructor(scenarios: Scenarios, devices: number, slots: number) {
    const { experts, blocks } = scenarios;
    this.experts = experts;
    this.devices = devices;
    this.slots = slots;
    this.blocks = blocks;
    this.scenarios = scenarios;
    this.rows = new Int32Array(devices * slots);
    this.replicas = new Int32Array(experts);
    this.holds = new Uint8Array(devices * experts);
    this.share = new Float64Array(experts * blocks);
    this.meanShare = new Float64Array(experts);
    this.windowShare = new Float64Array(experts);
    this.noiseShare = new Float64Array(experts);
    this.window = new Float64Array(devices);
    this.cost = new Float64Array(devices);
    this.#before = new Uint8Array(devices * experts);
    this.#load = new Float64Array(devices * blocks);
    this.#noise = new Float64Array(devices);
    this.#powers = new Float64Array(devices * blocks);
    this.#slopes = new Float64Array(devices * blocks);
    this.#sums = new Float64Array(blocks);
    this.#price = new Float64Array(blocks);
  }

  /** Starts from rows (i32[devices * slots]): moves are counted from them, and they set the scale p. */
  start(rows: ArrayLike<number>): void {
    this.#place(rows);
    this.#before.set(this.holds);
    this.#moves = 0;
    const noise = this.#noise.reduce((sum, value) => sum + value, 0) / this.devices;
    const variance = noise + this.spread + 1e-9;
    const scale = peakDeviates(this.devices) / Math.sqrt(variance);
    this.#squarings = Math.max(3, Math.min(6, Math.floor(Math.log2(scale))));
    this.#costs();
  }

  /** Other rows on the same scale, moves still counted from where it started. */
  set(rows: ArrayLike<number>): void {
    this.#place(rows);
    this.#moves = this.#received();
    this.#costs();
  }

  /** Slots whose expert the device did not hold at the start. */
  #received(): number {
    const { experts, devices, slots, rows } = this;
    let count = 0;
    for (let device = 0; device < devices; device++)
      for (let slot = device * slots; slot < (device + 1) * slots; slot++)
        if (this.#before[device * experts + rows[slot]!] === 0) count++;
    return count;
  }

  #place(rows: ArrayLike<number>): void {
    const { experts, devices, slots } = this;
    this.rows.set(rows);
    this.replicas.fill(0);
    this.holds.fill(0);
    for (let device = 0; device < devices; device++)
      for (let slot = device * slots; slot < (device + 1) * slots; slot++) {
        this.replicas[rows[slot]!]!++;
        this.holds[device * experts + rows[slot]!] = 1;
      }
    for (let expert = 0; expert < experts; expert++) this.#setShare(expert);
    this.#load.fill(0);
    this.#noise.fill(0);
    this.window.fill(0);
    for (let device = 0; device < devices; device++)
      for (let slot = device * slots; slot < (device + 1) * slots; slot++) this.#add(device, rows[slot]!, 1);
  }

  /** Expert weights to move from where it started to the rows now. */
  get moves(): number {
    return this.#moves;
  }

  /** Near the expected PAR of a step. */
  get value(): number {
    return this.#value;
  }

  /** p of the value. */
  get power(): number {
    return 1 << this.#squarings;
  }

  /** Highest window load over the mean device load. */
  get windowPeak(): number {
    return this.window[this.hottestOfWindow()]!;
  }

  /** f64[blocks]: highest load over the mean device load in every scenario. */
  get peaks(): Float64Array {
    const peaks = new Float64Array(this.blocks);
    const load = this.#load;
    for (let row = 0; row < load.length; row += this.blocks)
      for (let block = 0; block < this.blocks; block++)
        if (load[row + block]! > peaks[block]!) peaks[block] = load[row + block]!;
    return peaks;
  }

  /** Their mean: what the value is a smooth form of. */
  get meanPeak(): number {
    const { weights } = this.scenarios;
    return this.peaks.reduce((sum, peak, block) => sum + weights[block]! * peak, 0);
  }

  /** The device with the highest window load. */
  hottestOfWindow(): number {
    let hot = 0;
    for (let device = 1; device < this.devices; device++)
      if (this.window[device]! > this.window[hot]!) hot = device;
    return hot;
  }

  /** Mean over devices of the variance of one step around its scenario. */
  get noise(): number {
    let sum = 0;
    for (let device = 0; device < this.devices; device++) sum += this.noiseOf(device);
    return sum / this.devices;
  }

  /** Variance of one step's load on a device around its scenario. */
  noiseOf(device: number): number {
    const { noise } = this.scenarios;
    let sum = 0;
    for (let slot = device * this.slots; slot < (device + 1) * this.slots; slot++)
      sum += noise[this.rows[slot]!]! / this.replicas[this.rows[slot]!]! ** 2;
    return sum;
  }

  /** Variance of device loads over the scenarios, mean over devices. */
  get spread(): number {
    const { weights } = this.scenarios;
    let spread = 0;
    for (let device = 0; device < this.devices; device++) {
      const row = device * this.blocks;
      let mean = 0;
      for (let block = 0; block < this.blocks; block++) mean += weights[block]! * this.#load[row + block]!;
      for (let block = 0; block < this.blocks; block++)
        spread += (weights[block]! * (this.#load[row + block]! - mean) ** 2) / this.devices;
    }
    return spread;
  }

  /** Devices by falling cost. */
  byCost(): number[] {
    return Array.from(this.cost.keys()).sort(
      (left, right) => this.cost[right]! - this.cost[left]! || left - right,
    );
  }

  /** What the value falls by when costs fall by `relief` in all. */
  gainOf(relief: number): number {
    if (relief <= 0) return 0;
    return this.#value * (1 - Math.max(1e-12, 1 - relief / this.#value) ** (1 / this.power));
  }

  /** 1 where a device did not hold an expert at the start, so that it takes a transfer to have it there; else 0. */
  isNew(device: number, expert: number): number {
    return 1 - this.#before[device * this.experts + expert]!;
  }

  /** Makes a change. */
  apply({ slotA, slotB, replaceBy }: Change): void {
    if (replaceBy >= 0) this.#replace(slotB, replaceBy);
    else this.exchange(slotA, slotB);
  }

  exchange(slotA: number, slotB: number): void {
    const a = this.rows[slotA]!;
    const b = this.rows[slotB]!;
    this.#put(slotA, b);
    this.#put(slotB, a);
    this.#raise(Math.floor(slotA / this.slots));
    this.#raise(Math.floor(slotB / this.slots));
    this.#weigh();
  }

  /** Cost of both devices after a (on one) and b (on two) change places. */
  exchangeCost(one: number, a: number, two: number, b: number): number {
    const { blocks, share } = this;
    const load = this.#load;
    const price = this.#price;
    const squarings = this.#squarings;
    const lift = (1 << squarings) / 2;
    const shift = this.noiseShare[a]! - this.noiseShare[b]!;
    const shiftOne = lift * (this.#noise[one]! - shift);
    const shiftTwo = lift * (this.#noise[two]! + shift);
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
      cost += price[block]! * (first + second);
    }
    return cost;
  }

  /** Cost of a device with parts of the loads of two experts added (noise in its own parts). */
  costWith(
    device: number,
    a: number,
    partA: number,
    noiseA: number,
    b: number,
    partB: number,
    noiseB: number,
  ): number {
    const { loads, variance: noise } = this.scenarios;
    const { blocks } = this;
    const load = this.#load;
    const price = this.#price;
    const squarings = this.#squarings;
    const shift = ((1 << squarings) / 2) * (this.#noise[device]! + noiseA * noise[a]! + noiseB * noise[b]!);
    const row = device * blocks;
    const rowA = a * blocks;
    const rowB = b * blocks;
    let cost = 0;
    for (let block = 0; block < blocks; block++) {
      let value = load[row + block]! + partA * loads[rowA + block]! + partB * loads[rowB + block]! + shift;
      for (let step = 0; step < squarings; step++) value *= value;
      cost += price[block]! * value;
    }
    return cost;
  }

  /** Change of cost on the devices that hold `expert`, but for one, if it had `more` replicas more. */
  ripple(expert: number, more: number, except = -1): number {
    const { devices, experts, holds, cost } = this;
    const count = this.replicas[expert]!;
    const part = 1 / (count + more) - 1 / count;
    const noisePart = 1 / (count + more) ** 2 - 1 / count ** 2;
    let delta = 0;
    for (let device = 0, at = expert; device < devices; device++, at += experts)
      if (holds[at] && device !== except)
        delta += this.costWith(device, expert, part, noisePart, expert, 0, 0) - cost[device]!;
    return delta;
  }

  /** The slope of a device's cost in the load of every scenario; returns that in its noise. */
  slopeOf(device: number, into: Float64Array): number {
    const { power } = this;
    const row = device * this.blocks;
    let sum = 0;
    for (let block = 0; block < this.blocks; block++) {
      const value = this.#price[block]! * this.#slopes[row + block]!;
      into[block] = value;
      sum += value;
    }
    return (sum * power) / 2;
  }

  /** First-order change of a device's cost when one replica's share of `expert` is added. */
  slopeFor(expert: number, slope: Float64Array, noiseSlope: number): number {
    let sum = noiseSlope * this.noiseShare[expert]!;
    const row = expert * this.blocks;
    for (let block = 0; block < this.blocks; block++) sum += slope[block]! * this.share[row + block]!;
    return sum;
  }

  /** First-order change of a device's cost when one replica of b makes way for one of a. */
  slopeAlong(a: number, b: number, slope: Float64Array, noiseSlope: number): number {
    const { blocks, share } = this;
    const rowA = a * blocks;
    const rowB = b * blocks;
    let sum = noiseSlope * (this.noiseShare[a]! - this.noiseShare[b]!);
    for (let block = 0; block < blocks; block++)
      sum += slope[block]! * (share[rowA + block]! - share[rowB + block]!);
    return sum;
  }

  /**
   * The least that a device's cost can become when it changes by `firstOrder` to first order: (1 + x)^p is convex, so
   * that scenarios in which it changes unevenly only cost more.
   */
  leastCost(device: number, firstOrder: number): number {
    const cost = this.cost[device]!;
    if (cost === 0) return 0;
    let ratio = Math.max(0, 1 + firstOrder / (this.power * cost));
    for (let step = 0; step < this.#squarings; step++) ratio *= ratio;
    return cost * ratio;
  }

  #setShare(expert: number): void {
    const { loads, mean, window, variance: noise } = this.scenarios;
    const factor = 1 / this.replicas[expert]!;
    const row = expert * this.blocks;
    for (let block = 0; block < this.blocks; block++) this.share[row + block] = loads[row + block]! * factor;
    this.meanShare[expert] = mean[expert]! * factor;
    this.windowShare[expert] = window[expert]! * factor;
    this.noiseShare[expert] = noise[expert]! * factor * factor;
  }

  #add(device: number, expert: number, sign: number): void {
    const from = expert * this.blocks;
    const to = device * this.blocks;
    for (let block = 0; block < this.blocks; block++)
      this.#load[to + block]! += sign * this.share[from + block]!;
    this.#noise[device]! += sign * this.noiseShare[expert]!;
    this.window[device]! += sign * this.windowShare[expert]!;
  }

  #put(slot: number, expert: number): void {
    const device = Math.floor(slot / this.slots);
    const old = this.rows[slot]!;
    this.#moves += this.isNew(device, expert) - this.isNew(device, old);
    this.holds[device * this.experts + old] = 0;
    this.holds[device * this.experts + expert] = 1;
    this.#add(device, old, -1);
    this.#add(device, expert, 1);
    this.rows[slot] = expert;
  }

  #replace(slot: number, expert: number): void {
    const { devices, experts } = this;
    const device = Math.floor(slot / this.slots);
    const old = this.rows[slot]!;
    for (const one of [old, expert])
      for (let other = 0; other < devices; other++)
        if (this.holds[other * experts + one]) this.#add(other, one, -1);
    this.#moves += this.isNew(device, expert) - this.isNew(device, old);
    this.holds[device * experts + old] = 0;
    this.holds[device * experts + expert] = 1;
    this.rows[slot] = expert;
    this.replicas[old]!--;
    this.replicas[expert]!++;
    for (const one of [old, expert]) {
      this.#setShare(one);
      for (let other = 0; other < devices; other++)
        if (this.holds[other * experts + one]) this.#add(other, one, 1);
    }
    this.#costs();
  }

  #costs(): void {
    for (let device = 0; device < this.devices; device++) this.#raise(device);
    this.#weigh();
  }

  /** The p-th powers of a device's loads, and their slopes. */
  #raise(device: number): void {
    const { power } = this;
    const shift = (power / 2) * this.#noise[device]!;
    const row = device * this.blocks;
    for (let block = 0; block < this.blocks; block++) {
      const base = this.#load[row + block]! + shift;
      let value = base;
      for (let step = 0; step < this.#squarings; step++) value *= value;
      this.#powers[row + block] = value;
      this.#slopes[row + block] = base > 0 ? (power * value) / base : 0;
    }
  }

  /** Value, prices and costs from the powers. */
  #weigh(): void {
    const { blocks, devices } = this;
    const { weights } = this.scenarios;
    const powers = this.#powers;
    const sums = this.#sums.fill(0);
    const price = this.#price;
    for (let row = 0; row < powers.length; row += blocks)
      for (let block = 0; block < blocks; block++) sums[block]! += powers[row + block]!;
    this.#value = 0;
    for (let block = 0; block < blocks; block++) {
      const peak = weights[block]! * sums[block]! ** (1 / this.power);
      this.#value += peak;
      price[block] = sums[block]! > 0 ? peak / sums[block]! : 0;
    }
    for (let device = 0; device < devices; device++) {
      let cost = 0;
      for (let block = 0; block < blocks; block++) cost += price[block]! * powers[device * blocks + block]!;
      this.cost[device] = cost;
    }
  }
}

/** How many standard deviations the highest of D normal deviates lies above their mean, about. */
export function peakDeviates(devices: number): number {
  return Math.sqrt(2 * Math.log(Math.max(2, devices)));
}
