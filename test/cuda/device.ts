// Whether there is a CUDA device to test on. Where MOE_KERNELS_TEST_BACKENDS names cuda there has to be one.
import { spawnSync } from 'node:child_process';
import { loadBackend } from '../../lib/native.js';
import { packageRoot } from '../../lib/package.js';

export const { status } = loadBackend('cuda');
export const named = (process.env.MOE_KERNELS_TEST_BACKENDS ?? '').split(',').includes('cuda');
export const ready = status.state === 'ready';
if (named && !ready) throw new Error(`the cuda backend is ${status.state}: ${status.detail}`);

/** Runs a script that has the package as `m` in a process of its own. */
export function child(
  code: string,
  { env = {}, cwd = packageRoot }: { env?: Record<string, string>; cwd?: string } = {},
) {
  const script = `import * as m from 'moe-kernels';\n${code}`;
  const { status, signal, stdout, stderr } = spawnSync(
    process.execPath,
    ['--expose-gc', '--input-type=module', '-e', script],
    {
      cwd,
      env: { ...process.env, ...env },
      encoding: 'utf8',
      timeout: 120_000,
    },
  );
  return { status, signal, stdout: stdout.trim(), stderr: stderr.trim() };
}

export const values = (length: number, seed = 1): Float32Array =>
  Float32Array.from({ length }, (_, i) => (((i * 7919 + seed * 104729) % 2003) - 1001) / 512);
