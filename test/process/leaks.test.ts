// Ten thousand calls of every kind, the failing ones too: neither the process nor the context may grow with them.
import { describe, expect, it } from 'vitest';
import { backends } from '../ops/backends.js';
import { child, good } from './child.js';

const calls = 10_000;
/** Bytes of RSS a call may leave behind: half a leaked promise is more. */
const mostPerCall = 100;
/** So that RSS shows what is held: a small heap, collected on this thread, and no code that grows better with time. */
const flags = ['--expose-gc', '--max-semi-space-size=1', '--single-threaded-gc', '--no-opt'];

/** [what, before the loop, one call of the loop]; `ctx` is the context and `i` the number of the call. */
const loops: [string, string, string][] = [
  [
    'ops, reads and disposals',
    `const x = ctx.tensor('f32', [8, 16], new Float32Array(128).fill(1)); const w = ctx.tensor('bf16', [8, 16]);`,
    `const logits = m.moeRouter({ hidden: x, weight: w });
     const { ids, weights } = m.moeFusedGate({ logits }, { topK: 2 });
     await ids.read(); weights.readSync();
     for (const tensor of [logits, ids, weights]) tensor.dispose();`,
  ],
  [
    'writes and reads of every kind',
    `const x = ctx.tensor('bf16', [1000]); const values = new Float32Array(1000); const bits = new Uint16Array(1000);`,
    `x.write(values).write(bits); await Promise.all([x.read(), x.readRaw(), ctx.synchronize()]); x.readSync(); x.readRawSync();`,
  ],
  [
    'weights packed, used and given back',
    `const w13 = ctx.tensor('f32', [2, 8, 16]); const w2 = ctx.tensor('f32', [2, 16, 4]); const x = ctx.tensor('f32', [4, 16]);
     const ids = ctx.tensor('i32', [4, 2]); const weights = ctx.tensor('f32', [4, 2]);`,
    `const experts = m.packExperts({ w13, w2 }); const out = m.fusedMoe({ hidden: x, ids, weights, experts });
     experts.dispose(); if (i % 10 === 0) await out.read(); out.dispose();`,
  ],
  [
    'captures recorded, replayed and given back',
    `const x = ctx.tensor('f32', [4, 16]);`,
    `const step = ctx.capture(() => m.moeRouter({ hidden: x, weight: x })); step.replay(); step.replay();
     if (i % 10 === 0) await step.output.read(); step.dispose();`,
  ],
  [
    'loads counted in, captured, written, read and given back',
    `const logits = ctx.tensor('f32', [4, 16]); const zeros = new BigInt64Array(16);`,
    `const load = ctx.tensor('i64', [16]); const gate = () => m.moeFusedGate({ logits, load }, { topK: 2 });
     const outs = i % 2 === 0 ? [gate(), gate()] : [];
     const step = ctx.capture(() => (i % 3 === 0 && load.write(zeros), gate()));
     step.replay(); if (i % 5 === 0) load.write(zeros); if (i % 10 === 0) await load.read();
     for (const { ids, weights } of outs) { ids.dispose(); weights.dispose(); }
     load.dispose(); step.replay(); step.dispose();`,
  ],
  [
    'recordings that throw',
    `const x = ctx.tensor('f32', [4, 16]);`,
    `try { ctx.capture(() => { m.moeRouter({ hidden: x, weight: x }); ctx.tensor('f32', [64], new Float32Array(64)); throw i; }); } catch (thrown) { if (thrown !== i) throw thrown; }`,
  ],
  [
    'calls that throw',
    `const x = ctx.tensor('f32', [4, 16]); const gone = ctx.tensor('f32', [4, 16]); gone.dispose();`,
    `for (const call of [
       () => m.moeRouter({ hidden: x, weight: ctx }), () => m.moeRouter({ hidden: x, weight: gone }),
       () => m.moeFusedGate({ logits: x }, { topK: 17 }), () => ctx.tensor('f32', [2 ** 45]), () => ctx.tensor('f32', [2], new Float32Array(3)),
       () => x.write(new Float32Array(1)), () => gone.readSync(), () => m.packExperts({ w13: x, w2: x }),
     ]) { let code; try { call(); } catch (error) { code = error.code; } if (!code) throw new Error('expected ' + call); }`,
  ],
  [
    'faults that are found later',
    `const rows = ctx.tensor('f32', [2, 4]); const inverse = ctx.tensor('i32', [2, 1], Int32Array.of(7, 0)); const weights = ctx.tensor('f32', [2, 1]);`,
    `let out; let told; try { out = m.moeCombine({ rows, inverse, weights }); await out.read(); } catch (error) { told = error.code; }
     if (told !== 'ERR_MOE_RANGE') throw new Error('told ' + told);
     out?.dispose(); await ctx.synchronize();`,
  ],
  [
    'waits that are aborted, and waits whose signal is never used',
    `const x = ctx.tensor('f32', [64]); const { signal } = new AbortController();`,
    `const stop = new AbortController(); const wait = x.read({ signal: stop.signal }); stop.abort(i);
     let told; try { await wait; } catch (error) { told = error.code; }
     if (told !== 'ERR_MOE_ABORTED') throw new Error('told ' + told);
     await x.read({ signal }); await ctx.synchronize({ signal });`,
  ],
  [
    'moves between contexts',
    `const other = await m.createContext({ backend: 'oracle' }); const x = ctx.tensor('f32', [64]);`,
    `const there = await x.to(other); const back = await there.to(ctx); there.dispose(); back.dispose();`,
  ],
];

const script = (backend: string, count: number, before: string, call: string) => `
  const ctx = await m.createContext({ backend: '${backend}', threads: 2 });
  ${before}
  await ctx.synchronize();
  const used = ctx.memory().used;
  const samples = [];
  const sample = async (i) => {
    for (let turn = 0; turn < 3; turn++) { globalThis.gc(); await new Promise((later) => setTimeout(later, 1)); }
    samples.push([i, process.memoryUsage.rss(), ctx.memory().used, ctx.memory().reserved]);
  };
  // The first calls fill caches, compile and find their memory
  for (let i = -2000; i < ${count}; i++) { if (i >= 0 && i % ${count / 10} === 0) await sample(i); ${call} }
  await sample(${count});
  await ctx.synchronize();
  const slope = (column) => {
    const mean = (of) => samples.reduce((sum, row) => sum + of(row), 0) / samples.length;
    const [x, y] = [mean((row) => row[0]), mean((row) => row[column])];
    return mean((row) => (row[0] - x) * (row[column] - y)) / mean((row) => (row[0] - x) ** 2);
  };
  console.log(JSON.stringify({ rss: slope(1), used: ctx.memory().used - used, reserved: slope(3) }));`;

describe.each(backends)('the process and the context on %s do not grow with', (backend) => {
  it.each(loops)(
    '%s',
    (_, before, call) => {
      const grown = (count: number): { rss: number; used: number; reserved: number } => {
        const end = child(script(backend, count, before, call), { flags, timeout: 170_000 });
        expect(end, end.stderr).toMatchObject(good);
        return JSON.parse(end.stdout);
      };
      let { rss, used, reserved } = grown(calls);
      // A page fault or two beside a busy machine look like growth; what leaks does so in more calls as well
      if (rss >= mostPerCall) ({ rss, used, reserved } = grown(4 * calls));
      expect(rss, `${rss} bytes of RSS a call`).toBeLessThan(mostPerCall);
      expect(used).toBe(0);
      expect(reserved, `${reserved} bytes reserved a call`).toBeLessThan(mostPerCall);
    },
    350_000,
  );

  it('contexts opened and closed, used or not', () => {
    const call = `const own = await m.createContext({ backend: '${backend}', threads: 2 });
      if (i % 2) own.tensor('f32', [16, 16]).read().catch(() => {});
      if (i % 3) await own.close(); else await own.close({ signal: AbortSignal.abort() }).catch(() => {});`;
    const count = backend === 'cuda' ? 100 : 2000;
    const end = child(script(backend, count, '', call).replace('-2000', '-200'), {
      flags,
      timeout: 170_000,
    });
    expect(end, end.stderr).toMatchObject(good);
    expect(JSON.parse(end.stdout).rss).toBeLessThan(backend === 'cuda' ? 100_000 : 5 * mostPerCall);
  }, 180_000);
});
