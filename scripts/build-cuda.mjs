// Builds out/cuda/build/Release/moe_cuda.node from CMakeLists.txt with cmake-js and nvcc; no GPU and no driver are
// needed for it.
//
//   node scripts/build-cuda.mjs                          sm_80, sm_90 and PTX
//   node scripts/build-cuda.mjs --architectures 90-real  as CMAKE_CUDA_ARCHITECTURES has them
//   node scripts/build-cuda.mjs --test-hooks             also the one of out/cuda-hooks, with deliberate faults
//   node scripts/build-cuda.mjs --bench                  also out/bench-cuda/ceilings, which bench/device.ts runs
//   node scripts/build-cuda.mjs --missing                only if the addon is older than its sources
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, statSync, utimesSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const OLDEST_NVCC = 12;
const OLDEST_CMAKE = [3, 24];

/** What the build lacks on this machine, for people; empty when nothing does. */
function missingCudaTools() {
  const missing = [];
  const nvcc = /release (\d+)\.(\d+)/.exec(output(process.env.CUDACXX ?? 'nvcc', '--version'));
  if (nvcc === null) missing.push('nvcc (the CUDA toolkit; set CUDACXX where it is not on PATH)');
  else if (Number(nvcc[1]) < OLDEST_NVCC) {
    missing.push(`nvcc ${OLDEST_NVCC} or newer (found ${nvcc[1]}.${nvcc[2]})`);
  }
  const cmake = /version (\d+)\.(\d+)/.exec(output('cmake', '--version'));
  const [major, minor] = OLDEST_CMAKE;
  if (cmake === null) missing.push('cmake');
  else if (Number(cmake[1]) < major || (Number(cmake[1]) === major && Number(cmake[2]) < minor)) {
    missing.push(`cmake ${major}.${minor} or newer (found ${cmake[1]}.${cmake[2]})`);
  }
  return missing;
}

/** What CMakeLists.txt can make, by target, and the folders of its sources. */
const ADDON_FOLDERS = ['csrc', 'csrc/binding', 'csrc/common', 'csrc/cuda'];
const PRODUCTS = {
  moe_cuda: { path: 'out/cuda/build/Release/moe_cuda.node', folders: ADDON_FOLDERS },
  moe_cuda_hooks: { path: 'out/cuda-hooks/build/Release/moe_cuda.node', folders: ADDON_FOLDERS },
  ceilings: { path: 'out/bench-cuda/ceilings', folders: ['bench/cuda'] },
};

/** Where a target is or would be, and whether it is there, newer than all that it is made of. */
export function cudaProduct(target) {
  const path = join(root, PRODUCTS[target].path);
  const built = existsSync(path);
  return { path, built, fresh: built && statSync(path).mtimeMs > newestSource(PRODUCTS[target].folders) };
}

export function buildCuda({ missingOnly = false, hooks = false, bench = false, architectures } = {}) {
  const targets = ['moe_cuda', ...(hooks ? ['moe_cuda_hooks'] : []), ...(bench ? ['ceilings'] : [])];
  if (missingOnly && targets.every((target) => cudaProduct(target).fresh)) return true;
  const missing = missingCudaTools();
  if (missing.length > 0) {
    console.error(`The CUDA addon is not built: this machine has no ${missing.join(', no ')}.`);
    return false;
  }
  const cmakeJs = join(root, 'node_modules', 'cmake-js', 'bin', 'cmake-js');
  const args = ['compile', '-d', root, '-O', join(root, 'out', 'build-cuda'), '-B', 'Release', '-l', 'warn'];
  args.push('--parallel', String(availableParallelism()));
  if (architectures !== undefined) args.push(`--CDCMAKE_CUDA_ARCHITECTURES=${architectures}`);
  const begun = Date.now();
  console.error('Building the CUDA addon ...');
  for (const target of targets) {
    const { status } = spawnSync(process.execPath, [cmakeJs, ...args, '-T', target], {
      cwd: root,
      stdio: 'inherit',
    });
    if (status !== 0) return false;
  }
  for (const { path } of targets.map(cudaProduct)) {
    utimesSync(path, new Date(), new Date()); // sources may be newer without a difference
    console.error(`${relative(root, path)}: ${(statSync(path).size / 1e6).toFixed(1)} MB`);
  }
  console.error(`${((Date.now() - begun) / 1000).toFixed(0)} s`);
  return true;
}

function newestSource(folders) {
  // The addon tells the version that package.json has
  let newest = Math.max(
    ...['CMakeLists.txt', 'package.json'].map((file) => statSync(join(root, file)).mtimeMs),
  );
  for (const folder of folders) {
    for (const name of readdirSync(join(root, folder))) {
      newest = Math.max(newest, statSync(join(root, folder, name)).mtimeMs);
    }
  }
  return newest;
}

function output(command, ...args) {
  return String(spawnSync(command, args, { encoding: 'utf8' }).stdout ?? '');
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const at = process.argv.indexOf('--architectures');
  const built = buildCuda({
    missingOnly: process.argv.includes('--missing'),
    hooks: process.argv.includes('--test-hooks'),
    bench: process.argv.includes('--bench'),
    ...(at < 0 ? {} : { architectures: process.argv[at + 1] }),
  });
  process.exit(built ? 0 : 1);
}
