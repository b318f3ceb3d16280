// Plans within a budget of moves: every layer has a route from the placement in use to a better one, and the budget is
// spent over all layers where a move gains most, on full plans where it reaches so far.
import { likelyByChance } from './chance.js';
import { Course, drawCourses } from './course.js';
import { aimOf, type FullPlan, fullPlan, type Layer, needed } from './full_plan.js';
import { Retreat } from './retreat.js';
import { choose, endingIn, stay } from './route.js';

/** Rows are left in the layers' states. */
export function planWithin(
  layers: readonly Layer[],
  maxMoves: number,
  maxMovesPerLayer: number,
  layerDone: () => void,
): void {
  if (maxMoves === 0 || maxMovesPerLayer === 0) {
    for (let layer = 0; layer < layers.length; layer++) layerDone();
    return;
  }
  const planned = new Map<Layer, FullPlan>();
  const routes = layers.map((layer) => {
    const { state, start, noise } = layer;
    const least = likelyByChance(state, noise);
    if (!state.scenarios.rough) return new Course(state, start, least);
    const plan = planOf(layer, planned);
    const retreat = new Retreat(state, start, plan.rows, least);
    layerDone();
    return retreat;
  });
  const courses = routes.filter((route) => route instanceof Course);
  drawCourses(courses, maxMoves, maxMovesPerLayer, layerDone);

  const wanted = routes.reduce((sum, { certain, moved }) => sum + (certain ? moved : 0), 0);
  const full = wanted < maxMoves ? neededPlans(layers, planned) : layers.map(() => undefined);
  const all = full.reduce((sum, plan) => sum + (plan?.moves ?? 0), 0);
  const fit = all <= maxMoves && full.every((plan) => plan === undefined || plan.moves <= maxMovesPerLayer);
  const offers = layers.map(({ state, start }, index) => {
    const plan = full[index];
    const route =
      routes[index]!.certain && !(fit && plan !== undefined) ? routes[index]! : stay(state, start);
    return !fit && plan !== undefined && plan.gain > (route.gains.at(-1) ?? 0)
      ? endingIn(route, state, plan)
      : route;
  });
  const taken = choose(offers, fit ? maxMoves - all : maxMoves, maxMovesPerLayer);
  for (const [index, { state, start }] of layers.entries()) {
    const plan = full[index];
    state.set(start);
    const { windowPeak, meanPeak } = state;
    if (fit && plan !== undefined) state.set(plan.rows);
    else offers[index]!.take(taken[index]!);
    // What the value makes of noise can outweigh what was seen; where nothing seen got better, it did
    if (state.windowPeak > windowPeak && state.meanPeak > meanPeak) state.set(start);
  }
}

/** The full plan of a layer, made once. */
function planOf(layer: Layer, planned: Map<Layer, FullPlan>): FullPlan {
  const { state, start } = layer;
  state.set(start);
  const plan = planned.get(layer) ?? fullPlan(layer, aimOf(state.scenarios, state.slots));
  planned.set(layer, plan);
  return plan;
}

/** The full plans of the layers that need them. */
function neededPlans(layers: readonly Layer[], planned: Map<Layer, FullPlan>): (FullPlan | undefined)[] {
  const plans = layers.map((layer) => planOf(layer, planned));
  const need = needed(layers, plans, false);
  return plans.map((plan, index) => (need[index] ? plan : undefined));
}
