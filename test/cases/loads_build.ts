// Compiles lib/ for the tests that need the built package: worker threads and child processes, which cannot load
// TypeScript on the oldest Node this package supports.
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import { resolve } from 'node:path';
import { promisify } from 'node:util';

/** Compiles into a folder of its own below out/ and returns where the modules of lib/ are. */
export async function buildLibrary(name: string): Promise<string> {
  const folder = resolve('out', 'test', name);
  await rm(folder, { recursive: true, force: true });
  await mkdir(folder, { recursive: true });
  const compiler = resolve('node_modules', 'typescript', 'bin', 'tsc');
  await promisify(execFile)(process.execPath, [
    compiler,
    '-p',
    '.',
    '--outDir',
    folder,
    '--declaration',
    'false',
  ]);
  const lib = resolve(folder, 'lib');
  return existsSync(lib) ? lib : folder;
}
