// Puts what the npm package carries beside dist/: prebuilds/<platform>-<arch>/moe_cpu.<libc>.node, made here, and
// out/cuda/prebuilds/<platform>-<arch>/moe_cuda.<libc>.node, which `npm run build:cuda` has made before, if it has.
// Each in a folder of its own: node-gyp-build takes one .node of a folder, whatever its name.
import { spawnSync } from 'node:child_process';
import { cpSync, mkdirSync, rmSync, statSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { installedHeaders } from './build.mjs';
import { cudaProduct } from './build-cuda.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));

function prebuildCpu() {
  const [headers] = installedHeaders();
  const env = { ...process.env };
  if (headers !== undefined) env.npm_config_nodedir = headers.replace('--nodedir=', '');
  // One N-API addon serves every Node version, so one target is enough: the one that runs this.
  const args = ['--napi', '--strip', '--tag-libc', '--name', 'moe_cpu', '--target', process.version.slice(1)];
  const prebuildify = join(root, 'node_modules', 'prebuildify', 'bin.js');
  const { status } = spawnSync(process.execPath, [prebuildify, ...args], {
    cwd: root,
    env,
    stdio: ['ignore', 2, 2],
  });
  return status === 0;
}

function prebuildCuda() {
  const prebuilds = join(root, 'out', 'cuda', 'prebuilds');
  rmSync(prebuilds, { recursive: true, force: true });
  const { path, built, fresh } = cudaProduct('moe_cuda');
  if (!built) {
    console.error("Without the CUDA addon: none is built ('npm run build:cuda' makes one, with nvcc).");
    return true;
  }
  if (!fresh) {
    console.error(`${relative(root, path)} is older than its sources: 'npm run build:cuda', or remove it.`);
    return false;
  }
  const libc = process.platform === 'linux' ? '.glibc' : '';
  const copy = join(prebuilds, `${process.platform}-${process.arch}`, `moe_cuda${libc}.node`);
  mkdirSync(dirname(copy), { recursive: true });
  cpSync(path, copy);
  console.error(`With the CUDA addon: ${(statSync(copy).size / 1e6).toFixed(1)} MB.`);
  return true;
}

/** Whether the package can load what it will carry. */
function loads() {
  const list = `import { backendStatuses } from './dist/lib/index.js';
    for (const { backend, state, detail } of backendStatuses())
      if (state === 'failed') { console.error(backend + ': ' + detail); process.exitCode = 1; }`;
  const { status } = spawnSync(process.execPath, ['--input-type=module', '-e', list], {
    cwd: root,
    env: { ...process.env, PREBUILDS_ONLY: '1' }, // of node-gyp-build
    stdio: ['ignore', 2, 2],
  });
  return status === 0;
}

process.exit(prebuildCuda() && prebuildCpu() && loads() ? 0 : 1);
