// Runs the command line as a user would: the compiled program, in a process of its own.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { packageRoot } from '../../lib/package.js';

export const fixture = (family: string): string => join(packageRoot, 'test', 'fixtures', 'hf', family);

export interface Outcome {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export function moeKernels(args: readonly string[], env: Record<string, string> = {}): Outcome {
  const main = join(packageRoot, 'dist', 'lib', 'cli', 'main.js');
  const { status, stdout, stderr } = spawnSync(process.execPath, [main, ...args], {
    encoding: 'utf8',
    env: { ...process.env, ...env },
  });
  return { status, stdout, stderr };
}
