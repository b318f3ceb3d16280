// What a CUDA context does besides its ops: data in and out, waits short and long, several contexts, ranges.
import { describe, expect, it } from 'vitest';
import { createContext, moeCombine, moeRouter, packExperts, sharedExperts } from '../../lib/index.js';
import { child, ready, values } from './device.js';

describe.runIf(ready)('a cuda context', () => {
  it('gives back what was written, in every dtype', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const floats = values(1000);
    expect(await ctx.tensor('f32', [10, 100], floats).read()).toEqual(floats);
    const bits = Uint16Array.from({ length: 4096 }, (_, i) => i * 16);
    for (const dtype of ['bf16', 'f16'] as const) {
      expect(await ctx.tensor(dtype, [4096], bits).readRaw()).toEqual(bits);
      expect(ctx.tensor(dtype, [4096], bits).readRawSync()).toEqual(bits);
      const rounded = await ctx.tensor(dtype, [1000], floats).read();
      rounded.forEach(
        (x, i) => void expect(Math.abs(x - floats[i])).toBeLessThanOrEqual(Math.abs(floats[i]) / 128),
      );
    }
    const ints = Int32Array.from({ length: 77 }, (_, i) => i - 30);
    expect(await ctx.tensor('i32', [77], ints).read()).toEqual(ints);
    const longs = BigInt64Array.from({ length: 5 }, (_, i) => BigInt(i) << 40n);
    expect(await ctx.tensor('i64', [5], longs).read()).toEqual(longs);
    const bytes = Uint8Array.from({ length: 3 }, (_, i) => i + 250);
    expect(await ctx.tensor('u8', [3], bytes).read()).toEqual(bytes);
    expect(await ctx.tensor('f32', [300]).read()).toEqual(new Float32Array(300));
    expect(await ctx.tensor('f32', [0, 5]).read()).toEqual(new Float32Array(0));
  });

  it('moves data larger than its staging memory', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const large = new Uint16Array(45_000_001).map((_, i) => i * 31);
    const tensor = ctx.tensor('bf16', [45_000_001], large);
    large.fill(0, 0, 10); // the data was taken before the call returned
    const back = await tensor.readRaw();
    for (let i = 0; i < 10; i++) expect(back[i]).toBe((i * 31) & 0xffff);
    expect(Buffer.compare(Buffer.from(back.buffer, 20), Buffer.from(large.buffer, 20))).toBe(0);
  });

  it('keeps writes and ops in order', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const weight = ctx.tensor('f32', [1, 4], Float32Array.of(1, 1, 1, 1));
    const hidden = ctx.tensor('f32', [1, 4], new Float32Array(4));
    const sums: Promise<unknown>[] = [];
    for (let i = 0; i < 200; i++) {
      hidden.write(new Float32Array(4).fill(i));
      const logits = moeRouter({ hidden, weight });
      sums.push(logits.read().then((out) => expect(out[0]).toBe(4 * i)));
      logits.dispose();
    }
    await Promise.all(sums);
  });

  it('answers waits that are short and waits that are long, in order', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const hidden = ctx.tensor('f32', [2048, 4096], values(2048 * 4096));
    const weight = ctx.tensor('f32', [512, 4096], values(512 * 4096, 2));
    const order: number[] = [];
    const begun = performance.now();
    const waits = [ctx.synchronize().then(() => order.push(0))];
    for (let i = 1; i <= 20; i++) {
      moeRouter({ hidden, weight }).dispose();
      waits.push(ctx.synchronize().then(() => order.push(i)));
    }
    const enqueued = performance.now() - begun;
    await Promise.all(waits);
    expect(order).toEqual(Array.from({ length: 21 }, (_, i) => i));
    expect(enqueued).toBeLessThan(performance.now() - begun);
  });

  it('closes after its work', async () => {
    const ctx = await createContext({ backend: 'cuda' });
    const hidden = ctx.tensor('f32', [2048, 4096], values(2048 * 4096));
    const out = moeRouter({ hidden, weight: hidden });
    const read = out.read();
    await ctx.close();
    expect((await read).length).toBe(2048 * 2048);
    expect(() => ctx.tensor('f32', [1])).toThrow(expect.objectContaining({ code: 'ERR_MOE_DISPOSED' }));
  });

  it('keeps contexts apart and copies between them', async () => {
    await using one = await createContext({ backend: 'cuda' });
    await using two = await createContext({ backend: 'cuda' });
    await using cpu = await createContext({ backend: 'cpu' });
    const hidden = one.tensor('f32', [3, 8], values(24));
    const weight = two.tensor('f32', [2, 8], values(16, 2));
    expect(() => moeRouter({ hidden, weight })).toThrow(
      expect.objectContaining({
        code: 'ERR_MOE_WRONG_CONTEXT',
        message: expect.stringContaining('tensor.to(context)'),
      }),
    );
    const here = moeRouter({ hidden: await hidden.to(two), weight });
    const there = moeRouter({ hidden: await hidden.to(cpu), weight: await weight.to(cpu) });
    const [a, b] = [await here.read(), await there.read()];
    a.forEach((x, i) => void expect(x).toBeCloseTo(b[i], 4));
  });

  it('drops numbers out of range and tells at the next wait, once', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const rows = ctx.tensor('f32', [2, 4], new Float32Array(8).fill(1));
    const inverse = ctx.tensor('i32', [1, 3], Int32Array.of(0, 1_000_000_000, 1));
    const weights = ctx.tensor('f32', [1, 3], Float32Array.of(1, 10, 2));
    const out = moeCombine({ rows, inverse, weights });
    await expect(ctx.synchronize()).rejects.toMatchObject({
      code: 'ERR_MOE_RANGE',
      op: 'moe_combine',
      arg: 'inverse',
      message: expect.stringContaining('1000000000'),
    });
    expect(await out.read()).toEqual(new Float32Array(4).fill(3));
    moeCombine({ rows, inverse, weights });
    expect(() => ctx.synchronizeSync()).toThrow(expect.objectContaining({ code: 'ERR_MOE_RANGE' }));
    await ctx.synchronize();
  });

  it('gives the same bits from run to run', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const hidden = ctx.tensor('bf16', [100, 256], values(25600));
    const w13 = ctx.tensor('bf16', [1, 512, 256], values(512 * 256, 2));
    const w2 = ctx.tensor('bf16', [1, 256, 256], values(256 * 256, 3));
    const experts = packExperts({ w13, w2 });
    const first = await sharedExperts({ hidden, experts }).readRaw();
    for (let i = 0; i < 5; i++) expect(await sharedExperts({ hidden, experts }).readRaw()).toEqual(first);
  });

  it('works in worker threads, and lets them be terminated at work', () => {
    const code = `import { Worker } from 'node:worker_threads';
      const source = \`import * as m from 'moe-kernels'; import { parentPort } from 'node:worker_threads';
        const ctx = await m.createContext({ backend: 'cuda' });
        const hidden = ctx.tensor('f32', [512, 1024], new Float32Array(512 * 1024).fill(1));
        const step = () => m.moeRouter({ hidden, weight: hidden });
        parentPort.postMessage((await step().read())[0]);
        for (;;) { for (let i = 0; i < 20; i++) step().dispose(); await ctx.synchronize(); }\`;
      const workers = Array.from({ length: 4 }, () => new Worker(new URL('data:text/javascript,' +
        encodeURIComponent(source.replace("'moe-kernels'", JSON.stringify(import.meta.resolve('moe-kernels')))))));
      const sums = await Promise.all(workers.map((w) => new Promise((done, fail) => (w.on('message', done), w.on('error', fail)))));
      console.log(sums.join());
      await new Promise((done) => setTimeout(done, 50));
      await Promise.all(workers.map((w) => w.terminate()));
      console.log('terminated');`;
    expect(child(code)).toMatchObject({ status: 0, signal: null, stdout: '1024,1024,1024,1024\nterminated' });
  });

  it('lets the process end with work and reads pending', () => {
    const busy = `const ctx = await m.createContext({ backend: 'cuda' });
      const hidden = ctx.tensor('f32', [2048, 2048], new Float32Array(2048 * 2048).fill(1));
      for (let i = 0; i < 50; i++) m.moeRouter({ hidden, weight: hidden }).read().catch(() => {});`;
    expect(child(`${busy} process.exit(7);`)).toMatchObject({ status: 7, signal: null });
    expect(child(`${busy} throw new Error('on purpose');`)).toMatchObject({ status: 1, signal: null });
    expect(
      child(`const ctx = await m.createContext({ backend: 'cuda' }); console.log('idle');`),
    ).toMatchObject({
      status: 0,
      signal: null,
      stdout: 'idle',
    });
  });
});
