// The examples of the README run as they stand, on what a laptop has.
import { spawnSync } from 'node:child_process';
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import ts from 'typescript';
import { afterAll, describe, expect, it } from 'vitest';
import { errorCodes } from '../lib/index.js';
import { packageRoot } from '../lib/package.js';

const readme = readFileSync(join(packageRoot, 'README.md'), 'utf8');
const examples = [...readme.matchAll(/^## (.*)\n[\s\S]*?(?=^## |(?![\s\S]))/gm)].flatMap(([section, title]) =>
  [...section.matchAll(/```ts\n([\s\S]*?)```/g)].map(([, code], i) => ({ title: `${title} ${i + 1}`, code })),
);

/** Files inside the package resolve its name to itself. */
const folder = join(packageRoot, 'out', 'readme');
/** Examples write files; the checkpoint that one of them reads is found from here too. */
const workplace = mkdtempSync(join(tmpdir(), 'moe-kernels-readme-'));
symlinkSync(join(packageRoot, 'test'), join(workplace, 'test'));
afterAll(() => rmSync(workplace, { recursive: true, force: true }));

describe('README', () => {
  it('has examples', () => expect(examples.length).toBeGreaterThanOrEqual(4));

  it.each(examples)('runs the example of $title', ({ title, code }) => {
    mkdirSync(folder, { recursive: true });
    const name = title.replace(/\W+/g, '_');
    writeFileSync(join(folder, `${name}.mts`), code);
    const { outputText } = ts.transpileModule(code, {
      compilerOptions: { target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext },
    });
    writeFileSync(join(folder, `${name}.mjs`), outputText);
    const run = spawnSync(process.execPath, [join(folder, `${name}.mjs`)], {
      cwd: workplace,
      encoding: 'utf8',
    });
    expect(run.status, run.stderr).toBe(0);
    // What a comment promises after console.log is what comes out.
    for (const [, promised] of code.matchAll(/console\.log\(\[.*\]\); \/\/ (.*)/g)) {
      expect(run.stdout.replaceAll('\n', '')).toContain(promised.slice(1, -1));
    }
    for (const [, promised] of code.matchAll(/^ {2}\/\/ (\[\w+\] .*)$/gm))
      expect(run.stdout).toContain(promised);
  });

  it('type-checks every example', () => {
    const tsc = join(packageRoot, 'node_modules', 'typescript', 'bin', 'tsc');
    const files = examples.map(({ title }) => join(folder, `${title.replace(/\W+/g, '_')}.mts`));
    const flags = ['--noEmit', '--strict', '--target', 'es2022', '--module', 'nodenext', '--skipLibCheck'];
    const lib = ['--lib', 'es2023,esnext.disposable', '--types', 'node'];
    const run = spawnSync(process.execPath, [tsc, ...flags, ...lib, ...files], {
      cwd: packageRoot,
      encoding: 'utf8',
    });
    expect(run.stdout).toBe('');
  });

  it('has no figure in its tables that is not in bench/results or among the recorded peers', () => {
    const results = join(packageRoot, 'bench', 'results');
    const files = readdirSync(results).filter((name) => /\.(json|txt)$/.test(name));
    const sources = [...files.map((name) => join(results, name)), join(packageRoot, 'bench', 'peers.ts')];
    const known = sources
      .flatMap((file) => readFileSync(file, 'utf8').match(/\d+(\.\d+)?(e-?\d+)?/g) ?? [])
      .map(Number)
      .sort((a, b) => a - b);
    const nearest = (figure: number): number => {
      let [low, high] = [0, known.length - 1];
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (known[middle] < figure) low = middle;
        else high = middle;
      }
      return Math.min(Math.abs(known[low] - figure), Math.abs(known[high] - figure));
    };
    const measured = readme
      .replace(/^## Install[\s\S]*?(?=^## Measurements)/m, '')
      .replace(/^## Command[\s\S]*/m, '');
    const rows = [...measured.matchAll(/^\|[^|]*\|(.*\d.*)\|$/gm)].map(([, cells]) => cells);
    expect(rows.length).toBeGreaterThan(20);
    for (const cells of rows) {
      if (/[a-z]{4}.*x.*top/.test(cells)) continue; // the shapes of a header
      for (const [text] of cells.replaceAll(',', '').matchAll(/\d+(\.\d+)?/g)) {
        const half = 0.5 * 10 ** -(text.split('.')[1]?.length ?? 0);
        expect(nearest(Number(text)), `${text} of |${cells}|`).toBeLessThanOrEqual(half + 1e-9);
      }
    }
  });

  it('has the newest figures of the suites on CUDA and of the layer on the CPU', () => {
    const result = (name: string) =>
      JSON.parse(readFileSync(join(packageRoot, 'bench', 'results', name), 'utf8'));
    const { passed } = result('h200-tests.json') as { passed: number };
    expect(readme).toContain(`\`bench/results/h200-tests.json\`: ${passed.toLocaleString('en-US')} tests`);
    const { peer } = result('cpu-layer-amd-epyc.json') as {
      peer: { results: { tokens: number; ms: number; onnxruntimeMs: number }[] };
    };
    const { ms, onnxruntimeMs } = peer.results.find(({ tokens }) => tokens === 256)!;
    expect(readme).toContain(
      `2 CPU cores | ${ms.toFixed(1)} ms | ${onnxruntimeMs.toFixed(1)} ms, onnxruntime`,
    );
  });

  it('lists every error code and no other', () => {
    const listed = [...readme.matchAll(/^\| `(ERR_MOE_\w+)` \|/gm)].map(([, code]) => code);
    expect(listed).toEqual(Object.keys(errorCodes));
  });
});
