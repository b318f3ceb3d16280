// Drift is a failing test: the specs, the native structs, the tables and the tree must tell the same story.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { selfTestCases } from '../lib/cli/self_test.js';
import * as api from '../lib/index.js';
import { loadBackend, nativeBackends } from '../lib/native.js';
import { isOp } from '../lib/op.js';
import { packageRoot } from '../lib/package.js';

const ops = Object.entries(api).flatMap(([name, value]) => (isOp(value) ? [{ name, op: value.op }] : []));
const names = ops.map(({ op }) => op.name).sort();
const camelCase = (name: string) => name.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase());
const built = nativeBackends.flatMap((backend) => {
  const { addon, status } = loadBackend(backend);
  return addon === undefined ? [] : [{ backend, addon, status }];
});

describe('the tree', () => {
  it('holds every op under one name in every folder', () => {
    const filesIn = (folder: string, pattern: RegExp) =>
      readdirSync(join(packageRoot, folder))
        .flatMap((file) => pattern.exec(file)?.[1] ?? [])
        .sort();
    expect(filesIn('lib/ops', /^(\w+)\.ts$/)).toEqual(names);
    expect(filesIn('lib/oracle', /^(\w+)\.ts$/).filter((name) => name !== 'values')).toEqual(names);
    expect(filesIn('test/ops', /^(\w+)\.test\.ts$/)).toEqual(names);
    const opBenches = filesIn('bench', /^(\w+)\.bench\.ts$/).filter((name) => names.includes(name));
    expect(opBenches).toEqual(names);
    const cpu = filesIn('csrc/cpu', /^(\w+)\.cc$/);
    for (const name of names) expect(cpu).toContain(name);
  });

  it('exports each op in camelCase, pack_experts behind packExperts', () => {
    for (const { name, op } of ops) {
      expect(name).toBe(op.name === 'pack_experts' ? 'writeExperts' : camelCase(op.name));
    }
  });

  it('has a self-test of every op', () => {
    expect(Object.keys(selfTestCases).sort()).toEqual(names);
  });

  it('reads process.env in one file and loads addons in one file', () => {
    const sources = readdirSync(join(packageRoot, 'lib'), { recursive: true, encoding: 'utf8' });
    const using = (code: string) =>
      sources
        .filter((file) => file.endsWith('.ts'))
        .filter((file) => readFileSync(join(packageRoot, 'lib', file), 'utf8').includes(code));
    expect(using('process.env[')).toEqual(['env.ts']);
    expect(using('process.env.')).toEqual([]);
    expect(using('createRequire(')).toEqual(['native.ts']);
  });

  it('keeps the oracle independent of the specs and the binding', () => {
    for (const file of readdirSync(join(packageRoot, 'lib/oracle'))) {
      const text = readFileSync(join(packageRoot, 'lib/oracle', file), 'utf8');
      expect(text, file).not.toMatch(/from '\.\.\/(ops|native|op|context|backend)/);
    }
  });

  it('keeps JavaScript out of kernels: only csrc/binding includes napi.h', () => {
    for (const folder of readdirSync(join(packageRoot, 'csrc'), { withFileTypes: true })) {
      if (!folder.isDirectory() || folder.name === 'binding') continue;
      for (const file of readdirSync(join(packageRoot, 'csrc', folder.name))) {
        const text = readFileSync(join(packageRoot, 'csrc', folder.name, file), 'utf8');
        expect(text, file).not.toMatch(/#include\s*[<"](napi|node_api)/);
      }
    }
  });
});

it('some native backend is built, and none from other sources, or the comparisons below prove nothing', () => {
  expect(built.length).toBeGreaterThan(0);
  const failed = nativeBackends
    .map((backend) => loadBackend(backend).status)
    .filter(({ state }) => state === 'failed');
  expect(failed).toEqual([]);
});

describe.each(built)('the $backend addon', ({ backend, addon }) => {
  const described = addon.describe();

  it('has the fields of the specs, in their order', () => {
    const native = Object.fromEntries(described.ops.map(({ name, fields }) => [name, fields]));
    expect(native).toEqual(Object.fromEntries(ops.map(({ op }) => [op.name, op.fields])));
  });

  it('has the dtypes and error codes of lib/', () => {
    expect(described.dtypes).toEqual(
      Object.entries(api.dtypes).map(([name, { bytes }]) => ({ name, bytes })),
    );
    expect(Object.values(api.dtypes).map(({ code }) => code)).toEqual(described.dtypes.map((_, i) => i));
    expect(described.errors).toEqual(Object.keys(api.errorCodes));
  });

  it('is of this version and says which backend it is', () => {
    const { version } = JSON.parse(readFileSync(join(packageRoot, 'package.json'), 'utf8'));
    expect(described).toMatchObject({ backend, version });
  });

  it('has every op', () => {
    expect(described.ops.filter(({ available }) => !available)).toEqual([]);
  });
});
