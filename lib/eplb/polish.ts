// Balances the window's own sum to a target without giving up the scenarios: exchanges only, the target approached in
// stages, and at every stage the scenarios improved as far as the stage's bound on the window allows. Going straight
// to the target ends in rows that balance this window and little else.
import type { LayerState } from './layer_state.js';
import { uniform } from './random.js';

/** How far above the target the stages end. */
const stages = [0.01, 0.003, 0];
/** What an improvement of the scenarios may give back of the window's balance. */
const slack = 0.0002;
/** Improvements per stage, and the least gain that is taken. */
const refinements = 16;
const leastGain = 2e-4;

/** Scratch of the slopes of two devices' costs, f64[blocks] each. */
interface Slopes {
  slope: Float64Array;
  otherSlope: Float64Array;
}

/** Exchanges until the window's peak is near `target` or no exchange lowers it; of such rows, those of low value. */
export function polish(state: LayerState, target: number): void {
  for (let device = 0; device < state.devices; device++) sortSlots(state, device);
  const slopes = { slope: new Float64Array(state.blocks), otherSlope: new Float64Array(state.blocks) };
  for (const stage of stages) {
    balance(state, target + stage);
    if (state.blocks === 1) continue;
    const cap = Math.max(target + stage, state.windowPeak) + slack;
    for (let step = 0; step < refinements; step++) if (!refine(state, cap, slopes)) break;
  }
}

/**
 * Exchanges until the window's peak is at most `target`; among exchanges that reach it, the one of least cost. Where
 * no exchange lowers the peak, the hottest device gives load to another one all the same, at most as often as there
 * are devices, and the search goes on from there; the rows with the lowest peak are kept.
 */
function balance(state: LayerState, target: number): void {
  const { devices } = state;
  let best: Int32Array | undefined;
  let lowest = Number.POSITIVE_INFINITY;
  let kicks = 0;
  const random = uniform(1);
  for (let step = 0; step < 6 * devices; step++) {
    const hot = state.hottestOfWindow();
    const peak = state.window[hot]!;
    if (peak <= target) return;
    if (cool(state, hot, peak, target)) continue;
    if (peak < lowest) {
      lowest = peak;
      best = state.rows.slice();
    }
    if (kicks++ >= devices || !kick(state, hot, target, random)) break;
  }
  if (best !== undefined && state.windowPeak > lowest) state.set(best);
}

/** Slots of a device by rising window load, so that partners of a slot for an exchange of a given size are neighbours. */
function sortSlots({ slots, rows, windowShare }: LayerState, device: number): void {
  for (let slot = device * slots + 1; slot < (device + 1) * slots; slot++) {
    const expert = rows[slot]!;
    let place = slot;
    for (; place > device * slots && windowShare[rows[place - 1]!]! > windowShare[expert]!; place--)
      rows[place] = rows[place - 1]!;
    rows[place] = expert;
  }
}

function exchange(state: LayerState, slotA: number, slotB: number): void {
  state.exchange(slotA, slotB);
  sortSlots(state, Math.floor(slotA / state.slots));
  sortSlots(state, Math.floor(slotB / state.slots));
}

/** The exchange that best lowers the peak of the window; false if there is none. */
function cool(state: LayerState, hot: number, peak: number, target: number): boolean {
  const { devices, slots, experts, rows, holds, window, windowShare, cost } = state;
  let bestA = -1;
  let bestB = -1;
  let lowest = peak - 1e-9;
  let least = Number.POSITIVE_INFINITY;
  for (let other = 0; other < devices; other++) {
    const load = window[other]!;
    // Shifts that leave both devices at or below what is already reached, or the target
    let bound = Math.max(lowest, target);
    if (other === hot || peak - bound > bound - load) continue;
    const end = (other + 1) * slots;
    let first = other * slots;
    for (let slotA = hot * slots; slotA < (hot + 1) * slots; slotA++) {
      const a = rows[slotA]!;
      if (holds[other * experts + a]) continue;
      const shareA = windowShare[a]!;
      while (first < end && windowShare[rows[first]!]! < shareA - (bound - load)) first++;
      for (let slotB = first; slotB < end; slotB++) {
        const b = rows[slotB]!;
        const shift = shareA - windowShare[b]!;
        if (shift < Math.max(peak - bound, 1e-12)) break;
        if (shift > bound - load || holds[hot * experts + b]) continue;
        const higher = Math.max(peak - shift, load + shift);
        if (higher <= target) {
          const added = state.exchangeCost(hot, a, other, b) - cost[other]!;
          if (added >= least) continue;
          least = added;
        } else if (least < Number.POSITIVE_INFINITY || higher >= lowest) continue;
        lowest = higher;
        bound = Math.max(lowest, target);
        bestA = slotA;
        bestB = slotB;
      }
    }
  }
  if (bestA < 0) return false;
  exchange(state, bestA, bestB);
  return true;
}

/** Brings the hottest device to the target at the expense of a random other one. */
function kick(state: LayerState, hot: number, target: number, random: () => number): boolean {
  const { slots, experts, devices, rows, holds, window, windowShare } = state;
  for (let trial = 0; trial < 4 * devices; trial++) {
    const slotA = hot * slots + Math.floor(random() * slots);
    const slotB = Math.floor(random() * devices * slots);
    const other = Math.floor(slotB / slots);
    const a = rows[slotA]!;
    const b = rows[slotB]!;
    const shift = windowShare[a]! - windowShare[b]!;
    if (other === hot || window[hot]! - shift > target || shift > 0.1) continue;
    if (holds[other * experts + a] || holds[hot * experts + b]) continue;
    exchange(state, slotA, slotB);
    return true;
  }
  return false;
}

/** The exchange of the costliest device that gains most with no device's window load above `cap`; false if none does. */
function refine(state: LayerState, cap: number, { slope, otherSlope }: Slopes): boolean {
  const { slots, experts, rows, holds, window, windowShare, cost } = state;
  const order = state.byCost();
  const hot = order[0]!;
  const room = cap - window[hot]!;
  const noiseHot = state.slopeOf(hot, slope);
  let relief = 0;
  let bestA = -1;
  let bestB = -1;
  for (let index = order.length - 1; index > 0; index--) {
    const other = order[index]!;
    const roomOther = cap - window[other]!;
    const noiseOther = state.slopeOf(other, otherSlope);
    const end = (other + 1) * slots;
    let first = other * slots;
    for (let slotA = hot * slots; slotA < (hot + 1) * slots; slotA++) {
      const a = rows[slotA]!;
      if (holds[other * experts + a]) continue;
      const shareA = windowShare[a]!;
      while (first < end && windowShare[rows[first]!]! < shareA - roomOther) first++;
      for (let slotB = first; slotB < end && windowShare[rows[slotB]!]! <= shareA + room; slotB++) {
        const b = rows[slotB]!;
        if (holds[hot * experts + b]) continue;
        // The costs are convex: their slopes bound the gain
        const leaves = state.slopeAlong(a, b, slope, noiseHot);
        const arrives = state.slopeAlong(a, b, otherSlope, noiseOther);
        if (leaves - arrives <= relief) continue;
        const least = state.leastCost(hot, -leaves) + state.leastCost(other, arrives);
        if (cost[hot]! + cost[other]! - least <= relief) continue;
        const gain = cost[hot]! + cost[other]! - state.exchangeCost(hot, a, other, b);
        if (gain > relief) {
          relief = gain;
          bestA = slotA;
          bestB = slotB;
        }
      }
    }
  }
  if (state.gainOf(relief) < leastGain) return false;
  exchange(state, bestA, bestB);
  return true;
}
