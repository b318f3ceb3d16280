import { getEventListeners } from 'node:events';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { buildLibrary } from '../cases/loads_build.js';

type PlannerModule = typeof import('../../lib/eplb/planner.js');
type PlanModule = typeof import('../../lib/eplb/plan.js');
type TraceModule = typeof import('../../lib/eplb/trace.js');
type LoadsModule = typeof import('../../lib/eplb/loads.js');

let planners: PlannerModule;
let plans: PlanModule;
let traces: TraceModule;
let loadsModule: LoadsModule;
const open: { close(): Promise<void> }[] = [];

beforeAll(async () => {
  const built = await buildLibrary('planner');
  const load = (file: string) => import(pathToFileURL(resolve(built, 'eplb', file)).href);
  planners = await load('planner.js');
  plans = await load('plan.js');
  traces = await load('trace.js');
  loadsModule = await load('loads.js');
}, 60_000);
afterAll(async () => {
  for (const planner of open) await planner.close();
});

const planner = (options?: import('../../lib/eplb/planner.js').PlannerOptions) => {
  const made = new planners.Planner(options);
  open.push(made);
  return made;
};
const request = (layers = 12) => ({
  loads: traces.generateTrace({ kind: 'drifting', steps: 16, layers, experts: 128, seed: 4, tokens: 512 }),
  devices: 16,
  slots: 9,
});

describe('Planner', () => {
  it('plans on its thread what planSync plans here, with progress, plan after plan', async () => {
    const worker = planner();
    const asked = request();
    const seen: number[] = [];
    const plan = await worker.plan(asked, { onProgress: (done, layers) => void seen.push(done / layers) });
    const here = plans.planSync(asked);
    expect(plan.moves).toBe(here.moves);
    expect(plan.from.map((placement) => placement.toRows())).toEqual(
      here.from.map((placement) => placement.toRows()),
    );
    expect(plan.placements.every((placement, layer) => placement.equals(here.placements[layer]!))).toBe(true);
    expect(seen.length).toBeGreaterThan(0);
    expect(seen.at(-1)).toBe(1);
    expect(asked.loads.counts.length).toBe(16 * 12 * 128);
    const then = { ...asked, current: plan.placements, memory: plan.memory, maxMoves: 5 };
    const [second, third] = await Promise.all([worker.plan(then), worker.plan(then)]);
    expect(second!.moves).toBeLessThanOrEqual(5);
    expect(third!.moves).toBe(second!.moves);
  });

  it('leaves the main thread free', async () => {
    let turns = 0;
    const timer = setInterval(() => turns++, 1);
    await planner().plan(request(40));
    clearInterval(timer);
    expect(turns).toBeGreaterThan(5);
  });

  it.each(['worker', 'main'] as const)('outlives a callback that throws, on thread %s', async (thread) => {
    const made = planner({ thread });
    const onProgress = () => {
      throw new RangeError('mine');
    };
    await expect(made.plan(request(), { onProgress })).rejects.toThrow('mine');
    const worse = { signal: {} as AbortSignal };
    await expect(made.plan(request(), worse)).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      arg: 'signal',
    });
    await expect(made.plan(request(), { onProgress: 5 as never })).rejects.toMatchObject({
      arg: 'onProgress',
    });
    expect((await made.plan(request())).placements.length).toBe(12);
  });

  it('rejects what cannot cross threads, and lets the process go', async () => {
    const made = planner();
    const uncloneable = { ...request(), memory: () => 1 };
    await expect(made.plan(uncloneable)).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      arg: 'memory',
      message: expect.stringMatching(/expected memory to be .*could not be cloned/),
    });
    expect((await made.plan(request())).placements.length).toBe(12);
  });

  it('aborts a plan that waits for its turn at once, and listens to no signal afterwards', async () => {
    const made = planner();
    const { signal } = new AbortController();
    const first = made.plan(request(40), { signal });
    const controller = new AbortController();
    const second = made.plan(request(40), { signal: controller.signal });
    const third = made.plan(request());
    const begun = performance.now();
    controller.abort('never mind');
    await expect(second).rejects.toMatchObject({ code: 'ERR_MOE_ABORTED', cause: 'never mind' });
    expect(performance.now() - begun).toBeLessThan(100);
    expect((await first).placements.length).toBe(40);
    expect((await third).placements.length).toBe(12);
    for (const each of [signal, controller.signal]) expect(getEventListeners(each, 'abort')).toEqual([]);
  });

  it('rejects an aborted plan and can plan again', async () => {
    const worker = planner();
    const controller = new AbortController();
    const cancelled = worker.plan(
      { ...request(200), policy: 'flashlb' },
      { signal: controller.signal, onProgress: () => controller.abort('enough') },
    );
    await expect(cancelled).rejects.toMatchObject({ code: 'ERR_MOE_ABORTED', cause: 'enough' });
    await expect(worker.plan(request(), { signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ERR_MOE_ABORTED',
    });
    expect((await worker.plan(request(2))).layersTouched).toBe(2);
    const main = planner({ thread: 'main' });
    const stop = new AbortController();
    await expect(
      main.plan(request(), { signal: stop.signal, onProgress: () => stop.abort() }),
    ).rejects.toMatchObject({ code: 'ERR_MOE_ABORTED' });
  });

  it('brings errors of the thread back as they were', async () => {
    const worker = planner();
    const idle = new loadsModule.Loads({ steps: 1, layers: 1, experts: 4 }, [0, 0, 0, 0]);
    await expect(worker.plan({ loads: idle, devices: 2, slots: 2 })).rejects.toThrow(
      'layer 0: expected some load but received all zero',
    );
    await expect(worker.plan({ loads: idle, devices: 2, slots: 1 })).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      op: 'plan',
      arg: 'slots',
    });
    expect((await worker.plan({ loads: idle, devices: 2, slots: 2, degenerate: 'keep' })).moves).toBe(0);
    await worker.close();
    await expect(worker.plan(request(1))).rejects.toMatchObject({ code: 'ERR_MOE_DISPOSED' });
  });

  it('makes a single plan and leaves no thread behind', async () => {
    const plan = await planners.planExperts(request(3));
    expect(plan.placements.length).toBe(3);
  });
});
