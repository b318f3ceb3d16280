// Addons that are missing, damaged or for another machine, and the package twice in one process.
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadBackend } from '../../lib/native.js';
import { packageManifest, packageRoot } from '../../lib/package.js';
import { Random } from '../cases/random.js';
import { child, good } from './child.js';

const { status } = loadBackend('cpu');
const scratch = mkdtempSync(join(tmpdir(), 'moe-addons-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

/** A package of its own, with no addon yet; gives the folder, and the place that the CPU addon goes to. */
function copyOfPackage(name: string): { folder: string; addon: string } {
  const folder = join(scratch, name);
  mkdirSync(join(folder, 'build', 'Release'), { recursive: true });
  for (const part of ['package.json', 'dist']) {
    cpSync(join(packageRoot, part), join(folder, part), { recursive: true });
  }
  symlinkSync(join(packageRoot, 'node_modules'), join(folder, 'node_modules'));
  return { folder, addon: join(folder, 'build', 'Release', 'moe_cpu.node') };
}

/** What a service sees: which backend 'auto' takes, that it works, and what is said of the addon. */
const service = `
  const ctx = await m.createContext();
  const logits = ctx.tensor('f32', [1, 4], Float32Array.of(1, 4, 3, 2));
  console.log(ctx.backend, (await m.moeFusedGate({ logits }, { topK: 2 }).ids.read()).join());
  const { state, detail } = m.backendStatuses().find(({ backend }) => backend === 'cpu');
  console.log(state + ': ' + detail);
  try { await m.createContext({ backend: 'cpu' }); console.log('opened'); } catch (error) { console.log(error.code, error.message); }`;
const env = { MOE_KERNELS_BACKEND: '', CUDA_VISIBLE_DEVICES: '' };

describe.skipIf(status.loadedFrom === undefined)('the addon of a package', () => {
  const { folder, addon } = copyOfPackage('one');
  let whole: Buffer;
  beforeAll(() => {
    whole = readFileSync(status.loadedFrom!);
  });

  const random = (length: number, seed: number) => {
    const numbers = new Random(seed);
    return Buffer.from(Uint8Array.from({ length }, () => numbers.integer(256)));
  };
  /** The addon with bytes of its header changed. */
  const patched = (...changes: [offset: number, bytes: number[]][]) => {
    const copy = Buffer.from(whole);
    for (const [offset, bytes] of changes) copy.set(bytes, offset);
    return copy;
  };
  /** The addon with a text in it replaced by another one of its length. */
  const reworded = (text: string, other: string) => {
    const copy = Buffer.from(whole);
    for (let at = copy.indexOf(text); at >= 0; at = copy.indexOf(text, at + 1)) copy.write(other, at);
    return copy;
  };
  const elf = process.platform === 'linux';

  const broken: [string, () => Buffer | 'none' | 'folder' | 'link', RegExp][] = [
    ['missing', () => 'none', /^not built: no addon for \w+-\w+; 'npm run build' makes one from source/],
    ['a folder', () => 'folder', /^failed: .*(EISDIR|directory)/],
    ['a link to nowhere', () => 'link', /^(failed|not built): /],
    [
      'empty',
      () => Buffer.alloc(0),
      /^failed: the file is damaged: it has only 0 bytes; 'npm run build' makes a new one/,
    ],
    ['1 byte', () => whole.subarray(0, 1), /it has only 1 bytes/],
    ['text', () => Buffer.from('#!/bin/sh\n'.repeat(100)), /damaged or for another platform: no library/],
    ['zeros', () => Buffer.alloc(100_000), /damaged or for another platform: no library/],
    ['random bytes', () => random(100_000, 1), /damaged or for another platform/],
    ...(elf
      ? ([
          ...[64, 100, 4096, 0.25, 0.5, 0.75, 0.9, 0.999].map((share) => [
            `cut to ${share <= 1 ? `${share * 100} %` : `${share} bytes`}`,
            () => whole.subarray(0, share <= 1 ? Math.floor(whole.length * share) : share),
            /the file is damaged: it ends after \d+ of \d+ bytes; 'npm run build' makes a new one/,
          ]),
          [
            'random bytes after an ELF header',
            () => Buffer.concat([whole.subarray(0, 64), random(100_000, 2)]),
            /^failed: /,
          ],
          ['for aarch64', () => patched([18, [0xb7, 0]]), /for another platform: ELF for arm64, not \w+/],
          ['for riscv', () => patched([18, [243, 0]]), /for another platform: ELF for riscv64/],
          [
            'for nobody',
            () => patched([18, [0xff, 0xfe]]),
            /for another platform: ELF for an unknown machine/,
          ],
          ['of 32 bits', () => patched([4, [1]]), /^failed: .*(ELFCLASS32|wrong ELF class)/],
          ['of the other byte order', () => patched([5, [2]]), /for another platform/],
          [
            'a Mach-O library',
            () => Buffer.concat([Buffer.from([0xcf, 0xfa, 0xed, 0xfe]), random(5000, 3)]),
            /another platform: Mach-O, not ELF/,
          ],
          [
            'a Windows library',
            () => Buffer.concat([Buffer.from('MZ'), random(5000, 4)]),
            /another platform: PE, not ELF/,
          ],
          [
            'another library',
            () => readFileSync(someLibrary()),
            /^failed: .*(did not self-register|not a function)/,
          ],
        ] as typeof broken)
      : []),
  ];

  /** A service that goes on in TypeScript: what it says of the addon, and what asking for that gives. */
  const withoutAddon = () => {
    const end = child(service, { cwd: folder, env });
    expect(end, end.stderr).toMatchObject(good);
    const [chosen, detail, asked] = end.stdout.split('\n');
    expect(chosen).toBe('oracle 1,2');
    return { detail, asked };
  };

  it.each(broken)('%s: auto goes on without it, and asking for it says why', (_, make, said) => {
    rmSync(addon, { recursive: true, force: true });
    const content = make();
    if (content === 'folder') mkdirSync(addon);
    else if (content === 'link') symlinkSync(join(scratch, 'nowhere'), addon);
    else if (content !== 'none') writeFileSync(addon, content);
    const { detail, asked } = withoutAddon();
    expect(detail).toMatch(said);
    expect(asked).toMatch(/^ERR_MOE_BACKEND .*the cpu backend is/);
  });

  const { version } = packageManifest();
  const older = version.replace(/\d/g, '0');
  const foreign: [string, () => Buffer, RegExp][] = [
    [
      'of another version',
      () => reworded(`${version}\0`, `${older}\0`),
      new RegExp(
        `: it is of moe-kernels ${older}, this is moe-kernels ${version}; 'npm run build' makes a new one`,
      ),
    ],
    [
      'whose ops take other fields',
      () => reworded('renormalize', 'renormalise'),
      new RegExp(
        `from other sources than this moe-kernels ${version}: moe_fused_gate: 'renormalise: flag' instead of 'renormalize: flag'; 'npm run build' makes`,
      ),
    ],
    [
      'with other error codes',
      () => reworded('ERR_MOE_ABORTED', 'ERR_MOE_ABANDON'),
      /error codes: 'ERR_MOE_ABANDON' instead of 'ERR_MOE_ABORTED'/,
    ],
    [
      'with other dtypes',
      () => reworded('f8_e4m3\0', 'f8_e5m2\0'),
      /dtypes: 'f8_e5m2 of 1 bytes' instead of/,
    ],
  ];
  it.each(foreign)('%s is refused: auto goes on without it, and asking for it says why', (_, make, said) => {
    rmSync(addon, { recursive: true, force: true });
    writeFileSync(addon, make());
    const { detail, asked } = withoutAddon();
    expect(detail).toMatch(/^failed: the addon does not belong to this package: /);
    expect(detail).toMatch(said);
    expect(asked).toMatch(/^ERR_MOE_BACKEND .*the cpu backend is failed: the addon does not belong/);
  });

  it('of another backend, where that one should be, is refused, and its own is not it', () => {
    const places = ['out/cuda/build/Release', 'out/ascend/build/Release'].map((place) => join(folder, place));
    for (const place of places) mkdirSync(place, { recursive: true });
    writeFileSync(join(places[0], 'moe_cuda.node'), whole);
    writeFileSync(join(places[1], 'moe_cpu.node'), whole);
    rmSync(addon, { recursive: true, force: true });
    const end = child(
      `for (const { state, detail, attempts: [{ error }] } of m.backendStatuses()) console.log(state, detail, error);`,
      {
        cwd: folder,
        env,
      },
    );
    for (const place of places) rmSync(place, { recursive: true });
    expect(end, end.stderr).toMatchObject(good);
    const [cuda, ascend, cpu] = end.stdout.split('\n');
    expect(cuda).toMatch(
      /^failed the addon does not belong to this package: it is the addon of the cpu backend/,
    );
    expect(ascend).toMatch(
      /^not built .*no moe_ascend.node in build\/Release or prebuilds\/\S+, only .*moe_cpu.node$/,
    );
    expect(cpu).toMatch(/^not built .*no moe_cpu.node in build\/Release or prebuilds\/\w+-\w+$/);
  });

  it.skipIf(process.getuid?.() === 0)('unreadable: the same', () => {
    rmSync(addon, { recursive: true, force: true });
    writeFileSync(addon, whole);
    chmodSync(addon, 0);
    const end = child(service, { cwd: folder, env });
    expect(end.stdout).toMatch(/^oracle 1,2\nfailed: .*(EACCES|permission)/);
  });

  it('whole again: taken', () => {
    rmSync(addon, { recursive: true, force: true });
    writeFileSync(addon, whole);
    const end = child(service, { cwd: folder, env });
    expect(end, end.stderr).toMatchObject(good);
    expect(end.stdout).toMatch(/^cpu 1,2\nready: .*\nopened$/);
  });

  it('twice in one process: both work, neither takes the tensors of the other', () => {
    const other = copyOfPackage('two');
    writeFileSync(other.addon, whole);
    rmSync(addon, { recursive: true, force: true });
    writeFileSync(addon, whole);
    const end = child(
      `import { Worker } from 'node:worker_threads';
      const n = await import(${JSON.stringify(pathToFileURL(join(other.folder, 'dist', 'lib', 'index.js')).href)});
      const contexts = await Promise.all([m, n].flatMap((p) => ['cpu', 'oracle'].map((backend) => p.createContext({ backend }))));
      const tensors = contexts.map((ctx, i) => ctx.tensor('f32', [2, 2], Float32Array.of(i, 0, 0, 1)));
      const run = (p, x) => p.moeRouter({ hidden: x, weight: x }).read();
      console.log((await Promise.all(tensors.map((x, i) => run(i < 2 ? m : n, x)))).map((out) => out.join()).join(' '));
      for (const [p, x] of [[m, tensors[2]], [n, tensors[0]], [m, tensors[3]]]) {
        try { await run(p, x); } catch (error) { console.log(error.code, error instanceof p.MoeError, /this copy of moe-kernels/.test(error.message)); }
      }
      try { await tensors[0].to(contexts[2]); } catch (error) { console.log(error.code, error.arg); }
      try { contexts[2].tensor('f64', [1]); } catch (error) { console.log(error instanceof n.MoeError, error instanceof m.MoeError); }
      const bad = contexts[2].tensor('i32', [1, 1], Int32Array.of(9));
      const rows = contexts[2].tensor('f32', [1, 1]);
      await n.moeCombine({ rows, inverse: bad, weights: rows }).read().catch((error) => console.log(error.code, error instanceof n.MoeError));
      console.log((await m.moeRouter({ hidden: contexts[0].tensor('f32', [1, 1], await rows.read()), weight: contexts[0].tensor('f32', [1, 1]) }).read()).join());
      await Promise.all(contexts.map((ctx) => ctx.close()));`,
      { cwd: folder },
    );
    expect(end, end.stderr).toMatchObject(good);
    expect(end.stdout.split('\n')).toEqual([
      '0,0,0,1 1,0,0,1 4,0,0,1 9,0,0,1',
      'ERR_MOE_INVALID_ARG true true',
      'ERR_MOE_INVALID_ARG true true',
      'ERR_MOE_INVALID_ARG true true',
      'ERR_MOE_INVALID_ARG context',
      'true false',
      'ERR_MOE_RANGE true',
      '0',
    ]);
  });
});

/** A shared library that is no addon at all. */
function someLibrary(): string {
  const found = [
    '/lib/x86_64-linux-gnu/libm.so.6',
    '/lib64/libm.so.6',
    '/usr/lib/libm.so.6',
    '/lib/aarch64-linux-gnu/libm.so.6',
  ].find(existsSync);
  return found ?? join(packageRoot, 'package.json');
}
