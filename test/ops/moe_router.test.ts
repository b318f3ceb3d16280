import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, type FloatDType, moeRouter } from '../../lib/index.js';
import { moe_router } from '../../lib/oracle/moe_router.js';
import { floatDTypes, relativeNorm, rounded } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from './backends.js';

interface RouterCase {
  readonly tokens: number;
  readonly hidden: number;
  readonly experts: number;
  readonly hiddenDType?: FloatDType;
  readonly weightDType?: FloatDType;
  readonly bias?: boolean;
  /** Small integers, whose products and sums are exact in every order. */
  readonly exact?: boolean;
  readonly seed?: number;
}

function arrays({ tokens, hidden, experts, hiddenDType = 'f32', weightDType = 'f32', ...rest }: RouterCase) {
  const random = new Random(rest.seed ?? 1);
  const values = (count: number) =>
    rest.exact ? Float32Array.from({ length: count }, () => random.integer(9) - 4) : random.normals(count);
  return {
    hidden: rounded(hiddenDType, values(tokens * hidden)),
    weight: rounded(weightDType, values(experts * hidden)),
    ...(rest.bias ? { bias: values(experts) } : {}),
  };
}

function oracle(given: RouterCase): Float32Array {
  const { tokens, hidden, experts } = given;
  const data = arrays(given);
  const logits = { shape: [tokens, experts], data: new Float32Array(tokens * experts) };
  moe_router(
    {
      hidden: { shape: [tokens, hidden], data: data.hidden },
      weight: { shape: [experts, hidden], data: data.weight },
      ...(data.bias === undefined ? {} : { bias: { shape: [experts], data: data.bias } }),
    },
    {},
    { logits },
  );
  return logits.data;
}

function run(context: Context, given: RouterCase) {
  const { tokens, hidden, experts, hiddenDType = 'f32', weightDType = 'f32' } = given;
  const data = arrays(given);
  return moeRouter({
    hidden: context.tensor(hiddenDType, [tokens, hidden], data.hidden),
    weight: context.tensor(weightDType, [experts, hidden], data.weight),
    ...(data.bias === undefined ? {} : { bias: context.tensor('f32', [experts], data.bias) }),
  });
}

describe.each(backends)('moe_router on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it('multiplies by the transposed weight and adds the bias', async () => {
    const logits = moeRouter({
      hidden: context.tensor('f32', [2, 3], Float32Array.of(1, 2, 3, -1, 0, 1)),
      weight: context.tensor('f32', [2, 3], Float32Array.of(1, 10, 100, 0, 0, 1)),
      bias: context.tensor('f32', [2], Float32Array.of(0.5, -0.5)),
    });
    expect(logits.dtype).toBe('f32');
    expect([...(await logits.read())]).toEqual([321.5, 2.5, 99.5, 0.5]);
  });

  it.each([0, 1, 2, 31, 32, 33, 127, 513])('%i tokens', async (tokens) => {
    for (const [hidden, experts] of [
      [1, 1],
      [7, 3],
      [33, 60],
      [64, 8],
      [129, 64],
      [1100, 17],
    ]) {
      const given = { tokens, hidden, experts, bias: tokens % 2 === 1, seed: hidden };
      expect(relativeNorm(await run(context, given).read(), oracle(given))).toBeLessThan(5e-6);
    }
  });

  it.each([160, 256, 384, 512, 1024])('%i experts', async (experts) => {
    const given = { tokens: 5, hidden: 257, experts, bias: true };
    expect(relativeNorm(await run(context, given).read(), oracle(given))).toBeLessThan(5e-6);
  });

  describe.each(floatDTypes)('hidden in %s', (hiddenDType) => {
    it.each(floatDTypes)('weight in %s', async (weightDType) => {
      const given = { tokens: 17, hidden: 301, experts: 20, hiddenDType, weightDType, bias: true };
      expect(relativeNorm(await run(context, given).read(), oracle(given))).toBeLessThan(5e-6);
      const exact = { ...given, exact: true };
      expect(await run(context, exact).read()).toEqual(oracle(exact));
    });
  });

  // 288 MB once widened; the oracle has no scratch memory to run out of
  it.skipIf(backend === 'oracle')('more than fits any scratch memory', async () => {
    const [tokens, hidden] = [1100, 65536];
    const ones = new Uint16Array(tokens * hidden).fill(0x3f80);
    for (let t = 0; t < tokens; t++) ones[t * hidden + t] = 0x4000; // one 2 in every row
    const logits = moeRouter({
      hidden: context.tensor('bf16', [tokens, hidden], ones),
      weight: context.tensor('bf16', [1, hidden], new Uint16Array(hidden).fill(0x3f80)),
    });
    expect((await logits.read()).every((logit) => logit === 65537)).toBe(true);
  });

  it('is bitwise equal from run to run', async () => {
    const given = { tokens: 127, hidden: 333, experts: 64, bias: true };
    expect(await run(context, given).read()).toEqual(await run(context, given).read());
  });

  it('replays with new hidden states', async () => {
    const given = { tokens: 9, hidden: 40, experts: 6 };
    const data = arrays(given);
    const hidden = context.tensor('f32', [9, 40]);
    const weight = context.tensor('f32', [6, 40], data.weight);
    using step = context.capture(() => moeRouter({ hidden, weight }));
    step.replay();
    expect((await step.output.read()).every((logit) => logit === 0)).toBe(true);
    hidden.write(data.hidden);
    step.replay();
    expect(relativeNorm(await step.output.read(), oracle(given))).toBeLessThan(5e-6);
  });
});
