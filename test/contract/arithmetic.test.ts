// Contract 3: f32 from the first operation, one result per backend, dtypes of what comes out.
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type Context,
  createContext,
  fusedMoe,
  moeFusedGate,
  moeRouter,
  type Tensor,
} from '../../lib/index.js';
import { routing } from '../cases/experts.js';
import { floatDTypes } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from '../ops/backends.js';
import { packCase } from '../ops/packed.js';

describe.each(backends)('arithmetic on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it('bf16 logits are widened: scores equal in bf16 still differ', async () => {
    const logits = context.tensor('bf16', [1, 2], Float32Array.of(4, 4.03125));
    const { ids, weights } = moeFusedGate({ logits }, { topK: 2, scoring: 'sigmoid' });
    expect([...(await ids.read())]).toEqual([1, 0]);
    const [first, second] = await weights.read();
    expect(first - second).toBeGreaterThan(5e-4);
  });

  it('the correction bias is not rounded to the dtype of the logits', async () => {
    const { ids } = moeFusedGate(
      {
        logits: context.tensor('bf16', [1, 3]),
        bias: context.tensor('f32', [3], Float32Array.of(1, 1.0001, 1.00005)),
      },
      { topK: 3, scoring: 'sigmoid' },
    );
    expect([...(await ids.read())]).toEqual([1, 2, 0]);
  });

  it('router products of bf16 are exact in f32', async () => {
    // 257 does not fit bf16, nor does a running sum of 1s beyond 256
    const logits = moeRouter({
      hidden: context.tensor('bf16', [1, 600], new Float32Array(600).fill(1)),
      weight: context.tensor('bf16', [1, 600], new Float32Array(600).fill(1)),
    });
    expect([...(await logits.read())]).toEqual([600]);
  });

  it('experts accumulate in f32: small terms are not lost in bf16 or f16', async () => {
    for (const dtype of floatDTypes) {
      const [hidden, intermediate] = [1024, 1];
      const given = { slots: 1, hidden, intermediate, dtype };
      const w13 = new Float32Array(2 * hidden).fill(2 ** -10);
      const experts = packCase(context, given, { w13, w2: new Float32Array(hidden).fill(1) });
      const output = fusedMoe({
        hidden: context.tensor(dtype, [1, hidden], new Float32Array(hidden).fill(1)),
        ids: context.tensor('i32', [1, 1]),
        weights: context.tensor('f32', [1, 1], Float32Array.of(1)),
        experts,
      });
      const [value] = await output.read(); // g = u = 1, and silu(1) = 0.7310586
      expect(Math.abs(value / 0.7310586 - 1)).toBeLessThan(4e-3);
    }
  });

  it('gives weights in f32, ids in i32 and experts in the dtype of the hidden states', () => {
    for (const dtype of floatDTypes) {
      const { ids, weights } = moeFusedGate({ logits: context.tensor(dtype, [2, 4]) }, { topK: 1 });
      expect([ids.dtype, weights.dtype]).toEqual(['i32', 'f32']);
      const experts = packCase(context, { slots: 4, hidden: 3, intermediate: 2 });
      const output = fusedMoe({ hidden: context.tensor(dtype, [2, 3]), ids, weights, experts });
      expect(output.dtype).toBe(dtype);
    }
  });

  it('does not depend on the number of threads', async () => {
    const random = new Random(12);
    const [tokens, slots, hidden, intermediate] = [65, 8, 48, 40];
    const x = random.normals(tokens * hidden);
    const router = random.normals(slots * hidden, 0.3);
    const { ids, weights } = routing('skewed', tokens, 3, slots, random);
    const results = [];
    for (const threads of [1, 2, 5]) {
      const own = await createContext({ backend, threads });
      const experts = packCase(own, { slots, hidden, intermediate });
      const xs = own.tensor('f32', [tokens, hidden], x);
      const logits = moeRouter({ hidden: xs, weight: own.tensor('f32', [slots, hidden], router) });
      const gate = moeFusedGate({ logits }, { topK: 3, renormalize: true });
      const outputs: Tensor[] = [
        logits,
        gate.weights,
        fusedMoe({ hidden: xs, ...gate, experts }),
        fusedMoe({
          hidden: xs,
          ids: own.tensor('i32', [tokens, 3], ids),
          weights: own.tensor('f32', [tokens, 3], weights),
          experts,
        }),
      ];
      results.push(await Promise.all(outputs.map((tensor) => tensor.read())));
      await own.close();
    }
    expect(results[1]).toEqual(results[0]);
    expect(results[2]).toEqual(results[0]);
  });
});
