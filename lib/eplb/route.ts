// Ways from the placement in use to a better one, step by step, one per layer; and how many steps of each to take
// within a budget.
import type { LayerState } from './layer_state.js';

export interface Route {
  /** Moves and gain after each step. */
  readonly moves: readonly number[];
  readonly gains: readonly number[];
  /** Leaves the state of the layer after so many steps. */
  take(steps: number): void;
}

/** A route that was searched. */
export interface Searched extends Route {
  /** True once chance does not explain what it gains. */
  readonly certain: boolean;
}

export const stay = (state: LayerState, start: Int32Array): Route => ({
  moves: [],
  gains: [],
  take: () => state.set(start),
});

/** The route with other rows after its last step. */
export function endingIn(
  route: Route,
  state: LayerState,
  end: { rows: Int32Array; moves: number; gain: number },
): Route {
  return {
    moves: [...route.moves, end.moves],
    gains: [...route.gains, end.gain],
    take: (steps) => (steps > route.moves.length ? state.set(end.rows) : route.take(steps)),
  };
}

/** How many steps of every layer to take: over all layers the best gain per move first, within the budget. */
export function choose(routes: readonly Route[], maxMoves: number, maxMovesPerLayer: number): Int32Array {
  const taken = new Int32Array(routes.length);
  let left = maxMoves;
  for (;;) {
    let best = -1;
    let upTo = 0;
    let bestRate = 0;
    for (const [layer, { moves, gains }] of routes.entries()) {
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
    const { moves } = routes[best]!;
    left -= moves[upTo - 1]! - (taken[best]! > 0 ? moves[taken[best]! - 1]! : 0);
    taken[best] = upTo;
  }
}
