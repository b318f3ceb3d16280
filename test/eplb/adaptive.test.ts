import { describe, expect, it } from 'vitest';
import { Loads } from '../../lib/eplb/loads.js';
import { deviceLoads } from '../../lib/eplb/metrics.js';
import { planSync, startPlacements } from '../../lib/eplb/plan.js';
import { poisson, uniform } from '../../lib/eplb/random.js';
import { simulate } from '../../lib/eplb/simulate.js';
import { generateTrace } from '../../lib/eplb/trace.js';
import { lowestPeak } from './optimum.js';

const oneLayer = (counts: number[]) => new Loads({ steps: 1, layers: 1, experts: counts.length }, counts);

const peakOf = (counts: number[], devices: number, slots: number, policy: string) => {
  const [placement] = planSync({ loads: oneLayer(counts), devices, slots, policy }).placements;
  return Math.max(...deviceLoads(placement!, counts));
};

describe('small instances', () => {
  it.each(['adaptive', 'rebuild'])('%s finds the optimum of the worked example, 590/3', (policy) => {
    expect(peakOf([600, 560, 120, 120, 20, 10, 10, 10], 8, 2, policy)).toBeCloseTo(590 / 3, 9);
  });

  it('stays within 0.5% of the optimum in the mean over 200 random instances', () => {
    const random = uniform(11);
    const gaps: number[] = [];
    for (let instance = 0; instance < 200; instance++) {
      const slots = 3 + (instance % 2);
      const experts = 8 + Math.floor(random() * 5);
      const counts = Array.from(
        { length: experts },
        () => 1 + Math.floor(1000 * random() ** (1 + 4 * random())),
      );
      const peak = peakOf(counts, 4, slots, 'adaptive');
      const optimum = lowestPeak(counts, 4, slots, peak);
      gaps.push(peak / optimum - 1);
    }
    expect(gaps.length).toBe(200);
    expect(gaps.reduce((sum, gap) => sum + gap, 0) / gaps.length).toBeLessThanOrEqual(0.005);
    expect(Math.max(...gaps)).toBeLessThan(0.05);
  });

  it('plans the loads that break the public planners', () => {
    for (const [counts, devices, slots] of [
      [[1000, 1, 1, 1], 2, 4],
      [[1000, 1, 1, 1], 4, 2],
    ] as const) {
      const { placements } = planSync({ loads: oneLayer([...counts]), devices, slots });
      for (let device = 0; device < devices; device++)
        expect(new Set(placements[0]!.expertsOn(device)).size).toBe(slots);
    }
  });
});

describe('full plans of large layers', () => {
  it.each([
    [32, 9, 0, 1.001],
    [16, 17, 0, 1.001],
    [8, 36, 0, 1.001],
    [64, 5, 0, 1.003],
    [32, 9, 1, 1.001],
    [8, 33, 1, 1.001],
  ])('%i x %i with %i shared: window PAR at most %f in the mean', (devices, slots, shared, most) => {
    for (const kind of ['drifting', 'bursty', 'mixed'] as const) {
      const routed = generateTrace({ kind, steps: 32, layers: 4, experts: 256, seed: 3 });
      const loads = shared > 0 ? routed.withShared(shared, 8) : routed;
      for (const policy of ['adaptive', 'rebuild'])
        expect(planSync({ loads, devices, slots, shared, policy }).par.after.mean).toBeLessThanOrEqual(most);
    }
  });
});

describe('first plans', () => {
  it.each(['adaptive', 'rebuild'])(
    '%s gives devices the rows that hold most of what they have already',
    (policy) => {
      const loads = generateTrace({ kind: 'drifting', steps: 16, layers: 4, experts: 256, seed: 5 });
      const { moves } = planSync({ loads, devices: 32, slots: 9, policy });
      // Rows in the order in which they were packed move 0.97 of all slots
      expect(moves).toBeLessThan(0.85 * 4 * 32 * 9);
    },
  );
});

describe('phases of prefill and decode', () => {
  it.each([
    [32, 9, 1.001],
    [64, 5, 1.003],
  ])(
    '%i x %i: window PAR at most %f, although steps differ: their tokens are many',
    (devices, slots, most) => {
      const loads = generateTrace({ kind: 'mixed', steps: 64, layers: 6, experts: 256, seed: 77, skew: 0.8 });
      expect(planSync({ loads, devices, slots }).par.after.mean).toBeLessThanOrEqual(most);
    },
  );
});

describe('replans without a budget', () => {
  it.each([
    [32, 9, 0, 1.001],
    [16, 17, 0, 1.001],
    [8, 36, 0, 1.001],
    [64, 5, 0, 1.003],
    [32, 9, 1, 1.001],
  ])('%i x %i with %i shared: window PAR at most %f from any placement', (devices, slots, shared, most) => {
    const steps = 32;
    for (const kind of ['drifting', 'bursty'] as const) {
      const routed = generateTrace({
        kind,
        steps: 2 * steps,
        layers: 4,
        experts: 256,
        seed: 13,
        burstSteps: 60,
        driftSteps: 60,
      });
      const loads = shared > 0 ? routed.withShared(shared, 8) : routed;
      const shape = { devices, slots, shared };
      const first = planSync({ loads: loads.window(0, steps), ...shape });
      const next = { loads: loads.window(steps, steps), ...shape };
      const start = startPlacements(4, loads.experts, devices, slots);
      for (const plan of [
        planSync({ ...next, current: first.placements, memory: first.memory }),
        planSync({ ...next, current: first.placements }),
        planSync({ ...next, current: start }),
      ]) {
        expect(plan.par.before.mean).toBeGreaterThan(1.02);
        // A layer in which no burst began or ended may stay as it is
        if (kind === 'drifting') expect(plan.par.after.mean).toBeLessThanOrEqual(most);
        for (const [layer, moves] of plan.movesPerLayer.entries())
          if (moves > 0) expect(plan.par.after.layers[layer]!).toBeLessThanOrEqual(most);
      }
    }
  });

  it('moves nothing when the same window is planned again, counts or shares of a step', () => {
    const loads = generateTrace({ kind: 'drifting', steps: 16, layers: 4, experts: 256, seed: 14 });
    const sum = new Float64Array(4 * 256);
    for (let layer = 0; layer < 4; layer++) {
      const total = loads.total(layer);
      const all = total.reduce((one, two) => one + two, 0);
      sum.set(
        total.map((value) => value / all),
        layer * 256,
      );
    }
    for (const window of [loads, new Loads({ steps: 1, layers: 4, experts: 256 }, sum)]) {
      const request = { loads: window, devices: 32, slots: 9 };
      const first = planSync(request);
      expect(first.par.after.mean).toBeLessThanOrEqual(1.001);
      expect(planSync({ ...request, current: first.placements, memory: first.memory }).moves).toBe(0);
    }
  });

  it('takes counts that were split over replicas and summed again for the counts they are', () => {
    const trace = generateTrace({
      kind: 'steady',
      steps: 2,
      layers: 4,
      experts: 256,
      seed: 18,
      tokens: 16384,
    });
    const split = new Loads(
      trace,
      trace.counts.map((count) => count / 3 + count / 3 + count / 3),
    );
    const first = planSync({ loads: split.window(0, 1), devices: 32, slots: 9 });
    const second = planSync({ loads: split.window(1, 1), devices: 32, slots: 9, current: first.placements });
    expect(second.moves).toBe(0);
  });

  it('follows shares as it follows counts: what are no whole tokens has no noise of tokens', () => {
    const shares = (seed: number) => {
      const { counts } = generateTrace({
        kind: 'steady',
        steps: 1,
        layers: 2,
        experts: 256,
        seed,
        tokens: 65536,
      });
      return new Loads(
        { steps: 1, layers: 2, experts: 256 },
        counts.map((value) => value / (65536 * 8)),
      );
    };
    const first = planSync({ loads: shares(15), devices: 32, slots: 9 });
    const second = planSync({ loads: shares(16), devices: 32, slots: 9, current: first.placements });
    expect(second.par.before.mean).toBeGreaterThan(1.5);
    expect(second.par.after.mean).toBeLessThanOrEqual(1.001);
  });

  it('beats flashlb on the next steps with as many moves as it makes, or more', async () => {
    const ours: number[][] = [[], [], []];
    const theirs: number[] = [];
    for (const [devices, slots] of [
      [32, 9],
      [64, 5],
    ] as const)
      for (const kind of ['drifting', 'bursty', 'mixed'] as const) {
        const trace = generateTrace({ kind, steps: 96, layers: 24, experts: 256, seed: 17, tokens: 2048 });
        const shape = { devices, slots, window: 32 };
        const [flashlb] = await simulate(trace, { ...shape, policies: ['flashlb'] });
        theirs.push(flashlb!.parStepNext);
        for (const [index, maxMoves] of [
          Math.floor(flashlb!.moves / 2),
          Math.floor(flashlb!.moves),
          undefined,
        ].entries()) {
          const [row] = await simulate(trace, {
            ...shape,
            policies: ['adaptive'],
            ...(maxMoves === undefined ? {} : { maxMoves }),
          });
          ours[index]!.push(row!.parStepNext);
        }
      }
    const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
    for (const curve of ours) expect(mean(curve)).toBeLessThanOrEqual(mean(theirs));
    expect(mean(ours[2]!)).toBeLessThanOrEqual(mean(ours[0]!));
  });
});

describe('noise and drift', () => {
  it.each([
    [32, 9, 256, 64],
    [32, 9, 2048, 64],
    [64, 5, 512, 32],
    [8, 36, 256, 16],
    [16, 17, 4096, 1],
  ])(
    'moves nothing on a stationary trace: %i x %i, %i tokens a step, windows of %i',
    async (devices, slots, tokens, window) => {
      const trace = generateTrace({
        kind: 'steady',
        steps: 5 * window,
        layers: 5,
        experts: 256,
        seed: 21,
        tokens,
      });
      const [figures] = await simulate(trace, { devices, slots, window, policies: ['adaptive'] });
      expect(figures!.movesByPlan[0]).toBeGreaterThan(0);
      expect(figures!.movesByPlan.slice(1)).toEqual([0, 0, 0]);
    },
  );

  it.each([
    [40, 16],
    [400, 16],
    [400, 3],
    [40, 64],
  ])(
    'follows steps of topics of their own only as long as more of them tell it something: load %i, windows of %i',
    async (load, window) => {
      const [steps, layers, experts, group] = [4 * window, 6, 256, 16];
      const random = uniform(23);
      const popularity = Float64Array.from({ length: layers * experts }, () => load * (0.2 + random() ** 2));
      const counts = new Float64Array(steps * layers * experts);
      for (let step = 0; step < steps; step++)
        for (let layer = 0; layer < layers; layer++) {
          const topics = Array.from({ length: experts / group }, () => 3 * random() ** 4);
          for (let expert = 0; expert < experts; expert++) {
            const mean = popularity[layer * experts + expert]! * (0.4 + topics[expert % topics.length]!);
            counts[(step * layers + layer) * experts + expert] = poisson(mean, random);
          }
        }
      const trace = new Loads({ steps, layers, experts }, counts);
      for (const [devices, slots] of [
        [32, 9],
        [64, 5],
        [8, 36],
      ] as const) {
        const shape = { devices, slots, window };
        const [ours, flashlb] = await simulate(trace, { ...shape, policies: ['adaptive', 'flashlb'] });
        const [still] = await simulate(trace, { ...shape, policies: ['adaptive'], maxMoves: 0 });
        const where = `${devices}x${slots}`;
        expect(ours!.movesTotal - ours!.movesFirst, where).toBeLessThan(
          0.75 * (flashlb!.movesTotal - flashlb!.movesFirst),
        );
        expect(ours!.parStepNext, where).toBeLessThanOrEqual(1.001 * still!.parStepNext);
        expect(ours!.parStepNext, where).toBeLessThan(1.02 * flashlb!.parStepNext);
      }
    },
  );

  it('balances noise too where moves are said to be free', async () => {
    for (const [devices, slots, most] of [
      [32, 9, 1.001],
      [16, 17, 1.001],
      [64, 5, 1.003],
    ] as const) {
      const trace = generateTrace({
        kind: 'steady',
        steps: 64,
        layers: 4,
        experts: 256,
        seed: 24,
        tokens: 256,
      });
      const request = { devices, slots, window: 16, policies: ['adaptive'] };
      const [spared] = await simulate(trace, request);
      const [free] = await simulate(trace, { ...request, maxMoves: Number.POSITIVE_INFINITY });
      expect(spared!.moves).toBe(0);
      expect(free!.moves).toBeGreaterThan(500);
      expect(free!.parSame).toBeLessThanOrEqual(most);
    }
  });

  it('takes many layers that have changed a little for traffic that has changed', () => {
    const [steps, layers, experts] = [128, 40, 256];
    const trace = generateTrace({
      kind: 'drifting',
      steps,
      layers,
      experts,
      seed: 25,
      tokens: 512,
      driftSteps: 16_000,
    });
    const moved = (first: number, count: number) => {
      const counts = new Float64Array(steps * count * experts);
      for (let step = 0; step < steps; step++) {
        const from = (step * layers + first) * experts;
        counts.set(trace.counts.subarray(from, from + count * experts), step * count * experts);
      }
      const part = new Loads({ steps, layers: count, experts }, counts);
      const before = planSync({ loads: part.window(0, 64), devices: 32, slots: 9 });
      const { movesPerLayer } = planSync({
        loads: part.window(64, 64),
        devices: 32,
        slots: 9,
        current: before.placements,
        memory: before.memory,
      });
      return movesPerLayer.filter((moves) => moves > 0).length;
    };
    const alone = Array.from({ length: 10 }, (_, layer) => moved(layer, 1));
    expect(alone.reduce((sum, count) => sum + count, 0)).toBeLessThan(8);
    expect(moved(0, layers)).toBeGreaterThan(36);
  });

  it('follows a change of popularity within one window', () => {
    const steps = 32;
    const was = generateTrace({ kind: 'steady', steps, layers: 3, experts: 256, seed: 1, tokens: 2048 });
    const is = generateTrace({
      kind: 'steady',
      steps: 2 * steps,
      layers: 3,
      experts: 256,
      seed: 2,
      tokens: 2048,
    });
    const first = planSync({ loads: was, devices: 32, slots: 9 });
    const second = planSync({
      loads: is.window(0, steps),
      devices: 32,
      slots: 9,
      current: first.placements,
      memory: first.memory,
    });
    expect(second.parStep.before.mean).toBeGreaterThan(1.5);
    const next = is.window(steps, steps);
    const fresh = planSync({ loads: is.window(0, steps), devices: 32, slots: 9 });
    const nextPar = (plan: typeof first) =>
      planSync({ loads: next, devices: 32, slots: 9, policy: 'linear', current: plan.placements }).parStep
        .before.mean;
    expect(nextPar(second)).toBeLessThan(1 + 1.35 * (nextPar(fresh) - 1));
    expect(second.moves).toBeLessThan(fresh.moves);
  });

  it('balances for both phases when prefill and decode windows alternate', async () => {
    const phases = [3, 4].map((seed) =>
      generateTrace({ kind: 'steady', steps: 64, layers: 3, experts: 256, seed, tokens: 2048 }),
    );
    const counts = new Float64Array(6 * 16 * 3 * 256);
    for (let window = 0; window < 6; window++)
      counts.set(phases[window % 2]!.window(16 * (window >> 1), 16).counts, window * 16 * 3 * 256);
    const trace = new Loads({ steps: 96, layers: 3, experts: 256 }, counts);
    const [ours, theirs] = await simulate(trace, {
      devices: 32,
      slots: 9,
      window: 16,
      policies: ['adaptive', 'flashlb'],
    });
    expect(ours!.parStepNextByWindow.at(-1)!).toBeLessThan(1.25);
    expect(ours!.parStepNextByWindow.at(-1)!).toBeLessThan(0.9 * theirs!.parStepNextByWindow.at(-1)!);
  });
});

describe('budgets', () => {
  it('keeps both budgets and gains with each of them', () => {
    const trace = generateTrace({
      kind: 'drifting',
      steps: 64,
      layers: 4,
      experts: 256,
      seed: 5,
      driftSteps: 60,
    });
    const first = planSync({ loads: trace.window(0, 32), devices: 32, slots: 9 });
    const request = {
      loads: trace.window(32, 32),
      devices: 32,
      slots: 9,
      current: first.placements,
      memory: first.memory,
    };
    let previous = Number.POSITIVE_INFINITY;
    for (const maxMoves of [0, 7, 40, 160]) {
      const plan = planSync({ ...request, maxMoves });
      expect(plan.moves).toBeLessThanOrEqual(maxMoves);
      expect(plan.parStep.after.mean).toBeLessThanOrEqual(plan.parStep.before.mean);
      expect(plan.parStep.after.mean).toBeLessThan(previous);
      previous = plan.parStep.after.mean;
    }
    const perLayer = planSync({ ...request, maxMovesPerLayer: 5 });
    expect(Math.max(...perLayer.movesPerLayer)).toBeLessThanOrEqual(5);
    expect(perLayer.moves).toBeGreaterThan(0);
  });

  it('with a quarter of the moves of flashlb is no worse on the next steps in the mean, on no trace by more than 1%', async () => {
    const ours: number[] = [];
    const theirs: number[] = [];
    for (const [devices, slots, layers, kinds] of [
      [32, 9, 58, ['steady', 'drifting', 'bursty', 'mixed']],
      [64, 5, 24, ['drifting', 'bursty']],
      [64, 4, 24, ['drifting', 'bursty']],
    ] as const)
      for (const kind of kinds) {
        const shape = { devices, slots, window: 32 };
        const trace = generateTrace({ kind, steps: 96, layers, experts: 256, seed: 9, tokens: 2048 });
        const [flashlb] = await simulate(trace, { ...shape, policies: ['flashlb'] });
        const maxMoves = Math.floor(flashlb!.moves / 4);
        const [adaptive] = await simulate(trace, { ...shape, policies: ['adaptive'], maxMoves });
        expect(adaptive!.moves).toBeLessThanOrEqual(maxMoves);
        expect(adaptive!.parStepNext, `${kind} ${devices}x${slots}`).toBeLessThanOrEqual(
          1.01 * flashlb!.parStepNext,
        );
        ours.push(adaptive!.parStepNext);
        theirs.push(flashlb!.parStepNext);
      }
    const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
    expect(mean(ours)).toBeLessThanOrEqual(mean(theirs));
  }, 60_000);
});
