// The changes that pay most per move, one layer's after another's: what a plan with a budget chooses from.
import { likelyByChance } from './chance.js';
import { propose } from './improve.js';
import type { Change, LayerState } from './layer_state.js';

/** PAR that one expert moved must gain in its layer. */
const worthwhile = 3e-5;
const mostChanges = 64;
/** How many changes a course is continued by at a time, and how many its rate looks back on. */
const stride = 4;
/** Moves per layer that courses are drawn beyond the budget, so that there is something to choose from. */
const ample = 6;

/** What has been moved and gained after each step, in the order the steps would be taken. */
export interface Steps {
  moves: number[];
  gains: number[];
}

/** The changes of one layer in the order they would be taken. Its state is left after the last of them. */
export class Course implements Steps {
  readonly changes: Change[] = [];
  readonly moves: number[] = [];
  readonly gains: number[] = [];
  readonly #state: LayerState;
  readonly #start: number;
  readonly #least: number;
  #done = false;

  constructor(state: LayerState, noise: Float64Array) {
    this.#state = state;
    this.#start = state.value;
    this.#least = likelyByChance(state, noise);
  }

  /** True where no further change pays. */
  get done(): boolean {
    return this.#done;
  }

  /** True once chance does not explain what it gains. */
  get certain(): boolean {
    return (this.gains.at(-1) ?? 0) >= this.#least;
  }

  get moved(): number {
    return this.moves.at(-1) ?? 0;
  }

  /** Gain per move of the last few changes. */
  get rate(): number {
    const gained = (this.gains.at(-1) ?? 0) - (this.gains.at(-1 - stride) ?? 0);
    return gained / Math.max(0.5, this.moved - (this.moves.at(-1 - stride) ?? 0));
  }

  /** Goes on by some changes. */
  extend(): void {
    for (let step = 0; step < stride && !this.#done; step++) {
      const proposal = propose(this.#state, worthwhile);
      this.#done = proposal === undefined || this.changes.length + 1 === mostChanges;
      if (proposal === undefined) return;
      this.#state.apply(proposal.change);
      this.changes.push(proposal.change);
      this.moves.push(this.#state.moves);
      this.gains.push(this.#start - this.#state.value);
    }
  }
}

/** Draws courses of all layers until they use up the budget with something to spare, or no change pays any more. */
export function drawCourses(
  layers: readonly { state: LayerState; noise: Float64Array }[],
  maxMoves: number,
  maxMovesPerLayer: number,
  layerDone: () => void,
): Course[] {
  const courses = layers.map(({ state, noise }) => {
    const course = new Course(state, noise);
    while (!course.done && !course.certain) course.extend();
    layerDone();
    return course;
  });
  const certain = courses.filter((course) => course.certain);
  for (;;) {
    if (certain.reduce((sum, { moved }) => sum + moved, 0) >= maxMoves + ample * layers.length) break;
    let next: Course | undefined;
    for (const course of certain)
      if (!course.done && course.moved <= maxMovesPerLayer && course.rate > (next?.rate ?? 0)) next = course;
    if (next === undefined) break;
    next.extend();
  }
  return courses;
}

/** How many steps of every layer to take: over all layers the best gain per move first, within the budget. */
export function choose(layers: readonly Steps[], maxMoves: number, maxMovesPerLayer: number): Int32Array {
  const taken = new Int32Array(layers.length);
  let left = maxMoves;
  for (;;) {
    let best = -1;
    let upTo = 0;
    let bestRate = 0;
    for (const [layer, { moves, gains }] of layers.entries()) {
      const from = taken[layer]!;
      const movesBefore = from > 0 ? moves[from - 1]! : 0;
      const gainsBefore = from > 0 ? gains[from - 1]! : 0;
      for (let end = from; end < moves.length; end++) {
        const added = moves[end]! - movesBefore;
        if (added > left || moves[end]! > maxMovesPerLayer) continue;
        const rate = (gains[end]! - gainsBefore) / Math.max(0.5, added);
        if (rate > bestRate) {
          bestRate = rate;
          best = layer;
          upTo = end + 1;
        }
      }
    }
    if (best < 0) return taken;
    const { moves } = layers[best]!;
    left -= moves[upTo - 1]! - (taken[best]! > 0 ? moves[taken[best]! - 1]! : 0);
    taken[best] = upTo;
  }
}
