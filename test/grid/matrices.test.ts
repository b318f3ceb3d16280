// Ops that multiply matrices, and combine, which adds rows up: narrow layers over all sizes against the oracle, wide ones
// against the CPU backend.
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type Context,
  type FloatDType,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeRouter,
  sharedExperts,
  type Tensor,
} from '../../lib/index.js';
import { decode } from '../../lib/tensor.js';
import { type RoutingKind, routing } from '../cases/experts.js';
import { relativeNorm, relativeTolerance } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { contextOf } from '../ops/backends.js';
import { packCase } from '../ops/packed.js';
import { expectSameBits, gridTokens, natives, outputsOf, referenceOf } from './sizes.js';

interface LayerCase {
  readonly tokens: number;
  readonly columns: number;
  readonly slots: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly dtype: FloatDType;
  readonly kind: RoutingKind;
}

/** Random values that repeat after a prime number of them: quick to make, and no two rows the same. */
function values(length: number, seed: number, scale = 1): Float32Array {
  const period = new Random(seed).normals(Math.min(length, 65537), scale);
  const all = new Float32Array(length);
  for (let at = 0; at < length; at += period.length) {
    all.set(period.subarray(0, Math.min(period.length, length - at)), at);
  }
  return all;
}

type Build = (context: Context) => Record<string, Tensor>;

const builds: Readonly<Record<string, (given: LayerCase) => Build>> = {
  moe_router:
    ({ tokens, hidden, slots, dtype }) =>
    (c) => ({
      logits: moeRouter({
        hidden: c.tensor(dtype, [tokens, hidden], values(tokens * hidden, 1)),
        weight: c.tensor(dtype, [slots, hidden], values(slots * hidden, 2, hidden ** -0.5)),
        bias: c.tensor('f32', [slots], values(slots, 3)),
      }),
    }),
  shared_experts: (given) => (c) => {
    const { tokens, hidden, dtype } = given;
    using experts = packCase(c, { ...given, slots: 1 });
    return {
      output: sharedExperts({
        hidden: c.tensor(dtype, [tokens, hidden], values(tokens * hidden, 4)),
        expertGate: c.tensor(dtype, [hidden], values(hidden, 5, hidden ** -0.5)),
        experts,
      }),
    };
  },
  fused_moe: (given) => (c) => {
    const { tokens, columns, slots, hidden, dtype, kind } = given;
    const { ids, weights } = routing(kind, tokens, columns, slots, new Random(6));
    using experts = packCase(c, given);
    return {
      output: fusedMoe({
        hidden: c.tensor(dtype, [tokens, hidden], values(tokens * hidden, 7)),
        ids: c.tensor('i32', [tokens, columns], ids),
        weights: c.tensor('f32', [tokens, columns], weights),
        experts,
      }),
    };
  },
  // Dispatch, experts and combine one after the other; rows that hold nothing stay out of the comparison
  moe_experts: (given) => (c) => {
    const { tokens, columns, slots, hidden, dtype, kind } = given;
    const { ids, weights } = routing(kind, tokens, columns, slots, new Random(8));
    using experts = packCase(c, given);
    const sorted = moeDispatch(
      {
        ids: c.tensor('i32', [tokens, columns], ids),
        hidden: c.tensor(dtype, [tokens, hidden], values(tokens * hidden, 9)),
      },
      { experts: slots, blockSize: 16 },
    );
    const { rows, counts, offsets, inverse } = sorted;
    const outputs = moeExperts({ rows: rows!, counts, offsets, experts });
    return {
      output: moeCombine({ rows: outputs, inverse, weights: c.tensor('f32', [tokens, columns], weights) }),
    };
  },
  moe_combine:
    ({ tokens, columns, hidden, dtype }) =>
    (c) => {
      const choices = tokens * columns;
      // Every place once, in an order that jumps about; every seventh choice has no row
      const inverse = Int32Array.from({ length: choices }, (_, i) =>
        i % 7 === 3 ? -1 : (i * 7919) % choices,
      );
      return {
        output: moeCombine({
          rows: c.tensor(dtype, [choices, hidden], values(choices * hidden, 10)),
          inverse: c.tensor('i32', [tokens, columns], inverse),
          weights: c.tensor('f32', [tokens, columns], values(choices, 11)),
        }),
      };
    },
};

describe.each(natives)('on %s', (backend) => {
  let context: Context;
  let oracle: Context;
  beforeAll(async () => {
    [context, oracle] = await Promise.all([contextOf(backend), referenceOf('oracle')]);
  });

  async function check(build: Build, dtype: FloatDType, reference: Context, label: string): Promise<void> {
    const actual = await outputsOf(context, build);
    const expected = await outputsOf(reference, build);
    for (const [name, bits] of Object.entries(actual)) {
      const as = bits instanceof Float32Array ? 'f32' : dtype;
      const [a, b] = [decode(as, bits as never), decode(as, expected[name] as never)];
      expect(relativeNorm(a as Float32Array, b as Float32Array), `${label}: ${name}`).toBeLessThan(
        relativeTolerance[as],
      );
    }
    expectSameBits(await outputsOf(context, build), actual, `a second run of ${label}`);
  }

  describe.each(Object.entries(builds))('%s', (op, build) => {
    it.each(gridTokens)('%i tokens', async (tokens) => {
      for (const dtype of ['f32', 'bf16', 'f16'] as const) {
        if (tokens === 40000 && dtype === 'f16') continue;
        for (const kind of op.includes('moe_experts') || op === 'fused_moe'
          ? (['uniform', 'one'] as const)
          : (['uniform'] as const)) {
          const given: LayerCase = {
            tokens,
            columns: 2,
            slots: 9,
            hidden: 24,
            intermediate: 16,
            dtype,
            kind,
          };
          await check(build(given), dtype, oracle, `${op} ${JSON.stringify(given)}`);
        }
      }
    });

    // Wide enough for whole tiles of tensor cores and what is left of them
    it.runIf(backend === 'cuda').each([513, 4097, 40000])('%i tokens of a wide layer', async (tokens) => {
      const cpu = await referenceOf('cpu');
      for (const dtype of ['f32', 'bf16', 'f16'] as const) {
        const wide =
          tokens === 40000 ? { hidden: 128, intermediate: 64 } : { hidden: 392, intermediate: 200 };
        const given: LayerCase = { tokens, columns: 3, slots: 12, ...wide, dtype, kind: 'skewed' };
        await check(build(given), dtype, cpu, `${op} ${JSON.stringify(given)}`);
      }
    });
  });
});
