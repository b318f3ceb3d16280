import { spawnSync } from 'node:child_process';
import { closeSync, existsSync, openSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { packageRoot } from '../../lib/package.js';

const main = join(packageRoot, 'dist', 'lib', 'cli', 'main.js');

describe.skipIf(!existsSync('/dev/full'))('standard output', () => {
  it('on a full disk is an error in words, and exit code 2', () => {
    const full = openSync('/dev/full', 'w');
    const { status, stderr } = spawnSync(process.execPath, [main, 'plan', '--help'], {
      encoding: 'utf8',
      stdio: ['ignore', full, 'pipe'],
    });
    closeSync(full);
    expect(stderr).toBe('the output cannot be written (ENOSPC: no space left on device, write)\n');
    expect(status).toBe(2);
  });
});
