// The op tests, the contract, the misuse list, the states and the fuzzers on a CPU addon built with AddressSanitizer
// and UndefinedBehaviorSanitizer:
//
//   npm run test:asan                 all of them
//   npm run test:asan -- test/ops     these only
//
// They run in a copy of the tree (out/asan), because an addon lives in one place of its package. Leaks are not looked
// for: node gives back little of its own at exit, and every stack that ends in the addon begins in node, so that no
// suppression tells the two apart. test/process/leaks.test.ts and test/native/run.sh look for them.
import { execFileSync, spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, rmSync, symlinkSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildTypescript, installedHeaders, missingTools } from './build.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const tree = join(root, 'out', 'asan');
const suites = ['test/ops', 'test/contract', 'test/misuse', 'test/states', 'test/fuzz'];

const compiler = process.env.CXX ?? 'g++';
/** A library of the compiler's own, by its path; undefined where it has none. */
function library(name) {
  const { status, stdout } = spawnSync(compiler, [`-print-file-name=${name}`], { encoding: 'utf8' });
  const path = stdout?.trim();
  return status === 0 && path !== name && existsSync(path) ? path : undefined;
}

// The runtime must come first in the process, before node's own malloc, and with the C++ library whose exceptions it
// intercepts: node itself carries another one inside.
const preloaded = ['libasan.so', 'libstdc++.so.6'].map(library);
if (process.platform !== 'linux' || missingTools().length > 0 || preloaded.includes(undefined)) {
  console.error(`expected Linux, a C++ compiler and its sanitizers (CXX is ${compiler})`);
  process.exit(1);
}
if (!buildTypescript({ missingOnly: true })) process.exit(1);

// What the addon is built from keeps its times, so that a second run compiles only what has changed
mkdirSync(tree, { recursive: true });
for (const name of readdirSync(tree)) {
  if (name !== 'build') rmSync(join(tree, name), { recursive: true, force: true });
}
for (const name of [
  'package.json',
  'binding.gyp',
  'vitest.config.ts',
  'tsconfig.json',
  'README.md',
  'lib',
  'csrc',
  'test',
  'scripts',
  'bench',
  'dist',
]) {
  cpSync(join(root, name), join(tree, name), {
    recursive: true,
    preserveTimestamps: true,
    filter: (from) => !/test.(fixtures|model)/.test(from),
  });
}
symlinkSync(join(root, 'node_modules'), join(tree, 'node_modules'));

const sanitizers = '-fsanitize=address,undefined -fno-sanitize-recover=undefined';
const begun = Date.now();
process.stderr.write('Building the CPU addon with sanitizers ... ');
try {
  const nodeGyp = join(root, 'node_modules', 'node-gyp', 'bin', 'node-gyp.js');
  execFileSync(
    process.execPath,
    [nodeGyp, 'configure', 'build', '--release', '-j', 'max', '--loglevel', 'error', ...installedHeaders()],
    {
      cwd: tree,
      stdio: ['ignore', 'ignore', 'inherit'],
      env: { ...process.env, CXXFLAGS: `${sanitizers} -fno-omit-frame-pointer -g1 -O1`, LDFLAGS: sanitizers },
    },
  );
} catch {
  process.exit(1);
}
process.stderr.write(`${((Date.now() - begun) / 1000).toFixed(1)} s\n`);

const environment = {
  ...process.env,
  CI: '', // the counts of CI are those of the plain suite
  MOE_KERNELS_TEST_BACKENDS: 'cpu',
  LD_PRELOAD: preloaded.join(' '),
  // Requests that no memory serves are part of the tests
  ASAN_OPTIONS: 'detect_leaks=0:halt_on_error=1:abort_on_error=1:allocator_may_return_null=1',
  UBSAN_OPTIONS: 'halt_on_error=1:print_stacktrace=1',
};

const vitest = join(root, 'node_modules', 'vitest', 'vitest.mjs');
const chosen = process.argv.slice(2);
const { status } = spawnSync(process.execPath, [vitest, 'run', ...(chosen.length > 0 ? chosen : suites)], {
  cwd: tree,
  stdio: 'inherit',
  env: environment,
});
process.exit(status ?? 1);
