// Packs node, the addons, the tests and the benches for an x86-64 Linux host that has an NVIDIA driver but no node and
// no network: out/bundle/run.sh unpacks itself and runs the GPU suites with one command.
//
//   npm run bundle:offline                 builds what is missing, then packs out/bundle/ and moe-kernels-offline.tar
//   npm run bundle:offline -- --no-build   packs what is there
//   npm run bundle:offline -- --fixtures   with the checkpoints of test/fixtures and the suites of test/model (10 MB more)
//   npm run bundle:offline -- --cpu        without the CUDA addon, to try the bundle on a machine without nvcc
//
// The big parts (node, node_modules) are compressed once and kept in out/bundle-cache/.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildAddon, buildTypescript } from './build.mjs';
import { buildCuda } from './build-cuda.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const out = join(root, 'out', 'bundle');
const cache = join(root, 'out', 'bundle-cache');

/** What the suites import at run time; the rest of node_modules stays behind. */
const NEEDED = [
  'vitest',
  'fast-check',
  'commander',
  'cli-progress',
  'node-gyp-build',
  'node-addon-api',
  'node-api-headers',
];
const DROPPED = /^(lightningcss|@types\/|fsevents$|less$|sass|terser|jiti$|esbuild$|typescript$)/;
const APP = [
  'package.json',
  'vitest.config.ts',
  'tsconfig.json',
  'README.md',
  'lib',
  'test',
  'bench',
  'scripts',
  'csrc',
  'dist',
];
const BUILT = [
  'build/Release/moe_cpu.node',
  'out/cuda/build/Release/moe_cuda.node',
  'out/cuda-hooks/build/Release/moe_cuda.node',
  'out/bench-cuda/ceilings',
];

function run(command, args, options = {}) {
  const { status, error } = spawnSync(command, args, {
    cwd: root,
    stdio: ['ignore', 'inherit', 'inherit'],
    ...options,
  });
  if (status !== 0)
    throw new Error(`${command} ${args.slice(0, 4).join(' ')} failed${error ? `: ${error.message}` : ''}`);
}
const shell = (script, ...args) => run('bash', ['-euo', 'pipefail', '-c', script, 'bash', ...args]);

/** The node that runs this, stripped. */
function packNode() {
  const packed = join(cache, `node-${process.version}.xz`);
  if (!existsSync(packed)) {
    console.error(`Compressing node ${process.version}, once ...`);
    shell(
      'strip -o "$1.bin" "$2"; xz -T0 -6 -c "$1.bin" > "$1.part"; rm "$1.bin"; mv "$1.part" "$1"',
      packed,
      realpathSync(process.execPath),
    );
  }
  cpSync(packed, join(out, 'node.xz'));
}

/** Folders of the needed packages and of everything they depend on. */
function closure() {
  const folders = new Set();
  const locate = (name, from) => {
    for (let folder = from; ; folder = dirname(folder)) {
      const found = join(folder, 'node_modules', name);
      if (existsSync(found)) return found;
      if (folder === dirname(folder)) return undefined;
    }
  };
  const add = (name, from) => {
    const folder = DROPPED.test(name) ? undefined : locate(name, from);
    if (folder === undefined || folders.has(folder)) return;
    folders.add(folder);
    const { dependencies, optionalDependencies } = JSON.parse(
      readFileSync(join(folder, 'package.json'), 'utf8'),
    );
    for (const each of Object.keys({ ...dependencies, ...optionalDependencies })) add(each, folder);
  };
  for (const name of NEEDED) add(name, root);
  return [...folders].map((folder) => relative(root, folder)).sort();
}

function packModules() {
  const key = createHash('sha256')
    .update(readFileSync(join(root, 'package-lock.json')))
    .update(NEEDED.join())
    .digest('hex');
  const packed = join(cache, `node_modules-${key.slice(0, 12)}.tar.xz`);
  if (!existsSync(packed)) {
    console.error('Compressing node_modules, once ...');
    const list = join(cache, 'list');
    writeFileSync(list, closure().join('\n'));
    shell(
      `tar c --exclude='*.map' --exclude='*.d.ts' --exclude='*.d.mts' --exclude='*.d.cts' --exclude='*.md' --exclude='.cache' -T "$1" | xz -T0 -6 > "$2.part"; mv "$2.part" "$2"`,
      list,
      packed,
    );
  }
  cpSync(packed, join(out, 'node_modules.tar.xz'));
}

function packApp() {
  const left = process.argv.includes('--fixtures') ? /\.map$/ : /\.map$|test.(fixtures|model).|readme\.test/;
  const staging = mkdtempSync(join(tmpdir(), 'moe-bundle-'));
  try {
    for (const path of APP) {
      if (!existsSync(join(root, path))) continue;
      cpSync(join(root, path), join(staging, path), {
        recursive: true,
        filter: (from) => !left.test(from),
      });
    }
    for (const path of BUILT) {
      if (!existsSync(join(root, path))) continue;
      mkdirSync(join(staging, dirname(path)), { recursive: true });
      cpSync(join(root, path), join(staging, path));
    }
    // Programs of bench/cuda that were built beforehand
    const programs = join(root, 'out', 'bench-cuda');
    for (const name of existsSync(programs) ? readdirSync(programs) : []) {
      if (!name.endsWith('_bench')) continue;
      mkdirSync(join(staging, 'out', 'bench-cuda'), { recursive: true });
      cpSync(join(programs, name), join(staging, 'out', 'bench-cuda', name));
    }
    // A dictionary that holds both CUDA addons, which differ in little
    shell('tar c -C "$1" . | xz -9 > "$2"', staging, join(out, 'app.tar.xz'));
  } finally {
    rmSync(staging, { recursive: true });
  }
}

const megabytes = (path) => `${(statSync(path).size / 1e6).toFixed(1)} MB`;

if (process.platform !== 'linux' || process.arch !== 'x64')
  throw new Error('the bundle is for, and made on, linux-x64');
const cpuOnly = process.argv.includes('--cpu');
if (!process.argv.includes('--no-build')) {
  const built =
    buildTypescript({ missingOnly: true }) &&
    buildAddon({ missingOnly: true }) === true &&
    (cpuOnly || buildCuda({ missingOnly: true, hooks: true, bench: true }));
  if (!built) process.exit(1);
}
mkdirSync(cache, { recursive: true });
rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
packNode();
packModules();
packApp();
cpSync(join(root, 'scripts', 'offline', 'run.sh'), join(out, 'run.sh'));
chmodSync(join(out, 'run.sh'), 0o755);
const archive = join(root, 'out', 'moe-kernels-offline.tar');
shell('tar cf "$1" -C "$2" --transform "s,^\\.,moe-kernels-offline," .', archive, out);
for (const name of readdirSync(out)) console.log(`${name}: ${megabytes(join(out, name))}`);
console.log(`${relative(root, archive)}: ${megabytes(archive)}`);
