// The binding trusts nobody: whatever a record holds, it is refused or runs on memory that is there.
import { spawnSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { loadBackend } from '../../lib/native.js';

const { status } = loadBackend('cpu');

/** Throws random records, and mutations of legal ones, at the addon itself; prints how many were taken. */
const fuzz = (path: string, seed: number) => `
  const addon = require(${JSON.stringify(path)});
  addon.setErrorClass(class extends Error { constructor(code, message) { super(message); this.code = code; } });
  let state = ${seed};
  const random = (n) => { state = (Math.imul(state, 1664525) + 1013904223) >>> 0; return Math.floor((state / 2 ** 32) * n); };
  const context = new addon.Context({ device: 0, threads: 2 });
  const handles = [0];
  for (let dtype = 0; dtype < 9; dtype++) for (const elements of [0, 1, 2, 3, 4, 6, 8, 16]) {
    const handle = context.allocate(dtype, elements);
    context.write(handle, undefined);
    handles.push(handle);
  }
  for (const shape of [[1, 2, 2], [2, 4, 1], [1, 1, 1]]) handles.push(context.allocateExperts(Float64Array.of(...shape, 0, 1, 1, 0, 0)));
  const odd = [-1, 0.5, NaN, Infinity, 2 ** 31, 2 ** 53, 2 ** 62, 1e300];
  const ops = addon.describe().ops;
  let taken = 0;
  for (let round = 0; round < 20000; round++) {
    const op = random(ops.length);
    const record = [op];
    for (const field of ops[op].fields) {
      const handle = () => handles[random(handles.length)];
      if (field.startsWith('dim')) record.push(random(5));
      else if (field.startsWith('count')) record.push(random(3) ? 0 : handle(), random(3));
      else if (/^(in|out|inout|experts)/.test(field)) record.push(field.includes('?') && random(2) ? 0 : handle());
      else record.push(random(4));
    }
    if (random(4) === 0) record[1 + random(record.length - 1)] = odd[random(odd.length)];
    if (random(20) === 0) record.length = 1 + random(record.length);
    try { context.enqueue(Float64Array.from(record), record.length); taken++; } catch (error) { if (!error.code) throw error; }
    if (round % 100 === 0) { try { context.synchronizeSync(); } catch (error) { if (!error.code) throw error; } }
  }
  for (const junk of [undefined, null, 1, 'x', {}, [], new Float64Array(0), new Uint8Array(8), Symbol.iterator]) {
    for (const method of ['enqueue', 'write', 'read', 'readSync', 'allocate', 'allocateExperts', 'release', 'replay', 'bytes']) {
      try { const result = context[method](junk, junk); if (result && result.catch) result.catch(() => {}); } catch (error) { if (!error.message) throw error; }
    }
  }
  context.close().then(() => console.log('alive', taken));`;

describe.skipIf(status.loadedFrom === undefined)('records of random numbers', () => {
  it.each([1, 2, 3])('crash nothing (seed %d)', (seed) => {
    const run = spawnSync(process.execPath, ['-e', fuzz(status.loadedFrom!, seed)], { encoding: 'utf8' });
    expect({ status: run.status, signal: run.signal }, run.stderr).toEqual({ status: 0, signal: null });
    expect(run.stdout).toMatch(/^alive \d+/);
  });
});
