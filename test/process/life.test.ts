// What a process may do around a context: leave, throw, be killed, end its workers, forget to close.
import { spawnSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { packageRoot } from '../../lib/package.js';

/** Runs a script that has the package as `m` and a busy context as `ctx`, and says how it ended. */
function child(code: string, flags: readonly string[] = []) {
  const script = `
    import * as m from 'moe-kernels';
    const big = (ctx, n = 64) => {
      const values = (shape) => ctx.tensor('f32', shape, new Float32Array(shape.reduce((a, b) => a * b)).fill(0.01));
      const experts = m.packExperts({ w13: values([8, 512, 256]), w2: values([8, 256, 256]) });
      const ids = ctx.tensor('i32', [n, 2], Int32Array.from({ length: 2 * n }, (_, i) => i % 8));
      return () => m.fusedMoe({ hidden: values([n, 256]), ids, weights: values([n, 2]), experts });
    };
    ${code}`;
  const begun = performance.now();
  const { status, signal, stdout, stderr } = spawnSync(
    process.execPath,
    [...flags, '--input-type=module', '-e', script],
    {
      cwd: packageRoot,
      encoding: 'utf8',
      timeout: 60_000,
    },
  );
  return { status, signal, stdout: stdout.trim(), stderr, seconds: (performance.now() - begun) / 1e3 };
}

const good = { status: 0, signal: null };

describe('a process with a cpu context', () => {
  it('ends although an idle context is open', () => {
    const end = child(`const ctx = await m.createContext({ backend: 'cpu' }); console.log(ctx.backend);`);
    expect(end).toMatchObject({ ...good, stdout: 'cpu' });
  });

  it('ends although work is queued that nobody waits for', () => {
    const end = child(`const ctx = await m.createContext({ backend: 'cpu' }); const run = big(ctx, 2048);
      for (let i = 0; i < 50; i++) run(); console.log('enqueued');`);
    expect(end).toMatchObject({ ...good, stdout: 'enqueued' });
  });

  it('stays until a pending read is answered', () => {
    const end = child(`const ctx = await m.createContext({ backend: 'cpu' }); const run = big(ctx);
      let out; for (let i = 0; i < 20; i++) out = run();
      out.read().then((values) => console.log(values.length));`);
    expect(end).toMatchObject({ ...good, stdout: String(64 * 256) });
  });

  it('may exit with work and reads pending', () => {
    const end = child(`const ctx = await m.createContext({ backend: 'cpu' }); const run = big(ctx, 2048);
      for (let i = 0; i < 50; i++) run().read(); process.exit(7);`);
    expect(end).toMatchObject({ status: 7, signal: null });
    expect(end.seconds).toBeLessThan(15);
  });

  it('may throw with work pending', () => {
    const end = child(`const ctx = await m.createContext({ backend: 'cpu' }); const run = big(ctx, 2048);
      for (let i = 0; i < 50; i++) run().read().catch(() => {}); throw new Error('on purpose');`);
    expect(end).toMatchObject({ status: 1, signal: null });
    expect(end.stderr).toMatch(/on purpose/);
  });

  it('closes once, waits for the work, and refuses what comes after', () => {
    const end = child(`const ctx = await m.createContext({ backend: 'cpu' }); const run = big(ctx);
      const read = run().read(); const closing = ctx.close(); console.log(closing === ctx.close());
      await closing; console.log((await read).length);
      try { ctx.tensor('f32', [1]); } catch (error) { console.log(error.code); }`);
    expect(end).toMatchObject({ ...good, stdout: `true\n${64 * 256}\nERR_MOE_DISPOSED` });
  });

  it('collects contexts and tensors that were never closed or disposed', () => {
    const end = child(
      `let ctx = await m.createContext({ backend: 'cpu' });
      const before = ctx.memory().used;
      for (let i = 0; i < 200; i++) ctx.tensor('f32', [1024, 64]);
      for (let i = 0; i < 20; i++) { globalThis.gc(); await new Promise((done) => setTimeout(done, 10)); }
      console.log(ctx.memory().used - before < 200 * 1024 * 64 * 4 / 2);
      for (let i = 0; i < 100; i++) ctx.capture(() => ctx.tensor('f32', [1024, 64]));
      for (let i = 0; i < 20; i++) { globalThis.gc(); await new Promise((done) => setTimeout(done, 10)); }
      console.log(ctx.memory().used - before < 100 * 1024 * 64 * 4 / 2);
      for (let i = 0; i < 20; i++) await m.createContext({ backend: 'cpu' });
      ctx = undefined;
      for (let i = 0; i < 20; i++) { globalThis.gc(); await new Promise((done) => setTimeout(done, 10)); }`,
      ['--expose-gc'],
    );
    expect(end).toMatchObject({ ...good, stdout: 'true\ntrue' });
  });

  it('survives workers terminated in the middle of their work', () => {
    const end = child(`
      import { Worker } from 'node:worker_threads';
      const code = \`import { parentPort, workerData } from 'node:worker_threads'; import('moe-kernels').then(async (m) => {
        const ctx = await m.createContext({ backend: 'cpu', threads: 2 });
        const values = (shape) => ctx.tensor('f32', shape, new Float32Array(shape.reduce((a, b) => a * b)).fill(0.01));
        const experts = m.packExperts({ w13: values([8, 512, 256]), w2: values([8, 256, 256]) });
        const ids = ctx.tensor('i32', [512, 2]);
        const [hidden, weights] = [values([512, 256]), values([512, 2])];
        parentPort.postMessage('busy');
        for (;;) { for (let i = 0; i < 5; i++) m.fusedMoe({ hidden, ids, weights, experts }).read().catch(() => {}); await ctx.synchronize(); }
      });\`;
      for (let round = 0; round < 5; round++) {
        const workers = Array.from({ length: 4 }, () => new Worker(code, { eval: true }));
        await Promise.all(workers.map((worker) => new Promise((ready) => worker.once('message', ready))));
        await Promise.all(workers.map((worker) => worker.terminate()));
      }
      console.log('alive');`);
    expect(end, end.stderr).toMatchObject({ ...good, stdout: 'alive' });
  });

  it('keeps contexts of several workers apart', () => {
    const end = child(`
      import { Worker } from 'node:worker_threads';
      const code = \`import { parentPort, workerData } from 'node:worker_threads'; import('moe-kernels').then(async (m) => {
        const ctx = await m.createContext({ backend: 'cpu' });
        const x = ctx.tensor('f32', [1, 2], Float32Array.of(1, workerData));
        const y = await m.moeRouter({ hidden: x, weight: ctx.tensor('f32', [1, 2], Float32Array.of(0, 1)) }).read();
        await ctx.close();
        parentPort.postMessage(y[0]);
      });\`;
      const answers = await Promise.all([3, 4, 5].map((workerData) => new Promise((done) => new Worker(code, { eval: true, workerData }).once('message', done))));
      console.log(answers.join());`);
    expect(end, end.stderr).toMatchObject({ ...good, stdout: '3,4,5' });
  });

  it('goes on after a request that no machine can serve', () => {
    const end = child(`const ctx = await m.createContext({ backend: 'cpu' });
      try { ctx.tensor('f32', [2 ** 41]); } catch ({ code, message }) { console.log(code, /requested \\d+ bytes/.test(message)); }
      console.log((await ctx.tensor('f32', [2]).read()).join());`);
    expect(end).toMatchObject({ ...good, stdout: 'ERR_MOE_OOM true\n0,0' });
  });

  it('starts no thread at import', () => {
    const end = child(`import { readdirSync } from 'node:fs';
      const count = () => readdirSync('/proc/self/task').length;
      console.log(typeof m.createContext, count() <= 12);`);
    if (process.platform === 'linux') expect(end).toMatchObject({ ...good, stdout: 'function true' });
  });
});
