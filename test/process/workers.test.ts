// Worker threads that are terminated in the middle of their work, again and again.
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it } from 'vitest';
import { packageRoot } from '../../lib/package.js';
import { backends } from '../ops/backends.js';
import { child, good } from './child.js';

describe.each(backends.filter((backend) => backend !== 'oracle'))('workers with %s contexts', (backend) => {
  // On a GPU every context costs streams and a memory pool, of which a device takes its time to make hundreds
  const [rounds, workers] = backend === 'cpu' ? [25, 20] : [5, 4];

  it(`survive ${rounds} rounds of ${workers} terminated at work`, () => {
    const end = child(
      `import { readdirSync } from 'node:fs';
      import { Worker } from 'node:worker_threads';
      // Only what is needed: most of the time of ${rounds * workers} workers is spent on importing
      const lib = ${JSON.stringify(pathToFileURL(join(packageRoot, 'dist', 'lib')).href)};
      const code = \`import { parentPort, workerData } from 'node:worker_threads';
      Promise.all(['create_context', 'ops/fused_moe', 'ops/pack_experts'].map((name) => import('\${lib}/' + name + '.js'))).then(async (all) => {
        const { createContext, fusedMoe, packExperts } = Object.assign({}, ...all);
        const ctx = await createContext({ backend: '${backend}', threads: 2 });
        const values = (shape) => ctx.tensor('f32', shape, new Float32Array(shape.reduce((a, b) => a * b)).fill(0.01));
        const experts = packExperts({ w13: values([4, 128, 64]), w2: values([4, 64, 64]) });
        const ids = ctx.tensor('i32', [512, 2]);
        const [hidden, weights] = [values([512, 64]), values([512, 2])];
        const run = () => fusedMoe({ hidden, ids, weights, experts });
        const step = ctx.capture(run);
        parentPort.once('message', async () => {
          // Different moments of death: waiting, replaying, closing another context, blocked
          for (;;) {
            for (let i = 0; i < 5; i++) run().read().catch(() => {});
            if (workerData % 4 === 0) await ctx.synchronize();
            if (workerData % 4 === 1) { step.replay(); await step.output.read(); }
            if (workerData % 4 === 2) {
              const other = await createContext({ backend: '${backend}', threads: 2 });
              other.tensor('f32', [100]).read().catch(() => {});
              await other.close();
            }
            if (workerData % 4 === 3) ctx.synchronizeSync();
          }
        });
        parentPort.postMessage('ready');
      });\`;
      const threads = () => readdirSync('/proc/self/task').length;
      let before;
      for (let round = 0; round < ${rounds}; round++) {
        const all = Array.from({ length: ${workers} }, (_, i) => new Worker(code, { eval: true, workerData: i }));
        await Promise.all(all.map((worker) => new Promise((ready, failed) => worker.once('message', ready).once('error', failed))));
        for (const worker of all) worker.postMessage('go');
        await new Promise((later) => setTimeout(later, 2 * round));
        await Promise.all(all.map((worker) => worker.terminate()));
        if (round === 2) before = threads();
      }
      console.log('alive', threads() <= before + 2);`,
      { timeout: 170_000 },
    );
    expect(end, end.stderr).toMatchObject({ ...good, stdout: 'alive true' });
  }, 180_000);
});
