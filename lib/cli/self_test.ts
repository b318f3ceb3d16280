// One small case for every op, run on a backend and on the oracle. Not a substitute for the test suite: it finds an
// addon that is miscompiled, mislinked or run on hardware it was not made for.
import type { Context } from '../context.js';
import {
  allocateExperts,
  createContext,
  fusedMoe,
  MoeError,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeFusedGate,
  moeRouter,
  packExperts,
  sharedExperts,
  type Tensor,
} from '../index.js';

export interface SelfTest {
  ok: boolean;
  ops: Record<string, { ok: boolean; error?: string }>;
  error?: string;
}

const TOKENS = 5;
const HIDDEN = 24;
const INTERMEDIATE = 12;
const EXPERTS = 8;
const TOLERANCE = 1e-5;

/** Deterministic values in [-1, 1), different for every `seed`. */
function values(count: number, seed: number): Float32Array {
  let state = seed >>> 0;
  return Float32Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  });
}

const floats = (context: Context, shape: number[], seed: number) =>
  context.tensor(
    'f32',
    shape,
    values(
      shape.reduce((a, b) => a * b),
      seed,
    ),
  );

const gate = (context: Context) =>
  moeFusedGate(
    { logits: floats(context, [TOKENS, EXPERTS], 1), bias: floats(context, [EXPERTS], 2) },
    { topK: 2, scoring: 'sigmoid', groups: 4, topGroups: 2, renormalize: true, sharedExperts: 1 },
  );

const hidden = (context: Context) => floats(context, [TOKENS, HIDDEN], 3);

const experts = (context: Context, slots = EXPERTS + 1) =>
  packExperts({
    w13: floats(context, [slots, 2 * INTERMEDIATE, HIDDEN], 4),
    w2: floats(context, [slots, HIDDEN, INTERMEDIATE], 5),
  });

function dispatched(context: Context) {
  const { ids, weights } = gate(context);
  const { rows, ...plan } = moeDispatch({ ids, hidden: hidden(context) }, { experts: EXPERTS + 1 });
  return { ...plan, ids, weights, rows: rows! };
}

/** By op name; the contract test asks for one of every op. */
export const selfTestCases: Record<string, (context: Context) => Tensor[]> = {
  moe_router: (context) => [
    moeRouter({ hidden: hidden(context), weight: floats(context, [EXPERTS, HIDDEN], 6) }),
  ],
  moe_fused_gate: (context) => Object.values(gate(context)),
  moe_dispatch: (context) => {
    const { order, inverse, counts, offsets, rows } = dispatched(context);
    return [order, inverse, counts, offsets, rows];
  },
  moe_experts: (context) => {
    const { rows, counts, offsets } = dispatched(context);
    return [moeExperts({ rows, counts, offsets, experts: experts(context) })];
  },
  moe_combine: (context) => {
    const { rows, inverse, weights } = dispatched(context);
    return [moeCombine({ rows, inverse, weights })];
  },
  fused_moe: (context) => [
    fusedMoe({ hidden: hidden(context), ...gate(context), experts: experts(context) }),
  ],
  shared_experts: (context) => [
    sharedExperts({
      hidden: hidden(context),
      experts: experts(context, 1),
      expertGate: floats(context, [HIDDEN], 7),
    }),
  ],
  pack_experts: (context) => {
    const packed = allocateExperts(context, {
      slots: 1,
      hidden: HIDDEN,
      intermediate: INTERMEDIATE,
      dtype: 'bf16',
    });
    const w13 = floats(context, [1, HIDDEN, 2 * INTERMEDIATE], 8);
    const w2 = floats(context, [1, INTERMEDIATE, HIDDEN], 9);
    packExperts({ w13, w2 }, { into: packed, transposed: true, gateUp: 'interleaved' });
    return [sharedExperts({ hidden: hidden(context), experts: packed })];
  },
};

/** Runs every case on `context` and on an oracle of its own. */
export async function selfTest(context: Context): Promise<SelfTest> {
  await using oracle = await createContext({ backend: 'oracle' });
  const ops: SelfTest['ops'] = {};
  for (const [op, run] of Object.entries(selfTestCases)) {
    try {
      const expected = run(oracle);
      const received = run(context);
      let error: string | undefined;
      for (const [i, tensor] of received.entries()) {
        error ??= difference(await tensor.read(), await expected[i].read());
      }
      ops[op] = error === undefined ? { ok: true } : { ok: false, error };
    } catch (error) {
      if (!(error instanceof MoeError)) throw error;
      // An op that a backend does not have is no failure of the machine.
      ops[op] = { ok: error.code === 'ERR_MOE_UNSUPPORTED', error: error.message };
    }
  }
  return { ok: Object.values(ops).every(({ ok }) => ok), ops };
}

function difference(
  received: ArrayLike<number | bigint>,
  expected: ArrayLike<number | bigint>,
): string | undefined {
  let squares = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    squares += (Number(received[i]) - Number(expected[i])) ** 2;
    norm += Number(expected[i]) ** 2;
  }
  const error = Math.sqrt(squares / (norm || 1));
  return error <= TOLERANCE ? undefined : `differs from the oracle by ${error} in relative norm`;
}
