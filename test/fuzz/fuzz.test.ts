// Two fuzzers with one short, fixed-seed share in the suite. `npm run fuzz` runs them for as long as it is told:
//
//   npm run fuzz -- --seconds 600 --seed 7 --backend cpu
//
// The binding's throws random values at the addon in processes of its own. The ops' draws random legal cases, compares
// with the oracle, and minimises a case that fails. Both say their seed, and the same seed gives the same cases.
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { type BackendName, type Context, createContext } from '../../lib/index.js';
import { packageRoot } from '../../lib/package.js';
import { backends } from '../ops/backends.js';
import { properties } from './ops.js';

const { MOE_KERNELS_FUZZ_SECONDS, MOE_KERNELS_FUZZ_SEED, MOE_KERNELS_FUZZ_BACKEND } = process.env;
const seconds = Number(MOE_KERNELS_FUZZ_SECONDS ?? 0); // 0: the share of the suite
const seed = Number(MOE_KERNELS_FUZZ_SEED ?? 1);
const tested = (
  MOE_KERNELS_FUZZ_BACKEND === undefined
    ? backends.filter((name) => name !== 'oracle')
    : [MOE_KERNELS_FUZZ_BACKEND]
) as BackendName[];
if (seconds > 0) console.log(`fuzzing ${tested.join(', ')} for ${seconds} s from seed ${seed}`);

const program = fileURLToPath(new URL('binding_child.mjs', import.meta.url));

/** Runs the binding's fuzzer once and gives how it ended. */
function binding(backend: BackendName, from: number, calls: number, milliseconds: number) {
  const parameters = [program, backend, from, calls, Math.round(milliseconds)].map(String);
  return new Promise<object>((resolve) => {
    const started = spawn(process.execPath, parameters, { cwd: packageRoot });
    const limit = setTimeout(() => started.kill('SIGKILL'), milliseconds + 60_000);
    let output = '';
    for (const stream of [started.stdout, started.stderr]) stream.on('data', (text) => (output += text));
    started.on('close', (status, signal) => {
      clearTimeout(limit);
      resolve({ seed: from, status, signal, output });
    });
  });
}

describe.each(tested)('on %s', (backend) => {
  const opened: Context[] = [];
  const open = async (name: BackendName) => {
    const context = await createContext({ backend: name, threads: 2 });
    opened.push(context);
    return context;
  };
  afterAll(() => Promise.all(opened.map((context) => context.close())));

  it(
    'the binding survives whatever it is given',
    async () => {
      const end = performance.now() + (seconds * 1000) / 4;
      const [runs, calls, limit] = seconds > 0 ? [Infinity, 200_000, 20_000] : [3, 10_000, 30_000];
      for (let run = 0; run < runs && (seconds === 0 || performance.now() < end); run++) {
        const left = seconds > 0 ? Math.min(limit, end - performance.now()) : limit;
        expect(await binding(backend, seed + run, calls, left)).toMatchObject({
          status: 0,
          signal: null,
          output: expect.stringMatching(/^alive \d+/),
        });
      }
    },
    (seconds + 180) * 1000,
  );

  const ops = [
    'moe_fused_gate',
    'moe_router',
    'moe_dispatch',
    'moe_experts',
    'moe_combine',
    'fused_moe',
    'shared_experts',
  ];
  it.each(ops)(
    '%s does what the oracle does',
    async (op) => {
      const all = properties(await open(backend), await open('oracle'));
      expect(Object.keys(all).sort()).toEqual([...ops].sort());
      await fc.assert(all[op], {
        seed,
        ...(seconds > 0
          ? {
              numRuns: 1e9,
              interruptAfterTimeLimit: (750 * seconds) / ops.length,
              markInterruptAsFailure: false,
            }
          : { numRuns: 120 }),
      });
    },
    (seconds + 180) * 1000,
  );
});
