import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, type SharedExpertsInputs, sharedExperts } from '../../lib/index.js';
import { shared_experts } from '../../lib/oracle/shared_experts.js';
import {
  clampedSwiGLU,
  denseExpert,
  type ExpertsCase,
  expertArrays,
  oracleExperts,
} from '../cases/experts.js';
import { floatDTypes, relativeNorm, relativeTolerance, rounded } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from './backends.js';
import { packCase } from './packed.js';

interface SharedCase extends Omit<ExpertsCase, 'slots'> {
  readonly tokens: number;
  readonly gated?: boolean;
  readonly routed?: boolean;
}

const expertsOf = (given: SharedCase): ExpertsCase => ({ ...given, slots: 1 });

function arrays(given: SharedCase) {
  const { tokens, hidden, dtype = 'f32' } = given;
  const random = new Random((given.seed ?? 1) * 7 + tokens);
  const normals = (count: number, scale = 1) => rounded(dtype, random.normals(count, scale));
  return {
    hidden: { shape: [tokens, hidden], data: normals(tokens * hidden) },
    ...(given.gated ? { expertGate: { shape: [hidden], data: normals(hidden, 1 / Math.sqrt(hidden)) } } : {}),
    ...(given.routed ? { routed: { shape: [tokens, hidden], data: normals(tokens * hidden) } } : {}),
  };
}

function oracle(given: SharedCase): Float32Array {
  const output = { shape: [given.tokens, given.hidden], data: new Float32Array(given.tokens * given.hidden) };
  shared_experts(
    { ...arrays(given), experts: oracleExperts(expertsOf(given)) },
    { part: 'whole' },
    { output },
  );
  return output.data;
}

function dense(given: SharedCase): Float64Array {
  const { tokens, hidden: width } = given;
  const { hidden, expertGate, routed } = arrays(given);
  const weights = expertArrays(expertsOf(given));
  const output = new Float64Array(tokens * width);
  for (let t = 0; t < tokens; t++) {
    const x = hidden.data.subarray(t * width, (t + 1) * width);
    const logit = x.reduce((sum, v, h) => sum + v * (expertGate?.data[h] ?? 0), 0);
    const gate = expertGate === undefined ? 1 : 1 / (1 + Math.exp(-logit));
    denseExpert(expertsOf(given), weights, 0, x).forEach((v, h) => {
      output[t * width + h] = gate * v + (routed?.data[t * width + h] ?? 0);
    });
  }
  return output;
}

function upload(context: Context, given: SharedCase): SharedExpertsInputs {
  const { dtype = 'f32' } = given;
  const tensors = Object.entries(arrays(given)).map(([name, { shape, data }]) => [
    name,
    context.tensor(dtype, shape, data),
  ]);
  return { ...Object.fromEntries(tensors), experts: packCase(context, expertsOf(given)) };
}

async function check(context: Context, given: SharedCase): Promise<void> {
  const tolerance = relativeTolerance[given.dtype ?? 'f32'];
  const inputs = upload(context, given);
  const whole = sharedExperts(inputs);
  expect(whole.dtype).toBe(given.dtype ?? 'f32');
  expect(relativeNorm(await whole.read(), oracle(given)), JSON.stringify(given)).toBeLessThan(tolerance);
  expect(relativeNorm(await whole.read(), dense(given)), JSON.stringify(given)).toBeLessThan(tolerance);

  const projected = sharedExperts({ hidden: inputs.hidden, experts: inputs.experts }, { part: 'gateUp' });
  expect(projected.shape).toEqual([given.tokens, 2 * given.intermediate]);
  const parts = sharedExperts({ ...inputs, projected }, { part: 'down' });
  expect(relativeNorm(await parts.read(), oracle(given)), JSON.stringify(given)).toBeLessThan(tolerance);
}

const base: SharedCase = { tokens: 33, hidden: 65, intermediate: 33 };

describe.each(backends)('shared_experts on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it.each([0, 1, 2, 31, 32, 33, 127])('%i tokens', async (tokens) => {
    for (const [hidden, intermediate] of [
      [1, 1],
      [7, 5],
      [64, 32],
      [129, 257],
    ]) {
      await check(context, { tokens, hidden, intermediate });
    }
  });

  it('many tokens, wide and long matrices', async () => {
    await check(context, { tokens: 150, hidden: 264, intermediate: 260, gated: true });
    await check(context, { tokens: 3, hidden: 520, intermediate: 528, dtype: 'bf16', gated: true });
  });

  // 16 values are read where they lie, 2 are copied first
  describe.skipIf(backend === 'oracle')('more tokens than fit scratch memory', () => {
    it.each([2, 16])('hidden %i', async (hidden) => {
      using experts = packCase(context, { slots: 1, hidden, intermediate: 16384 });
      const expertGate = context.tensor('f32', [hidden], new Random(1).normals(hidden));
      const forward = (count: number) => {
        const values = Float32Array.from(
          { length: hidden * count },
          (_, i) => (i % (13 * hidden)) / (6 * hidden) - 1,
        );
        return sharedExperts({
          hidden: context.tensor('f32', [count, hidden], values),
          experts,
          expertGate,
        }).read();
      };
      const [many, few] = [await forward(4500), await forward(13)]; // rows repeat after 13
      expect(many.every((value, i) => value === few[i % (13 * hidden)])).toBe(true);
    });
  });

  describe.each(floatDTypes)('%s', (dtype) => {
    it('biases and clamped activation', async () =>
      check(context, { ...base, dtype, biases: true, swiglu: clampedSwiGLU }));
    it('expert gate', async () => check(context, { ...base, dtype, gated: true }));
    it('added to the routed output', async () => check(context, { ...base, dtype, routed: true }));
    it('everything', async () => check(context, { ...base, dtype, gated: true, routed: true, biases: true }));
  });

  it('part gateUp gives the gate half, then the up half, biases included', async () => {
    const projected = sharedExperts(
      {
        hidden: context.tensor('f32', [1, 2], Float32Array.of(1, 10)),
        experts: packCase(
          context,
          { slots: 1, hidden: 2, intermediate: 1 },
          {
            w13: Float32Array.of(1, 2, 3, 4),
            w2: Float32Array.of(1, 1),
            b13: Float32Array.of(100, 200),
            b2: Float32Array.of(0, 0),
          },
        ),
      },
      { part: 'gateUp' },
    );
    expect([...(await projected.read())]).toEqual([121, 243]);
  });

  it('is bitwise equal from run to run', async () => {
    const inputs = upload(context, { ...base, tokens: 127, gated: true, routed: true });
    expect(await sharedExperts(inputs).read()).toEqual(await sharedExperts(inputs).read());
  });

  it('replays with new hidden states', async () => {
    const inputs = upload(context, { ...base, gated: true, seed: 9 });
    using step = context.capture(() => sharedExperts(inputs));
    const next = { ...base, gated: true, seed: 9, tokens: 33 };
    step.replay();
    expect(relativeNorm(await step.output.read(), oracle(next))).toBeLessThan(relativeTolerance.f32);
    inputs.hidden.write(new Float32Array(33 * 65));
    step.replay();
    expect((await step.output.read()).every((value) => value === 0)).toBe(true);
  });
});
