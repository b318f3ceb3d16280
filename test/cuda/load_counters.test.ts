// The counters that a load tensor has beside itself: how much memory they take and when it goes back. Where there is
// none for them: memory.test.ts. What is counted: test/contract/load_counting.test.ts.
import { describe, expect, it } from 'vitest';
import { type Context, createContext, moeFusedGate, type Tensor } from '../../lib/index.js';
import { child, ready, values } from './device.js';

const [TOKENS, EXPERTS, TOP_K] = [300, 256, 6];
const MIB = 1 << 20;

function gate(context: Context) {
  const logits = context.tensor('f32', [TOKENS, EXPERTS], values(TOKENS * EXPERTS));
  return (load: Tensor<'i64'>) => {
    const { ids, weights } = moeFusedGate({ logits, load }, { topK: TOP_K });
    ids.dispose();
    weights.dispose();
  };
}

const total = (counts: BigInt64Array) => Number(counts.reduce((sum, n) => sum + n, 0n));

describe.runIf(ready)('counters of a load on cuda', () => {
  it('take memory from the first count on, once, until the tensor goes', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const count = gate(ctx);
    const before = ctx.memory().used;
    const load = ctx.tensor('i64', [EXPERTS]);
    expect(ctx.memory().used - before).toBe(8 * EXPERTS);
    count(load);
    const held = ctx.memory().used - before;
    expect(held).toBeGreaterThan(8 * EXPERTS);
    expect(held).toBeLessThan(4 * MIB);
    for (let i = 0; i < 10; i++) count(load);
    load.write(new BigInt64Array(EXPERTS));
    count(load);
    expect(total(await load.read())).toBe(TOKENS * TOP_K);
    expect(ctx.memory().used - before).toBe(held);
    count(load);
    load.dispose(); // with the count in flight
    expect(ctx.memory().used).toBe(before);
  });

  it('live as long as a capture that counts there', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const count = gate(ctx);
    const before = ctx.memory().used;
    const load = ctx.tensor('i64', [EXPERTS]);
    const step = ctx.capture(() => count(load));
    const held = ctx.memory().used - before;
    expect(held).toBeGreaterThan(8 * EXPERTS);
    step.replay();
    expect(total(await load.read())).toBe(TOKENS * TOP_K);
    load.dispose();
    expect(ctx.memory().used - before).toBe(held);
    const other = ctx.tensor('i64', [EXPERTS]);
    for (let i = 0; i < 5; i++) {
      step.replay();
      count(other);
    }
    expect(total(await other.read())).toBe(5 * TOKENS * TOP_K);
    other.dispose();
    step.replay();
    step.dispose();
    expect(ctx.memory().used).toBe(before);
  });

  it('are not made for a tensor of a capture, nor for one that a capture writes first', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const count = gate(ctx);
    const load = ctx.tensor('i64', [EXPERTS]);
    using inside = ctx.capture(() => {
      const made = ctx.tensor('i64', [EXPERTS]);
      count(made);
      return made;
    });
    using clear = ctx.capture(() => load.write(new BigInt64Array(EXPERTS)));
    const before = ctx.memory().used;
    count(load);
    count(inside.output);
    expect(ctx.memory().used).toBe(before);
    clear.replay();
    count(load);
    expect(total(await load.read())).toBe(TOKENS * TOP_K);
    inside.replay();
    expect(total(await inside.output.read())).toBe(TOKENS * TOP_K);
  });

  it('may be outstanding when a context, a worker or the process ends', () => {
    const code = `import { Worker } from 'node:worker_threads';
      const source = \`import * as m from 'moe-kernels'; import { parentPort } from 'node:worker_threads';
        const ctx = await m.createContext({ backend: 'cuda' });
        const logits = ctx.tensor('f32', [512, 64], Float32Array.from({ length: 512 * 64 }, (_, i) => (i * 37) % 64));
        const load = ctx.tensor('i64', [64]);
        const count = () =>
          Object.values(m.moeFusedGate({ logits, load }, { topK: 2 })).forEach((tensor) => tensor?.dispose());
        for (let i = 0; i < 100; i++) count();
        parentPort.postMessage(Number((await load.read()).reduce((sum, n) => sum + n)));
        for (;;) { for (let i = 0; i < 20; i++) count(); await ctx.synchronize(); }\`;
      const url = new URL('data:text/javascript,' +
        encodeURIComponent(source.replace("'moe-kernels'", JSON.stringify(import.meta.resolve('moe-kernels')))));
      const workers = Array.from({ length: 3 }, () => new Worker(url));
      const sum = (w) => new Promise((done, fail) => (w.on('message', done), w.on('error', fail)));
      const sums = await Promise.all(workers.map(sum));
      await Promise.all(workers.map((w) => w.terminate()));
      const ctx = await m.createContext({ backend: 'cuda' });
      const logits = ctx.tensor('f32', [512, 64]), load = ctx.tensor('i64', [64]);
      const count = () => m.moeFusedGate({ logits, load }, { topK: 2 });
      const step = ctx.capture(count);
      count(); step.replay();
      const closed = await m.createContext({ backend: 'cuda' });
      m.moeFusedGate({ logits: closed.tensor('f32', [512, 64]), load: closed.tensor('i64', [64]) }, { topK: 2 });
      await closed.close();
      console.log(sums.join());`;
    const sum = 100 * 512 * 2;
    expect(child(code)).toMatchObject({ status: 0, signal: null, stdout: [sum, sum, sum].join() });
  });
});
