// Processes of their own, for what a process may do and for what may end one.
import { spawn, spawnSync } from 'node:child_process';
import { packageRoot } from '../../lib/package.js';

/** Has the package as `m`, and `big(ctx, n)`, which gives a function that enqueues work of n tokens. */
const preamble = `
  import * as m from 'moe-kernels';
  const big = (ctx, n = 64) => {
    const values = (shape) => ctx.tensor('f32', shape, new Float32Array(shape.reduce((a, b) => a * b)).fill(0.01));
    const experts = m.packExperts({ w13: values([8, 512, 256]), w2: values([8, 256, 256]) });
    const ids = ctx.tensor('i32', [n, 2], Int32Array.from({ length: 2 * n }, (_, i) => i % 8));
    const [hidden, weights] = [values([n, 256]), values([n, 2])];
    return () => m.fusedMoe({ hidden, ids, weights, experts });
  };`;

export interface ChildOptions {
  readonly flags?: readonly string[];
  readonly cwd?: string;
  readonly node?: string;
  readonly env?: Readonly<Record<string, string>>;
  readonly timeout?: number;
}

const argumentsOf = (code: string, flags: readonly string[]) => [
  ...flags,
  '--input-type=module',
  '-e',
  preamble + code,
];

/** Runs a script to its end and says how it ended. */
export function child(code: string, options: ChildOptions = {}) {
  const { flags = [], cwd = packageRoot, node = process.execPath, env = {}, timeout = 60_000 } = options;
  const begun = performance.now();
  const { status, signal, stdout, stderr } = spawnSync(node, argumentsOf(code, flags), {
    cwd,
    encoding: 'utf8',
    timeout,
    killSignal: 'SIGKILL',
    env: { ...process.env, ...env },
  });
  return { status, signal, stdout: stdout.trim(), stderr, seconds: (performance.now() - begun) / 1e3 };
}

/** Starts a script and sends it a signal as soon as it has printed something. */
export function killed(code: string, how: NodeJS.Signals) {
  const begun = performance.now();
  return new Promise<{ status: number | null; signal: string | null; stdout: string; seconds: number }>(
    (resolve) => {
      const started = spawn(process.execPath, argumentsOf(code, []), { cwd: packageRoot });
      const limit = setTimeout(() => started.kill('SIGKILL'), 60_000);
      let stdout = '';
      started.stdout.on('data', (text) => {
        if (stdout === '') started.kill(how);
        stdout += text;
      });
      started.on('close', (status, signal) => {
        clearTimeout(limit);
        resolve({ status, signal, stdout: stdout.trim(), seconds: (performance.now() - begun) / 1e3 });
      });
    },
  );
}

export const good = { status: 0, signal: null };
