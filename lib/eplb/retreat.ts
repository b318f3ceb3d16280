// From a full plan back towards the placement in use, one expert after another: which transfers are worth least. Where
// single steps are scenarios this is what a plan within a budget chooses from, because the changes that gain most in
// the steps seen, taken one by one from the placement in use (course.ts), gain less in the next ones.
import { propose } from './improve.js';
import type { Change, LayerState } from './layer_state.js';
import type { Searched } from './route.js';

/** What brings an expert back to a device that held it, and what costs rise by for each transfer saved. */
interface Return {
  change: Change;
  rate: number;
}

/** The part of a step's moves that are transfers of the full plan; the rest is for what has become worth a change. */
const ofPlan = 0.9;
/** Changes after a retreat, and what one must gain per transfer. */
const mostChanges = 16;
const leastGain = 1e-4;

/** Steps from the placement in use to the full plan. */
export class Retreat implements Searched {
  readonly moves: number[] = [];
  readonly gains: number[] = [];
  readonly certain: boolean;
  readonly #state: LayerState;
  readonly #start: Int32Array;
  readonly #full: Int32Array;
  /** Changes from the full plan back, in that order. */
  readonly #returns: Change[] = [];

  /** From `start` to `full`, rows i32[devices * slots]; what gains less than `least` may be chance. */
  constructor(state: LayerState, start: Int32Array, full: Int32Array, least: number) {
    this.#state = state;
    this.#start = start;
    this.#full = full;
    state.set(start);
    const before = state.value;
    state.set(full);
    const most = state.moves;
    this.certain = before - state.value >= least;
    const rates = Float64Array.from(full, (_, slot) => this.#rateOf(slot));
    while (state.moves > 0) {
      this.moves.push(Math.min(most, Math.ceil(state.moves / ofPlan)));
      this.gains.push(before - state.value);
      const change = this.#cheapest(rates);
      if (change === undefined) break;
      state.apply(change);
      this.#returns.push(change);
      for (const touched of [change.slotA, change.slotB])
        if (touched >= 0) {
          const first = touched - (touched % state.slots);
          for (let slot = first; slot < first + state.slots; slot++) rates[slot] = this.#rateOf(slot);
        }
    }
    this.moves.reverse();
    this.gains.reverse();
  }

  get moved(): number {
    return this.moves.at(-1) ?? 0;
  }

  take(steps: number): void {
    const state = this.#state;
    state.set(steps > 0 ? this.#full : this.#start);
    if (steps === 0) return;
    for (const change of this.#returns.slice(0, this.moves.length - steps)) state.apply(change);
    for (let change = 0; change < mostChanges; change++) {
      const rows = state.rows.slice();
      const proposal = propose(state, leastGain);
      if (proposal === undefined) return;
      state.apply(proposal.change);
      if (state.moves <= this.moves[steps - 1]!) continue;
      state.set(rows);
      return;
    }
  }

  /** The return of least cost per transfer saved. Rates may be out of date; the least one is worked out again. */
  #cheapest(rates: Float64Array): Change | undefined {
    for (;;) {
      let slot = 0;
      for (let other = 1; other < rates.length; other++) if (rates[other]! < rates[slot]!) slot = other;
      const before = rates[slot]!;
      if (before === Number.POSITIVE_INFINITY) return undefined;
      const found = this.#returnOf(slot);
      rates[slot] = found?.rate ?? Number.POSITIVE_INFINITY;
      if (found === undefined) continue;
      if (!(found.rate > before) || rates.every((rate) => rate >= found.rate)) return found.change;
    }
  }

  #rateOf(slot: number): number {
    return this.#returnOf(slot)?.rate ?? Number.POSITIVE_INFINITY;
  }

  /** The cheapest way to give a slot's device one of its former experts back, instead of the one that came. */
  #returnOf(slotA: number): Return | undefined {
    const state = this.#state;
    const { devices, slots, experts, rows, holds, replicas, cost } = state;
    const device = Math.floor(slotA / slots);
    const came = rows[slotA]!;
    if (state.isNew(device, came) === 0) return undefined;
    let best: Return | undefined;
    for (let slot = device * slots; slot < (device + 1) * slots; slot++) {
      const former = this.#start[slot]!;
      if (holds[device * experts + former]) continue;
      if (replicas[came]! > 1) {
        const rate = this.#replaceCost(device, came, former);
        if (best === undefined || rate < best.rate)
          best = { change: { slotA: -1, slotB: slotA, replaceBy: former }, rate };
      }
      for (let other = 0; other < devices; other++) {
        if (!holds[other * experts + former] || holds[other * experts + came]) continue;
        const saved = 1 - state.isNew(other, came) + state.isNew(other, former);
        if (saved <= 0) continue;
        const rate = (state.exchangeCost(device, came, other, former) - cost[device]! - cost[other]!) / saved;
        if (best === undefined || rate < best.rate)
          best = { change: { slotA, slotB: slotOf(state, other, former), replaceBy: -1 }, rate };
      }
    }
    return best;
  }

  /** What costs rise by when `device` holds `former` instead of `came`, on all devices that hold either. */
  #replaceCost(device: number, came: number, former: number): number {
    const state = this.#state;
    const { replicas, cost } = state;
    const less = replicas[came]!;
    const more = replicas[former]! + 1;
    const here = state.costWith(device, came, -1 / less, -1 / less ** 2, former, 1 / more, 1 / more ** 2);
    return here - cost[device]! + state.ripple(came, -1, device) + state.ripple(former, 1, device);
  }
}

function slotOf({ slots, rows }: LayerState, device: number, expert: number): number {
  let slot = device * slots;
  while (rows[slot] !== expert) slot++;
  return slot;
}
