// The gate on one thread, for every instruction set that runs here: nanoseconds a token for routings of known models,
// f32 logits of a normal distribution. Every call is waited for, and the median counts.
import {
  type Context,
  createContext,
  MoeError,
  type MoeFusedGateOptions,
  moeFusedGate,
} from '../../lib/index.js';
import { normal } from '../layers.js';

const TOKENS = 4096;
const isas = ['avx512', 'avx2', 'neon', 'scalar'] as const;

const routings: readonly [name: string, experts: number, bias: boolean, options: MoeFusedGateOptions][] = [
  [
    '256 sigmoid and bias, 4 of 8 groups, top 8',
    256,
    true,
    { scoring: 'sigmoid', groups: 8, topGroups: 4, topK: 8, renormalize: true },
  ],
  ['256 sigmoid and bias, top 8', 256, true, { scoring: 'sigmoid', topK: 8, renormalize: true }],
  ['160 softmax, 3 of 8 groups, top 6', 160, false, { scoring: 'softmax', groups: 8, topGroups: 3, topK: 6 }],
  ['128 softmax, top 8', 128, false, { scoring: 'softmax', topK: 8, renormalize: true }],
  ['64 softmax, top 6', 64, false, { scoring: 'softmax', topK: 6 }],
];

/** A context of that instruction set on one thread; none where it does not run here. */
async function contextOf(isa: (typeof isas)[number]): Promise<Context | undefined> {
  try {
    return await createContext({ backend: 'cpu', threads: 1, isa });
  } catch (error) {
    if (error instanceof MoeError && error.code === 'ERR_MOE_UNSUPPORTED') return undefined;
    throw error;
  }
}

export async function gates(median: (work: () => unknown, budgetMs: number) => Promise<number>) {
  const results = [];
  for (const isa of isas) {
    await using context = await contextOf(isa);
    if (context === undefined) continue;
    for (const [name, experts, hasBias, options] of routings) {
      using logits = normal(context, 'f32', [TOKENS, experts], 1);
      using bias = hasBias ? normal(context, 'f32', [experts], 2, 0.1) : undefined;
      const ms = await median(() => {
        const { ids, weights } = moeFusedGate(bias === undefined ? { logits } : { logits, bias }, options);
        ids.dispose();
        weights.dispose();
        context.synchronizeSync();
      }, 200);
      results.push({ isa, routing: name, nanosecondsPerToken: Math.round((ms * 1e6) / TOKENS) });
    }
  }
  return results;
}
