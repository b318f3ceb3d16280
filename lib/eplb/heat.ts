// Collecting heat while a server runs: what each rank counts per local slot after its experts ran, and the gather
// into the planner's form. Only valid rows are ever counted: group lists come from dispatch, which gives padded and
// dummy tokens to nobody, and a forward that is marked as dummy is dropped here as a second net.
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { Loads } from './loads.js';

/** 'cumulative': ends of the groups, as grouped matmuls take them. 'counts': tokens per group. */
export type GroupListKind = 'cumulative' | 'counts';

const check = new Arguments('heat');

const refuse = (message: string, arg: string): never => {
  throw new MoeError('ERR_MOE_INVALID_ARG', message, { op: 'heat', arg });
};

/** f64[slots]: tokens per local slot from a group list of either kind. */
export function groupCounts(groupList: ArrayLike<number>, kind: GroupListKind): Float64Array {
  check.oneOf('kind', kind, ['cumulative', 'counts']);
  const counts = Float64Array.from(check.numbers('groupList', groupList), Number);
  if (kind === 'cumulative')
    for (let slot = counts.length - 1; slot > 0; slot--) counts[slot]! -= counts[slot - 1]!;
  const wrong = counts.findIndex((value) => !(value >= 0));
  if (wrong >= 0)
    refuse(
      `expected a ${kind} group list without decreases or negatives but slot ${wrong} has ${counts[wrong]} tokens`,
      'groupList',
    );
  return counts;
}

export interface HeatOptions {
  /** True for warm-up, profiling and dummy forwards: the step is not counted at all. */
  dummy?: boolean;
}

/**
 * The heat of one rank and layer: the accumulated counts and, if `ringSteps` > 0, the last `ringSteps` steps one by
 * one. A ring row is replaced when its turn comes again, never added to, so an uncleared ring cannot count twice.
 */
export class RankHeat {
  readonly slots: number;
  readonly ringSteps: number;
  /** f64[slots]: all steps since the last clear. */
  readonly accumulated: Float64Array;
  readonly #ring: Float64Array;
  #recorded = 0;

  constructor(slots: number, ringSteps = 0) {
    check.integer('slots', slots, 1);
    check.integer('ringSteps', ringSteps, 0);
    this.slots = slots;
    this.ringSteps = ringSteps;
    this.accumulated = new Float64Array(slots);
    this.#ring = new Float64Array(slots * ringSteps);
  }

  /** Counts one forward of the layer. */
  record(groupList: ArrayLike<number>, kind: GroupListKind, options: HeatOptions = {}): void {
    const { dummy = false } = check.object('options', options, ['dummy']);
    check.flag('dummy', dummy);
    if (check.numbers('groupList', groupList).length !== this.slots)
      refuse(`expected a group list of ${this.slots} slots but received ${groupList.length}`, 'groupList');
    const counts = groupCounts(groupList, kind);
    if (dummy) return;
    for (let slot = 0; slot < this.slots; slot++) this.accumulated[slot]! += counts[slot]!;
    if (this.ringSteps > 0) this.#ring.set(counts, (this.#recorded % this.ringSteps) * this.slots);
    this.#recorded++;
  }

  /** How many steps the ring holds. */
  get steps(): number {
    return Math.min(this.#recorded, this.ringSteps);
  }

  /** f64[steps, slots] of the ring, oldest first; only steps that were recorded. */
  stepCounts(): Float64Array {
    const out = new Float64Array(this.steps * this.slots);
    const first = this.#recorded > this.ringSteps ? this.#recorded % this.ringSteps : 0;
    for (let step = 0; step < this.steps; step++) {
      const row = ((first + step) % this.ringSteps) * this.slots;
      out.set(this.#ring.subarray(row, row + this.slots), step * this.slots);
    }
    return out;
  }

  clear(): void {
    this.accumulated.fill(0);
    this.#ring.fill(0);
    this.#recorded = 0;
  }
}

/**
 * Physical loads [steps, layers, ranks * slots] of all ranks: heat[rank][layer]. With rings the steps are kept
 * apart, otherwise there is one step. Ranks count what arrives, so nothing is summed over ranks, only joined.
 * Throws ERR_MOE_INVALID_ARG when ranks or layers disagree about slots or steps.
 */
export function gatherHeat(heat: readonly (readonly RankHeat[])[]): Loads {
  for (const [rank, ofRank] of check.list('heat', heat).entries())
    check.instances(`heat[${rank}]`, ofRank, RankHeat);
  const first =
    heat[0]?.[0] ?? refuse('expected heat of at least one rank and layer but received none', 'heat');
  const layers = heat[0]!.length;
  const perStep = first.ringSteps > 0;
  const steps = perStep ? first.steps : 1;
  if (steps === 0) refuse('expected at least one recorded step but received none', 'heat');
  const physical = heat.length * first.slots;
  const counts = new Float64Array(steps * layers * physical);
  for (const [rank, ofRank] of heat.entries()) {
    if (ofRank.length !== layers)
      refuse(
        `expected ${layers} layers on rank ${rank} (as on rank 0) but received ${ofRank.length}`,
        'heat',
      );
    for (const [layer, one] of ofRank.entries()) {
      if (one.slots !== first.slots || one.ringSteps !== first.ringSteps || (perStep && one.steps !== steps))
        refuse(
          `layer ${layer}: expected ${steps} steps of ${first.slots} slots on rank ${rank} (as on rank 0) but received ${one.steps} of ${one.slots}`,
          'heat',
        );
      const own = perStep ? one.stepCounts() : one.accumulated;
      for (let step = 0; step < steps; step++)
        counts.set(
          own.subarray(step * first.slots, (step + 1) * first.slots),
          (step * layers + layer) * physical + rank * first.slots,
        );
    }
  }
  return new Loads({ steps, layers, experts: physical }, counts);
}
