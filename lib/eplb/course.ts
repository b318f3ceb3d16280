// The changes that pay most per move, one layer's after another's: what a plan with a budget chooses from.
import { propose } from './improve.js';
import type { Change, LayerState } from './layer_state.js';
import type { Searched } from './route.js';

/** PAR that one expert moved must gain in its layer. */
const worthwhile = 3e-5;
const mostChanges = 64;
/** How many changes a course is continued by at a time, and how many its rate looks back on. */
const stride = 4;
/** Moves per layer that courses are drawn beyond the budget, so that there is something to choose from. */
const ample = 6;

/** The changes of one layer in the order they would be taken. */
export class Course implements Searched {
  readonly moves: number[] = [];
  readonly gains: number[] = [];
  readonly #state: LayerState;
  readonly #start: Int32Array;
  readonly #before: number;
  readonly #least: number;
  readonly #changes: Change[] = [];
  #done = false;

  /** The state is at `start`; what gains less than `least` may be chance. */
  constructor(state: LayerState, start: Int32Array, least: number) {
    this.#state = state;
    this.#start = start;
    this.#before = state.value;
    this.#least = least;
  }

  /** True where no further change pays. */
  get done(): boolean {
    return this.#done;
  }

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

  take(steps: number): void {
    this.#state.set(this.#start);
    for (const change of this.#changes.slice(0, steps)) this.#state.apply(change);
  }

  /** Goes on by some changes. */
  extend(): void {
    for (let step = 0; step < stride && !this.#done; step++) {
      const proposal = propose(this.#state, worthwhile);
      this.#done = proposal === undefined || this.#changes.length + 1 === mostChanges;
      if (proposal === undefined) return;
      this.#state.apply(proposal.change);
      this.#changes.push(proposal.change);
      this.moves.push(this.#state.moves);
      this.gains.push(this.#before - this.#state.value);
    }
  }
}

/**
 * Draws courses on until each is certain, and then those that gain most until they use up the budget with something to
 * spare, or no change pays any more.
 */
export function drawCourses(
  courses: readonly Course[],
  maxMoves: number,
  maxMovesPerLayer: number,
  layerDone: () => void,
): void {
  for (const course of courses) {
    while (!course.done && !course.certain) course.extend();
    layerDone();
  }
  const certain = courses.filter((course) => course.certain);
  for (;;) {
    if (certain.reduce((sum, { moved }) => sum + moved, 0) >= maxMoves + ample * courses.length) return;
    let next: Course | undefined;
    for (const course of certain)
      if (!course.done && course.moved <= maxMovesPerLayer && course.rate > (next?.rate ?? 0)) next = course;
    if (next === undefined) return;
    next.extend();
  }
}
