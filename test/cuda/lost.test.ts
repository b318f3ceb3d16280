// A kernel that writes through an invalid address takes the device from the process. The addon with deliberate faults
// (npm run build:cuda -- --test-hooks) is put where the package looks, in a copy of the package.
import { cpSync, existsSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { packageRoot } from '../../lib/package.js';
import { child, ready } from './device.js';

const hooks = join(packageRoot, 'out', 'cuda-hooks');
const copy = ready && existsSync(join(hooks, 'build')) ? mkdtempSync(join(tmpdir(), 'moe-lost-')) : '';
if (copy !== '') {
  for (const name of ['package.json', 'dist', 'build']) {
    cpSync(join(packageRoot, name), join(copy, name), {
      recursive: true,
      filter: (path) => !/obj\.target|\.deps/.test(path),
    });
  }
  cpSync(hooks, join(copy, 'out', 'cuda'), { recursive: true });
  symlinkSync(join(packageRoot, 'node_modules'), join(copy, 'node_modules'));
}
afterAll(() => copy && rmSync(copy, { recursive: true }));

const setUp = `const ctx = await m.createContext({ backend: 'cuda' });
  const other = await m.createContext({ backend: 'cuda' });
  const x = ctx.tensor('f32', [64, 64], new Float32Array(4096).fill(1));
  const step = ctx.capture(() => m.moeRouter({ hidden: x, weight: x }));
  const load = ctx.tensor('i64', [64]); // what it counts has not come to it yet
  m.moeFusedGate({ logits: x, load }, { topK: 2 });
  await ctx.synchronize();
  const code = (work) => { try { work(); return 'none'; } catch (error) { return error.code; } };
  const rejection = (wait) => wait.then(() => 'none', (error) => error.code);
  const sink = () => { process.env.MOE_KERNELS_TEST_ILLEGAL_ACCESS = '1'; const out = m.moeRouter({ hidden: x, weight: x });
    delete process.env.MOE_KERNELS_TEST_ILLEGAL_ACCESS; return out; };`;
const lost = 'ERR_MOE_DEVICE_LOST';

describe.runIf(copy !== '')('a lost device', () => {
  it('rejects pending waits, and the context refuses everything after', () => {
    const end = child(
      `${setUp}
      const out = sink();
      const waits = [out.read(), ctx.synchronize(), load.read()].map(rejection);
      console.log((await Promise.all(waits)).join());
      console.log(ctx.state, code(() => ctx.tensor('f32', [1])), code(() => m.moeRouter({ hidden: x, weight: x })),
        code(() => step.replay()), code(() => x.write(new Float32Array(4096))), code(() => ctx.synchronizeSync()),
        await rejection(x.read()));
      out.dispose(); step.dispose(); x.dispose(); load.dispose();
      await ctx.close();
      console.log('closed');`,
      { cwd: copy },
    );
    expect(end).toMatchObject({
      status: 0,
      signal: null,
      stdout: `${lost},${lost},${lost}\nlost ${Array(6).fill(lost).join(' ')}\nclosed`,
    });
  });

  it('is noticed by calls that block and by plain calls', () => {
    const end = child(
      `${setUp}
      sink();
      console.log(code(() => x.readSync()), ctx.state);
      console.log(await rejection(other.synchronize()), other.state);
      console.log(await rejection(m.createContext({ backend: 'cuda' })));`,
      { cwd: copy },
    );
    expect(end).toMatchObject({ status: 0, signal: null });
    expect(end.stdout).toBe(`${lost} lost\n${lost} lost\n${lost}`);
  });

  it('lets the process end by itself', () => {
    const end = child(`${setUp} sink(); sink().read().catch((error) => console.log(error.code));`, {
      cwd: copy,
    });
    expect(end).toMatchObject({ status: 0, signal: null, stdout: lost });
  });
});
