// What a process may do around a context: leave, throw, be killed, end its workers, forget to close.
import { describe, expect, it } from 'vitest';
import { backends } from '../ops/backends.js';
import { child, good, killed } from './child.js';

describe.each(backends.filter((backend) => backend !== 'oracle'))(
  'a process with a %s context',
  (backend) => {
    const open = `const ctx = await m.createContext({ backend: '${backend}' });`;
    /** Work for seconds, that nobody has waited for. */
    const busy = `${open} const run = big(ctx, 4096); for (let i = 0; i < 50; i++) run();`;

    /** Bytes that V8 counts beside its heap; process.memoryUsage() shows only those of array buffers. */
    const told = `
    import { createRequire } from 'node:module';
    const addon = createRequire(import.meta.url)(m.backendStatuses().find(({ backend }) => backend === '${backend}').loadedFrom);
    const told = () => Math.round((addon.externalMemory() - atFirst) / 2 ** 20) + 0; // MiB: V8 has some of its own
    const atFirst = addon.externalMemory();`;

    it('ends although an idle context is open', () => {
      const end = child(`${open} await big(ctx)().read(); console.log(ctx.backend);`);
      expect(end).toMatchObject({ ...good, stdout: backend });
    });

    it('ends although work is queued that nobody waits for', () => {
      const end = child(`${busy} console.log('enqueued');`);
      expect(end).toMatchObject({ ...good, stdout: 'enqueued' });
      expect(end.seconds).toBeLessThan(15);
    });

    it.each([
      ['read', 'out.read().then((values) => console.log(values.length));', 64 * 256],
      ['synchronize', "ctx.synchronize().then(() => console.log('there'));", 'there'],
      ['close', "ctx.close().then(() => console.log('closed'));", 'closed'],
    ])('stays until a pending %s is answered', (_, wait, answer) => {
      const end = child(
        `${open} const run = big(ctx); let out; for (let i = 0; i < 20; i++) out = run(); ${wait}`,
      );
      expect(end).toMatchObject({ ...good, stdout: String(answer) });
    });

    it('may exit with work and reads pending', () => {
      const end = child(`${busy} for (let i = 0; i < 50; i++) run().read(); process.exit(7);`);
      expect(end).toMatchObject({ status: 7, signal: null });
      expect(end.seconds).toBeLessThan(15);
    });

    it.each(['exit', 'beforeExit'])('may use a context in its last moments: on %s', (event) => {
      const end = child(`${open} const run = big(ctx); run();
      process.once('${event}', () => { run(); console.log(run().readSync().length, ctx.memory().used > 0); });`);
      expect(end).toMatchObject({ ...good, stdout: `${64 * 256} true` });
    });

    it('may throw with work pending', () => {
      const end = child(
        `${busy} for (let i = 0; i < 50; i++) run().read().catch(() => {}); throw new Error('on purpose');`,
      );
      expect(end).toMatchObject({ status: 1, signal: null });
      expect(end.stderr).toMatch(/on purpose/);
      expect(end.seconds).toBeLessThan(15);
    });

    it('may throw in a callback, and leave a rejection unhandled, with work pending', () => {
      for (const fail of [
        "setTimeout(() => { throw new Error('on purpose'); })",
        "Promise.reject(new Error('on purpose'))",
      ]) {
        const end = child(`${busy} run().read().catch(() => {}); ${fail};`);
        expect(end).toMatchObject({ status: 1, signal: null });
        expect(end.stderr).toMatch(/on purpose/);
      }
    });

    it('ends at SIGTERM with work pending', async () => {
      const end = await killed(`${busy} run().read(); console.log('busy');`, 'SIGTERM');
      expect(end).toMatchObject({ status: null, signal: 'SIGTERM', stdout: 'busy' });
      expect(end.seconds).toBeLessThan(15);
    });

    it('may answer SIGTERM with exit, or with a close that has an end', async () => {
      const exits = await killed(
        `${busy} run().read(); process.on('SIGTERM', () => process.exit(3));
      setInterval(() => {}, 1000); console.log('busy');`,
        'SIGTERM',
      );
      expect(exits).toMatchObject({ status: 3, signal: null });
      const closes = await killed(
        `${open} const run = big(ctx, 4096); for (let i = 0; i < 500; i++) run();
      run().read().catch((error) => console.log(error.code));
      process.on('SIGTERM', () => ctx.close({ signal: AbortSignal.timeout(100) })
        .catch((error) => console.log(error.code)).then(() => setTimeout(() => process.exit(0))));
      setInterval(() => {}, 1000); console.log('busy');`,
        'SIGTERM',
      );
      expect(closes).toMatchObject(good);
      if (backend === 'cpu') expect(closes.stdout).toBe('busy\nERR_MOE_ABORTED\nERR_MOE_ABORTED');
      for (const end of [exits, closes]) expect(end.seconds).toBeLessThan(15);
    });

    it('ends at SIGKILL, and the next one finds everything as it was', async () => {
      expect(await killed(`${busy} console.log('busy');`, 'SIGKILL')).toMatchObject({ signal: 'SIGKILL' });
      expect(child(`${open} await ctx.close(); console.log('fine');`)).toMatchObject({
        ...good,
        stdout: 'fine',
      });
    });

    it('closes once, waits for the work, and refuses what comes after', () => {
      const end = child(`${open} const run = big(ctx);
      const read = run().read(); const closing = ctx.close(); console.log(closing === ctx.close());
      await closing; console.log((await read).length);
      try { ctx.tensor('f32', [1]); } catch (error) { console.log(error.code); }`);
      expect(end).toMatchObject({ ...good, stdout: `true\n${64 * 256}\nERR_MOE_DISPOSED` });
    });

    it('collects contexts, tensors and captures that were never closed or disposed', () => {
      const end = child(
        `${told}
      const collect = async () => { for (let i = 0; i < 20; i++) { globalThis.gc(); await new Promise((done) => setTimeout(done, 10)); } };
      let ctx = await m.createContext({ backend: '${backend}' });
      const before = ctx.memory().used;
      for (let i = 0; i < 200; i++) ctx.tensor('f32', [1024, 64]);
      await collect();
      console.log(ctx.memory().used - before < 200 * 1024 * 64 * 4 / 2);
      for (let i = 0; i < 100; i++) ctx.capture(() => ctx.tensor('f32', [1024, 64]));
      await collect();
      console.log(ctx.memory().used - before < 100 * 1024 * 64 * 4 / 2);
      for (let i = 0; i < 20; i++) (await m.createContext({ backend: '${backend}' })).tensor('f32', [1 << 20]);
      console.log(told() >= 20 * 4);
      ctx = undefined;
      await collect();
      console.log(told() < 2 * 4);`,
        { flags: ['--expose-gc'] },
      );
      expect(end, end.stderr).toMatchObject({ ...good, stdout: 'true\ntrue\ntrue\ntrue' });
    });

    it('tells the collector what is held, and takes it back at dispose, close and abandoned close', () => {
      const end = child(
        `${told}
      const ways = [
        (ctx, tensors) => { for (const tensor of tensors) tensor.dispose(); },
        (ctx) => ctx.close(),
        (ctx) => ctx.close({ signal: AbortSignal.abort() }).catch(() => {}),
        (ctx, tensors) => { const closing = ctx.close(); for (const tensor of tensors) tensor.dispose(); return closing; },
      ];
      for (const giveBack of ways) {
        const ctx = await m.createContext({ backend: '${backend}' });
        const tensors = Array.from({ length: 16 }, () => ctx.tensor('f32', [1 << 20]));
        tensors.push(m.allocateExperts(ctx, { slots: 4, hidden: 1024, intermediate: 1024, dtype: 'f32' }));
        const held = told();
        await giveBack(ctx, tensors);
        console.log(held >= 64 + tensors.at(-1).bytes / 2 ** 20, told());
        await ctx.close();
        console.log(told());
      }`,
      );
      expect(end, end.stderr).toMatchObject({ ...good, stdout: Array(4).fill('true 0\n0').join('\n') });
    });

    it('keeps contexts of several workers apart', () => {
      const end = child(`
      import { Worker } from 'node:worker_threads';
      const code = \`import { parentPort, workerData } from 'node:worker_threads'; import('moe-kernels').then(async (m) => {
        const ctx = await m.createContext({ backend: '${backend}' });
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
      const end = child(`${open}
      try { ctx.tensor('f32', [2 ** 41]); } catch ({ code, message }) { console.log(code, /requested \\d+ bytes/.test(message)); }
      console.log((await ctx.tensor('f32', [2]).read()).join());`);
      expect(end).toMatchObject({ ...good, stdout: 'ERR_MOE_OOM true\n0,0' });
    });
  },
);

it('starts no thread at import', () => {
  const end = child(`import { readdirSync } from 'node:fs';
    const count = () => readdirSync('/proc/self/task').length;
    console.log(typeof m.createContext, count() <= 12);`);
  if (process.platform === 'linux') expect(end).toMatchObject({ ...good, stdout: 'function true' });
});
