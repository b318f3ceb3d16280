// Several GPUs in one process: every context stays on its own, whichever was used last.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  type Context,
  createContext,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeFusedGate,
  moeRouter,
  packExperts,
  type Tensor,
} from '../../lib/index.js';
import { child, ready, status, values } from './device.js';

const [TOKENS, HIDDEN, INTERMEDIATE, EXPERTS] = [300, 128, 64, 16];

/** A layer, every op of it on its own and fused. Wide enough for kernels that ask for more shared memory than usual. */
function layer(context: Context) {
  const bf16 = (shape: number[], seed: number) => {
    const data = values(
      shape.reduce((a, b) => a * b),
      seed,
    ).map((x) => x / 16);
    return context.tensor('bf16', shape, data);
  };
  const hidden = bf16([TOKENS, HIDDEN], 1);
  const weight = bf16([EXPERTS, HIDDEN], 2);
  const experts = packExperts({
    w13: bf16([EXPERTS, 2 * INTERMEDIATE, HIDDEN], 3),
    w2: bf16([EXPERTS, HIDDEN, INTERMEDIATE], 4),
  });
  return () => {
    const logits = moeRouter({ hidden, weight });
    const { ids, weights } = moeFusedGate(
      { logits },
      { topK: 4, groups: 4, topGroups: 2, renormalize: true },
    );
    const { order, inverse, counts, rows } = moeDispatch(
      { ids, hidden },
      { experts: EXPERTS, blockSize: 16 },
    );
    const combined = moeCombine({ rows: rows!, inverse, weights });
    return {
      logits,
      ids,
      weights,
      order,
      counts,
      combined,
      fused: fusedMoe({ hidden, ids, weights, experts }),
    };
  };
}

async function read(outputs: Record<string, Tensor>) {
  return Object.fromEntries(
    await Promise.all(Object.entries(outputs).map(async ([name, tensor]) => [name, await tensor.readRaw()])),
  );
}

describe.runIf(ready && status.devices.length > 1)('several devices', () => {
  let contexts: Context[];
  beforeAll(async () => {
    contexts = await Promise.all(
      status.devices.map((_, device) => createContext({ backend: 'cuda', device })),
    );
  });
  afterAll(() => Promise.all(contexts.map((context) => context.close())));

  it('names the device of every context', () => {
    expect(contexts.map((context) => context.describe().device)).toEqual(status.devices);
  });

  it('keeps contexts on their devices, in turn and at once, plain and captured', async () => {
    const layers = contexts.map(layer);
    // The last device first: what is set up once for a process must not be set up for the first device alone
    const last = await read(layers.at(-1)!());
    const same = status.devices.every((name) => name === status.devices[0]);
    for (let round = 0; round < 5; round++) {
      const outputs = layers.map((run) => run()); // no wait between devices
      for (const output of outputs) {
        const got = await read(output);
        if (same) expect(got).toEqual(last);
        expect(Object.keys(got)).toEqual(Object.keys(last));
      }
    }
    const steps = contexts.map((context, device) => context.capture(layers[device]));
    for (const step of [...steps, ...steps.toReversed()]) step.replay();
    for (const step of steps) {
      const got = await read(step.output);
      if (same) expect(got).toEqual(last);
    }
    for (const step of steps) step.dispose();
  });

  it('copies tensors from one device to another', async () => {
    const [one, two] = contexts;
    const data = values(100_000);
    const moved = await one.tensor('f32', [100_000], data).to(two);
    expect(moved.context).toBe(two);
    expect(await moved.read()).toEqual(data);
    const hidden = one.tensor('f32', [3, 8], values(24));
    const weight = two.tensor('f32', [2, 8], values(16));
    expect(() => moeRouter({ hidden, weight })).toThrow(
      expect.objectContaining({ code: 'ERR_MOE_WRONG_CONTEXT' }),
    );
  });

  it('counts memory apart', () => {
    const before = contexts.map((context) => context.memory().used);
    const tensor = contexts[1].tensor('u8', [1 << 24]);
    const more = contexts.map((context, device) => context.memory().used - before[device]);
    expect(more).toEqual(contexts.map((_, device) => (device === 1 ? 1 << 24 : 0)));
    tensor.dispose();
  });

  it('tells what was out of range to the context that it happened in', async () => {
    const [one, two] = contexts;
    const inputs = (context: Context, place: number) => ({
      rows: context.tensor('f32', [1, 4], new Float32Array(4).fill(1)),
      inverse: context.tensor('i32', [1, 1], Int32Array.of(place)),
      weights: context.tensor('f32', [1, 1], Float32Array.of(2)),
    });
    moeCombine(inputs(two, 5));
    const right = moeCombine(inputs(one, 0));
    await one.synchronize();
    expect(await right.read()).toEqual(new Float32Array(4).fill(2));
    await expect(two.synchronize()).rejects.toMatchObject({ code: 'ERR_MOE_RANGE' });
  });

  it('works in a thread for every device', () => {
    const code = `import { Worker } from 'node:worker_threads';
      const source = \`import * as m from 'moe-kernels'; import { parentPort, workerData } from 'node:worker_threads';
        const ctx = await m.createContext({ backend: 'cuda', device: workerData });
        const hidden = ctx.tensor('f32', [64, 1024], new Float32Array(64 * 1024).fill(1));
        for (let i = 0; i < 100; i++) m.moeRouter({ hidden, weight: hidden }).dispose();
        parentPort.postMessage((await m.moeRouter({ hidden, weight: hidden }).read())[0]);
        await ctx.close();\`;
      const url = new URL('data:text/javascript,' +
        encodeURIComponent(source.replace("'moe-kernels'", JSON.stringify(import.meta.resolve('moe-kernels')))));
      const workers = [${status.devices.map((_, device) => device)}].map((workerData) => new Worker(url, { workerData }));
      const sums = await Promise.all(workers.map((w) => new Promise((done, fail) => (w.on('message', done), w.on('error', fail)))));
      console.log(sums.join());`;
    expect(child(code)).toMatchObject({ status: 0, stdout: status.devices.map(() => 1024).join() });
  });
});
