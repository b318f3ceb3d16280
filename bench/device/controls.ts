// What runs beside the package in the same run: the program that measures the device's ceilings, and PyTorch doing the
// same work. Each is a child process with a time limit; a control that cannot run says why, and its column stays empty.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join, relative } from 'node:path';
import { packageRoot } from '../../lib/package.js';
import type { Ceilings, Figures } from './case.js';

const CEILINGS = join(packageRoot, 'out', 'bench-cuda', 'ceilings');

/** Ceilings of the first device, by a program of bench/cuda. */
export function measureCeilings(): Ceilings {
  if (!existsSync(CEILINGS)) {
    throw new Error(
      `${relative(packageRoot, CEILINGS)} is missing: 'npm run build:cuda -- --bench' makes it`,
    );
  }
  const { status, stdout, stderr, error } = spawnSync(CEILINGS, { encoding: 'utf8', timeout: 60_000 });
  if (status !== 0) throw new Error(`${CEILINGS} failed: ${error?.message ?? (stderr || stdout).trim()}`);
  return JSON.parse(stdout) as Ceilings;
}

/** A line of bench/torch_*.py. */
export interface ControlLine {
  /** What is timed, with its dtype: as `control` of a case names it. */
  readonly work: string;
  readonly tokens: number;
  readonly implementation: string;
  readonly microseconds: number;
}

export interface Control {
  readonly script: string;
  /** Versions and the like, as the script tells them. */
  readonly about: Readonly<Record<string, unknown>>;
  readonly lines: readonly ControlLine[];
  /** Why there are no lines, or not all of them. */
  readonly note?: string;
}

/** Runs a script of bench/ with python3 and takes what it has printed until its end or the limit. */
export function runControl(script: string, limitSeconds: number, args: readonly string[] = []): Control {
  const { status, stdout, stderr, error } = spawnSync(
    'python3',
    [join(packageRoot, 'bench', script), ...args],
    { encoding: 'utf8', timeout: 1000 * limitSeconds, killSignal: 'SIGKILL', maxBuffer: 2 ** 26 },
  );
  return {
    script,
    ...readControl(stdout ?? '', { status, stderr: stderr ?? '', ...(error ? { error } : {}) }),
  };
}

export function readControl(
  stdout: string,
  { status, stderr, error }: { status: number | null; stderr: string; error?: Error },
): Omit<Control, 'script'> {
  const about: Record<string, unknown> = {};
  const lines: ControlLine[] = [];
  for (const text of stdout.split('\n').filter((line) => line.startsWith('{') && line.endsWith('}'))) {
    const line = JSON.parse(text) as Record<string, unknown>;
    if ('microseconds' in line) lines.push(line as unknown as ControlLine);
    else Object.assign(about, line);
  }
  const code = (error as NodeJS.ErrnoException | undefined)?.code;
  const last = stderr.trim().split('\n').at(-1);
  const note =
    typeof about.skipped === 'string'
      ? about.skipped
      : code === 'ENOENT'
        ? 'no python3 on this machine'
        : code === 'ETIMEDOUT'
          ? 'stopped at its time limit'
          : status === 0
            ? undefined
            : `failed (${status ?? error?.message}): ${last}`;
  return { about, lines, ...(note === undefined ? {} : { note }) };
}

/** What controls took for the work of a case, by implementation. */
export function controlFigures(
  controls: readonly Control[],
  work: string | undefined,
  tokens: number,
): Figures {
  const lines = controls.flatMap(({ lines }) => lines);
  return Object.fromEntries(
    lines
      .filter((line) => line.work === work && line.tokens === tokens)
      .map(({ implementation, microseconds }) => [implementation, microseconds]),
  );
}
