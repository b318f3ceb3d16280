// Fuzzes the binding and the ops for as long as it is told:
//
//   npm run fuzz -- [--seconds 60] [--seed N] [--backend cpu|cuda]
//
// Without a seed it takes a new one and prints it; a failing case is minimised and printed with what makes it again.
import { spawnSync } from 'node:child_process';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const { values } = parseArgs({
  options: {
    seconds: { type: 'string', default: '60' },
    seed: { type: 'string', default: String(Math.floor(Math.random() * 2 ** 31)) },
    backend: { type: 'string', default: 'cpu' },
  },
});
for (const [name, most] of [
  ['seconds', 1e6],
  ['seed', 2 ** 31 - 1],
]) {
  const value = Number(values[name]);
  if (Number.isInteger(value) && value >= (name === 'seed' ? 0 : 1) && value <= most) continue;
  console.error(`expected --${name}: an integer up to ${most} but received '${values[name]}'`);
  process.exit(2);
}
if (!['cpu', 'cuda'].includes(values.backend)) {
  console.error(`expected --backend: cpu or cuda but received '${values.backend}'`);
  process.exit(2);
}
const vitest = join(root, 'node_modules', 'vitest', 'vitest.mjs');
const { status } = spawnSync(process.execPath, [vitest, 'run', 'test/fuzz', '--reporter=verbose'], {
  cwd: root,
  stdio: 'inherit',
  env: {
    ...process.env,
    MOE_KERNELS_TEST_BACKENDS: values.backend,
    MOE_KERNELS_FUZZ_BACKEND: values.backend,
    MOE_KERNELS_FUZZ_SECONDS: values.seconds,
    MOE_KERNELS_FUZZ_SEED: values.seed,
  },
});
process.exit(status ?? 1);
