import { describe, expect, it } from 'vitest';
import { stepPar } from '../../lib/eplb/metrics.js';
import { planSync, startPlacements } from '../../lib/eplb/plan.js';
import { policies } from '../../lib/eplb/registry.js';
import { serveTrace } from '../../lib/eplb/serve.js';
import { simulate } from '../../lib/eplb/simulate.js';
import { generateTrace } from '../../lib/eplb/trace.js';

const trace = generateTrace({ kind: 'drifting', steps: 40, layers: 3, experts: 32, seed: 8, driftSteps: 40 });
const shape = { devices: 4, slots: 9 };

describe('simulate', () => {
  it('judges plan k on windows k and k + 1', async () => {
    const [figures] = await simulate(trace, { ...shape, window: 10, policies: ['greedy'] });
    const windows = trace.windows(10);
    let current = startPlacements(3, 32, 4, 9);
    const next: number[] = [];
    for (let index = 0; index < 3; index++) {
      current = planSync({ loads: windows[index]!, ...shape, policy: 'greedy', current }).placements;
      next.push(stepPar(windows[index + 1]!, current).mean);
    }
    expect(figures!.parStepNextByWindow).toEqual(next);
    expect(figures!.plans).toBe(3);
    expect(figures!.movesTotal).toBe(figures!.movesByPlan.reduce((sum, moves) => sum + moves, 0));
    expect(figures!.moves).toBe((figures!.movesByPlan[1]! + figures!.movesByPlan[2]!) / 2);
  });

  it('runs every policy, and binds the first plan only when asked', async () => {
    const all = await simulate(trace, { ...shape, window: 10, policies: [...policies.keys()], maxMoves: 4 });
    expect(all.map(({ name }) => name)).toEqual([...policies.keys()]);
    for (const { name, movesByPlan } of all) {
      for (const moves of movesByPlan.slice(1)) expect(moves).toBeLessThanOrEqual(4);
      if (name === 'adaptive') expect(movesByPlan[0]).toBeGreaterThan(4);
    }
    const [bound] = await simulate(trace, {
      ...shape,
      window: 10,
      policies: ['adaptive'],
      maxMoves: 4,
      budgetFirst: true,
    });
    expect(Math.max(...bound!.movesByPlan)).toBeLessThanOrEqual(4);
  });

  it('refuses fewer than two windows and stops on abort', async () => {
    await expect(simulate(trace, { ...shape, window: 21, policies: ['greedy'] })).rejects.toThrow(
      'at most 20 steps',
    );
    await expect(
      simulate(trace, { ...shape, window: 10, policies: ['greedy'], signal: AbortSignal.abort() }),
    ).rejects.toMatchObject({ code: 'ERR_MOE_ABORTED' });
  });
});

describe('serveTrace', () => {
  it('serves the old placement until a layer has moved, in layer order', async () => {
    const served = await serveTrace(trace, {
      ...shape,
      policy: 'greedy',
      collect: 8,
      plan: 3,
      layersPerStep: 2,
    });
    const start = startPlacements(3, 32, 4, 9);
    const plan = planSync({ loads: trace.window(0, 8), ...shape, policy: 'greedy' });
    const during = [plan.placements[0]!, plan.placements[1]!, start[2]!];
    // Steps 0..10 run as loaded; two layers switch after step 10, the third after step 11
    for (let step = 0; step <= 10; step++)
      expect(served.par[step]).toBe(stepPar(trace.window(step, 1), start).mean);
    expect(served.par[11]).toBe(stepPar(trace.window(11, 1), during).mean);
    expect(served.par[12]).toBe(stepPar(trace.window(12, 1), plan.placements).mean);
    expect(served.moves[10]! + served.moves[11]!).toBe(plan.moves);
    expect(served.plans).toBe(3);
    expect(served.mean).toBeCloseTo(served.par.reduce((sum, value) => sum + value, 0) / 40, 12);
  });

  it('starts with shared experts where a plan that keeps them on every device expects them', async () => {
    const pinned = { ...shape, policy: 'linear', shared: 1, sharedPlacement: 'everyDevice' as const };
    const served = await serveTrace(trace, { ...pinned, collect: 8, plan: 1, layersPerStep: 3 });
    const [start] = startPlacements(1, 32, 4, 9, 1);
    expect(start!.toRows().map((row) => row.at(-1))).toEqual([31, 31, 31, 31]);
    expect(served.par[0]).toBe(stepPar(trace.window(0, 1), [start!, start!, start!]).mean);
    const plan = planSync({ loads: trace.window(0, 8), ...pinned });
    expect(plan.moves).toBe(0);
    expect(plan.from.every((placement) => placement.equals(start!))).toBe(true);
  });

  it('refuses intervals that would never come round', async () => {
    await expect(serveTrace(trace, { ...shape, collect: 0, plan: 1, layersPerStep: 1 })).rejects.toThrow(
      'collect to be an integer >= 1 but received 0',
    );
  });
});
