import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { LayerState } from '../../lib/eplb/layer_state.js';
import { Loads } from '../../lib/eplb/loads.js';
import { planSync, startPlacements } from '../../lib/eplb/plan.js';
import { poisson, uniform } from '../../lib/eplb/random.js';
import { buildLayer } from '../../lib/eplb/rebuild.js';
import { Retreat } from '../../lib/eplb/retreat.js';
import { choose, type Route } from '../../lib/eplb/route.js';
import { scenariosOf } from '../../lib/eplb/scenario.js';

/** Steps of few tokens, each of a topic of its own. */
function topics(seed: number, experts: number, steps = 8, layers = 1): Loads {
  const random = uniform(seed);
  const counts = Float64Array.from({ length: steps * layers * experts }, () =>
    poisson(random() < 0.15 ? 8 : 0.6, random),
  );
  return new Loads({ steps, layers, experts }, counts);
}

const rowsOfStart = (experts: number, devices: number, slots: number): Int32Array =>
  Int32Array.from(
    startPlacements(1, experts, devices, slots)[0]!
      .toRows()
      .flatMap((row) => Array.from(row)),
  );

describe('the way back from a full plan', () => {
  const shape = fc.constantFrom([24, 8, 4], [16, 4, 5], [16, 16, 2], [30, 6, 5]) as fc.Arbitrary<
    [number, number, number]
  >;

  it('is legal at every step, within the moves it names, and ends at the full plan', () => {
    fc.assert(
      fc.property(shape, fc.integer({ min: 1, max: 1000 }), ([experts, devices, slots], seed) => {
        const scenarios = scenariosOf(topics(seed, experts), 0, devices);
        const start = rowsOfStart(experts, devices, slots);
        const full = Int32Array.from(
          buildLayer(scenarios, devices, slots, { target: Number.POSITIVE_INFINITY, leeway: 0 }).rows,
        );
        const state = new LayerState(scenarios, devices, slots);
        state.start(start);
        const before = state.value;
        state.set(full);
        const most = state.moves;
        const route = new Retreat(state, start, full, 0);
        expect(route.moves.at(-1) ?? 0).toBe(most);
        for (let steps = 0; steps <= route.moves.length; steps++) {
          route.take(steps);
          expect(state.moves).toBeLessThanOrEqual(steps > 0 ? route.moves[steps - 1]! : 0);
          if (steps > 0) expect(before - state.value).toBeGreaterThanOrEqual(route.gains[steps - 1]! - 1e-9);
          const held = Array.from({ length: devices }, (_, device) =>
            Array.from(state.rows.subarray(device * slots, (device + 1) * slots)),
          );
          for (const row of held) expect(new Set(row).size).toBe(slots);
          expect(new Set(held.flat()).size).toBe(experts);
        }
        expect(
          route.moves.every((moves, index) => index === 0 || moves >= route.moves[index - 1]!),
          'moves in order',
        ).toBe(true);
      }),
      { numRuns: 60 },
    );
  });
});

describe('spending a budget', () => {
  const route = (moves: number[], gains: number[]): Route => ({ moves, gains, take: () => {} });

  it('takes the steps that gain most per move, and none beyond either bound', () => {
    const routes = [route([2, 4, 6], [4, 6, 6.5]), route([1, 3], [1, 5]), route([], [])];
    expect(Array.from(choose(routes, 5, 100))).toEqual([1, 2, 0]);
    expect(Array.from(choose(routes, 7, 100))).toEqual([2, 2, 0]);
    expect(Array.from(choose(routes, 100, 3))).toEqual([1, 2, 0]);
    expect(Array.from(choose(routes, 0, 100))).toEqual([0, 0, 0]);
  });

  it('never makes a single step that it was given worse, and keeps the budget', () => {
    fc.assert(
      fc.property(
        fc.constantFrom([6, 9, 3], [18, 25, 4], [9, 26, 2], [40, 8, 6], [12, 3, 5]),
        fc.array(fc.integer({ min: 0, max: 5000 }), { minLength: 40, maxLength: 40 }),
        fc.integer({ min: 0, max: 20 }),
        ([experts, devices, slots], values, maxMoves) => {
          const counts = Float64Array.from(values.slice(0, experts));
          fc.pre(counts.some((count) => count > 0));
          const loads = new Loads({ steps: 1, layers: 1, experts: experts! }, counts);
          const plan = planSync({ loads, devices: devices!, slots: slots!, maxMoves });
          expect(plan.moves).toBeLessThanOrEqual(maxMoves);
          expect(plan.par.after.mean).toBeLessThanOrEqual(plan.par.before.mean + 1e-12);
        },
      ),
      { numRuns: 300 },
    );
  });

  it('spends it over layers of few tokens, on fewer moves than a full plan of each', () => {
    const [devices, slots] = [8, 4];
    const first = planSync({ loads: topics(1, 24, 12, 6), devices, slots });
    const loads = topics(2, 24, 12, 6);
    const current = first.placements;
    const whole = planSync({ loads, devices, slots, current, memory: first.memory, maxMoves: 10_000 });
    const within = [8, 16, 32].map((maxMoves) =>
      planSync({ loads, devices, slots, current, memory: first.memory, maxMoves }),
    );
    for (const [index, plan] of within.entries()) {
      expect(plan.moves).toBeLessThanOrEqual([8, 16, 32][index]!);
      expect(plan.moves).toBeGreaterThan([8, 16, 32][index]! / 2);
      expect(plan.layersTouched).toBeGreaterThan(1);
      expect(plan.parStep.after.mean).toBeLessThan(plan.parStep.before.mean);
    }
    expect(whole.moves).toBeGreaterThan(within.at(-1)!.moves);
    expect(whole.parStep.after.mean).toBeLessThan(within[0]!.parStep.after.mean);
  });
});
