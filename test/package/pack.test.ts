// What users get: the packed tarball in an empty folder, and the repository on a machine without a compiler. Both
// work on a copy of the tree, because packing rebuilds what other tests are using.
import { execFileSync, spawnSync } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadBackend } from '../../lib/native.js';
import { packageRoot } from '../../lib/package.js';

const scratch = mkdtempSync(join(tmpdir(), 'moe-kernels-pack-'));
const tree = join(scratch, 'tree');
/** The CUDA addon of this clone, where one is built. */
const { loadedFrom: cudaAddon, state: cudaState } = loadBackend('cuda').status;
const cudaBuild = join(tree, 'out', 'cuda', 'build', 'Release', 'moe_cuda.node');

beforeAll(() => {
  const listed = execFileSync('git', ['ls-files', '-z', '--cached', '--others', '--exclude-standard'], {
    cwd: packageRoot,
    encoding: 'utf8',
  });
  for (const file of listed.split('\0').filter((file) => file !== '')) {
    mkdirSync(join(tree, dirname(file)), { recursive: true });
    cpSync(join(packageRoot, file), join(tree, file), { force: true });
  }
  symlinkSync(join(packageRoot, 'node_modules'), join(tree, 'node_modules'));
  mkdirSync(dirname(cudaBuild), { recursive: true });
  if (cudaAddon !== undefined) cpSync(cudaAddon, cudaBuild);
});
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

describe('the packed tarball', () => {
  let files: string[];
  const home = join(scratch, 'consumer');

  beforeAll(() => {
    const packed = spawnSync('npm', ['pack', '--json', '--pack-destination', scratch], {
      cwd: tree,
      encoding: 'utf8',
    });
    expect(packed.status, packed.stderr).toBe(0);
    expect(packed.stderr).toMatch(
      cudaAddon === undefined ? /Without the CUDA addon: none is built/ : /With the CUDA addon: \d/,
    );
    const [{ filename, files: list }] = JSON.parse(packed.stdout.slice(packed.stdout.indexOf('[')));
    files = list.map(({ path }: { path: string }) => path);
    mkdirSync(home);
    writeFileSync(join(home, 'package.json'), '{ "private": true }');
    const install = ['install', '--no-audit', '--no-fund', '--prefer-offline', join(scratch, filename)];
    const installed = spawnSync('npm', install, { cwd: home, encoding: 'utf8' });
    expect(installed.status, installed.stderr).toBe(0);
  }, 300_000);

  it('holds the library, prebuilds, the sources of the CPU addon and the papers, and nothing else', () => {
    const platform = `${process.platform}-${process.arch}`;
    const addons = files
      .filter((file) => file.endsWith('.node'))
      .map((file) => file.replace(/\.\w+\.node$/, ''));
    const expected = [`prebuilds/${platform}/moe_cpu`];
    if (cudaAddon !== undefined) expected.push(`out/cuda/prebuilds/${platform}/moe_cuda`);
    expect(addons.sort()).toEqual(expected.sort());
    for (const file of [
      'dist/lib/index.js',
      'dist/lib/index.d.ts',
      'dist/binding.gyp',
      'README.md',
      'LICENSE',
      'CHANGELOG.md',
    ]) {
      expect(files).toContain(file);
    }
    const strangers =
      /\.test\.|fixtures|node_modules|^build\/|^\.|^lib\/|^csrc\/cuda|^binding\.gyp|^out\/(?!cuda\/prebuilds)/;
    expect(files.filter((file) => strangers.test(file))).toEqual([]);
  });

  it('compiles nothing when it is installed from a lock file', () => {
    // A lock file does not keep `gypfile: false`: npm would run node-gyp wherever it finds a binding.gyp
    const install = ['ci', '--no-audit', '--no-fund', '--prefer-offline'];
    const installed = spawnSync('npm', install, { cwd: home, encoding: 'utf8' });
    expect(installed.status, installed.stderr).toBe(0);
    expect(installed.stderr).not.toContain('install scripts');
    expect(existsSync(join(home, 'node_modules', 'moe-kernels', 'build'))).toBe(false);
  }, 120_000);

  const smoke = `
    const ctx = await m.createContext();
    const logits = ctx.tensor('f32', [1, 4], Float32Array.of(1, 4, 3, 2));
    const { ids } = m.moeFusedGate({ logits }, { topK: 2 });
    console.log(ctx.backend, [...(await ids.read())].join());
    await ctx.close();`;

  it.each([
    ['import', `import * as m from 'moe-kernels';${smoke}`, ['--input-type=module']],
    ['require', `const m = require('moe-kernels');(async () => {${smoke}})();`, ['--input-type=commonjs']],
    [
      // A path has no exports, only a main.
      'require of its folder',
      `const m = require('./node_modules/moe-kernels');(async () => {${smoke}})();`,
      ['--input-type=commonjs'],
    ],
  ])('works through %s, on a prebuilt addon', (_, code, flags) => {
    const [major, minor] = process.versions.node.split('.').map(Number);
    // require() of an ES module needed no flag from 20.19 and 22.12 on, and warned on 20.
    expect(major > 20 || minor >= 19).toBe(true);
    const run = spawnSync(process.execPath, [...flags, '--no-warnings', '-e', code], {
      cwd: home,
      encoding: 'utf8',
    });
    expect(run.stderr).toBe('');
    expect(run.stdout.trim()).toBe(cudaState === 'ready' ? 'cuda 1,2' : 'cpu 1,2');
  });

  it('brings a command line that says where the addons came from', () => {
    const run = spawnSync('npx', ['--no-install', 'moe-kernels', 'doctor', '--json'], {
      cwd: home,
      encoding: 'utf8',
    });
    expect(run.status, run.stderr).toBe(0);
    const { cpu, cuda } = JSON.parse(run.stdout).backends;
    const folder = join('node_modules', 'moe-kernels', 'out', 'cuda');
    if (cudaAddon === undefined) {
      expect(cuda.state).toBe('not built');
      expect(cuda.detail).toMatch(
        /no addon for .* in this package: as published it has one for linux-x64 \(glibc\); elsewhere 'npm run build:cuda' in a clone makes one/,
      );
      expect(cuda.attempts).toMatchObject([{ path: expect.stringContaining(folder) }]);
    } else {
      expect(['ready', 'no driver', 'no device']).toContain(cuda.state);
      expect(cuda.loadedFrom).toContain(join(folder, 'prebuilds'));
    }
    expect(cpu.state).toBe('ready');
    expect(cpu.loadedFrom).toContain(join('node_modules', 'moe-kernels', 'prebuilds'));
    expect(cpu.selfTest.ok).toBe(true);
  });

  it('is typed for its users', () => {
    writeFileSync(
      join(home, 'user.mts'),
      `import { createContext, moeFusedGate, type Tensor } from 'moe-kernels';
       const ctx = await createContext({ backend: 'cpu' });
       const logits = ctx.tensor('bf16', [2, 8], new Float32Array(16));
       const { ids, weights }: { ids: Tensor<'i32'>; weights: Tensor<'f32'> } = moeFusedGate({ logits }, { topK: 2 });
       const values: Float32Array = await weights.read();
       // @ts-expect-error topK is required
       moeFusedGate({ logits }, {});
       // @ts-expect-error ids are not logits
       moeFusedGate({ logits: ids }, { topK: 2 });
       export { values };`,
    );
    const tsc = join(packageRoot, 'node_modules', 'typescript', 'bin', 'tsc');
    const flags = [
      '--noEmit',
      '--strict',
      '--target',
      'es2022',
      '--module',
      'nodenext',
      '--lib',
      'es2023,esnext.disposable',
    ];
    const types = ['--types', 'node', '--typeRoots', join(packageRoot, 'node_modules', '@types')];
    const run = spawnSync(process.execPath, [tsc, ...flags, ...types, 'user.mts'], {
      cwd: home,
      encoding: 'utf8',
    });
    expect(run.stdout).toBe('');
  });
});

describe('a CUDA addon that is older than its sources', () => {
  it('is not packed', () => {
    writeFileSync(cudaBuild, 'of yesterday');
    utimesSync(cudaBuild, new Date(0), new Date(0));
    const run = spawnSync(process.execPath, ['scripts/prebuild.mjs'], { cwd: tree, encoding: 'utf8' });
    rmSync(cudaBuild);
    expect(run.status).toBe(1);
    expect(run.stderr).toMatch(
      /moe_cuda\.node is older than its sources: 'npm run build:cuda', or remove it/,
    );
    expect(existsSync(join(tree, 'out', 'cuda', 'prebuilds'))).toBe(false);
  });
});

describe('a machine without a compiler', () => {
  it('runs the main job in pure TypeScript and says so', () => {
    const bin = join(scratch, 'bin');
    mkdirSync(bin);
    symlinkSync(process.execPath, join(bin, 'node'));
    rmSync(join(tree, 'build'), { recursive: true, force: true });
    rmSync(join(tree, 'prebuilds'), { recursive: true, force: true });
    const run = spawnSync(process.execPath, ['scripts/start.mjs'], {
      cwd: tree,
      encoding: 'utf8',
      env: { PATH: bin },
    });
    expect(run.status, run.stderr + run.stdout).toBe(0);
    expect(run.stderr).toMatch(/CPU addon is not built: missing on this machine: a C\+\+20 compiler/);
    expect(run.stderr).toMatch(/pure TypeScript/);
    expect(run.stdout).toMatch(/oracle/);
  }, 120_000);
});
