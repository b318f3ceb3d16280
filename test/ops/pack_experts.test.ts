import { beforeAll, describe, expect, it } from 'vitest';
import {
  allocateExperts,
  type Context,
  createContext,
  type ExpertWeights,
  fusedMoe,
  packExperts,
} from '../../lib/index.js';
import { pack_experts } from '../../lib/oracle/pack_experts.js';
import {
  type ExpertArrays,
  type ExpertsCase,
  expertArrays,
  interleaved,
  oracleExperts,
  transposed,
} from '../cases/experts.js';
import { floatDTypes, rounded } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from './backends.js';
import { packCase } from './packed.js';

const base = { slots: 5, hidden: 19, intermediate: 7, biases: true } as const;

/** What packed weights compute: every slot applied to the same rows, so that equal weights give equal bits. */
function outputOf(context: Context, experts: ExpertWeights): Promise<Float32Array> {
  const { slots, hidden } = experts;
  const tokens = 3 * slots;
  return fusedMoe({
    hidden: context.tensor('f32', [tokens, hidden], new Random(77).normals(tokens * hidden)),
    ids: context.tensor(
      'i32',
      [tokens, 1],
      Int32Array.from({ length: tokens }, (_, t) => t % slots),
    ),
    weights: context.tensor('f32', [tokens, 1], new Float32Array(tokens).fill(1)),
    experts,
  }).read();
}

/** The same weights as a checkpoint with this layout stores them. */
function stored(
  given: ExpertsCase,
  arrays: ExpertArrays,
  gateUp: 'halves' | 'interleaved',
  swap: boolean,
): ExpertArrays {
  const { slots, hidden, intermediate } = given;
  let { w13, w2, b13, b2 } = arrays;
  if (gateUp === 'interleaved') {
    w13 = interleaved(w13, slots, intermediate, hidden);
    b13 = b13 && interleaved(b13, slots, intermediate, 1);
  }
  if (swap) {
    w13 = transposed(w13, slots, 2 * intermediate, hidden);
    w2 = transposed(w2, slots, hidden, intermediate);
  }
  return { w13, w2, ...(b13 === undefined ? {} : { b13 }), ...(b2 === undefined ? {} : { b2 }) };
}

const layouts = [
  ['halves', false],
  ['halves', true],
  ['interleaved', false],
  ['interleaved', true],
] as const;

describe('the oracle of pack_experts', () => {
  it.each(layouts)('puts %s, transposed %s, into place', (gateUp, swap) => {
    const given = { ...base, dtype: 'bf16' } as const;
    const arrays = expertArrays(given);
    const { w13, w2, b13, b2 } = stored(given, arrays, gateUp, swap);
    const expected = oracleExperts(given, arrays);
    const empty = (size: number) => Array.from({ length: 6 }, () => new Float32Array(size));
    const experts = {
      ...expected,
      slots: 6,
      w13: empty(expected.w13[0].length),
      w2: empty(expected.w2[0].length),
      b13: empty(expected.b13[0].length),
      b2: empty(expected.b2[0].length),
    };
    const rows = { shape: [given.slots, 0, 0] };
    pack_experts(
      {
        experts,
        w13: { ...rows, data: w13 },
        w2: { ...rows, data: w2 },
        b13: { ...rows, data: b13! },
        b2: { ...rows, data: b2! },
      },
      { gateUp, transposed: swap, firstSlot: 1 },
      {},
    );
    expect(experts.w13.slice(1)).toEqual(expected.w13);
    expect(experts.w2.slice(1)).toEqual(expected.w2);
    expect(experts.b13.slice(1)).toEqual(expected.b13);
    expect(experts.b2.slice(1)).toEqual(expected.b2);
    expect(experts.w13[0].every((w) => w === 0)).toBe(true);
  });
});

describe.each(backends)('pack_experts on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  describe.each(floatDTypes)('%s', (dtype) => {
    it.each(layouts)('%s, transposed %s, is the same weights', async (gateUp, swap) => {
      for (const shape of [
        base,
        { slots: 1, hidden: 1, intermediate: 1 },
        { slots: 2, hidden: 301, intermediate: 70, biases: true },
      ]) {
        const given = { ...shape, dtype };
        const arrays = expertArrays(given);
        const plain = await outputOf(context, packCase(context, given, arrays));
        const experts = packCase(context, given, stored(given, arrays, gateUp, swap), {
          gateUp,
          transposed: swap,
        });
        expect(await outputOf(context, experts)).toEqual(plain);
      }
    });

    it('converts to the dtype asked for, biases in f32', async () => {
      const arrays = expertArrays(base);
      const narrow = { ...arrays, w13: rounded(dtype, arrays.w13), w2: rounded(dtype, arrays.w2) };
      const converted = packCase(context, base, arrays, { dtype });
      expect(converted.dtype).toBe(dtype);
      const reference = packCase(context, base, narrow, { dtype });
      expect(await outputOf(context, converted)).toEqual(await outputOf(context, reference));
      const widened = packCase(context, base, narrow, { dtype: 'f32' });
      expect(widened.dtype).toBe('f32');
      const [a, b] = [await outputOf(context, converted), await outputOf(context, widened)];
      for (const [i, value] of a.entries())
        expect(Math.abs(value - b[i])).toBeLessThan(dtype === 'f32' ? 1e-12 : 0.05);
    });
  });

  it('fills slots one by one into the same weights as at once', async () => {
    const arrays = expertArrays(base);
    const whole = await outputOf(context, packCase(context, base, arrays));
    const into = allocateExperts(context, { ...base, dtype: 'f32' });
    expect((await outputOf(context, into)).every((value) => value === 0)).toBe(true);
    for (const firstSlot of [4, 0, 1, 3, 2]) {
      const slice = (values: Float32Array) =>
        values.slice((firstSlot * values.length) / 5, ((firstSlot + 1) * values.length) / 5);
      const { w13, w2, b13, b2 } = arrays;
      const one = { w13: slice(w13), w2: slice(w2), b13: slice(b13!), b2: slice(b2!) };
      expect(packCase(context, { ...base, slots: 1 }, one, { into, firstSlot })).toBe(into);
    }
    expect(await outputOf(context, into)).toEqual(whole);
  });

  it('overwrites the slots given and no others, biases included', async () => {
    const experts = packCase(context, base);
    const before = await outputOf(context, experts);
    const { w13, w2 } = expertArrays({ ...base, slots: 2, seed: 5 });
    const two = { ...base, slots: 2 };
    packCase(context, two, { w13, w2 }, { into: experts, firstSlot: 2 });
    const after = await outputOf(context, experts);

    const other = packCase(context, base);
    const zeros = { b13: new Float32Array(2 * 14), b2: new Float32Array(2 * 19) };
    packCase(context, two, { w13, w2, ...zeros }, { into: other, firstSlot: 2 });
    expect(after).toEqual(await outputOf(context, other)); // biases left out are 0, not those of before
    for (const [i, value] of after.entries()) {
      const slot = Math.floor(i / base.hidden) % base.slots;
      if (slot === 2 || slot === 3) expect(value).not.toBe(before[i]);
      else expect(value).toBe(before[i]);
    }
  });

  it('refuses biases for weights that were made without', async () => {
    const own = await createContext({ backend }); // what a failed op leaves behind stays here
    const run = async () => {
      const into = allocateExperts(own, { slots: 5, hidden: 19, intermediate: 7, dtype: 'f32' });
      packCase(own, base, expertArrays(base), { into });
      await own.synchronize();
    };
    await expect(run()).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      op: 'pack_experts',
      arg: 'b13',
    });
    await own.close();
  });

  it('leaves the tensors given as they were', async () => {
    const { w13, w2 } = expertArrays({ slots: 2, hidden: 3, intermediate: 4 });
    const tensors = { w13: context.tensor('f32', [2, 8, 3], w13), w2: context.tensor('f32', [2, 3, 4], w2) };
    packExperts(tensors, { dtype: 'bf16' });
    expect(await tensors.w13.read()).toEqual(w13);
    expect(await tensors.w2.read()).toEqual(w2);
  });

  it('describes what it packed', () => {
    const experts = packCase(context, { ...base, dtype: 'f16', swiglu: { limit: 7 } });
    expect(experts).toMatchObject({ ...base, dtype: 'f16', swiglu: { alpha: 1, beta: 0, limit: 7 } });
    expect(experts.bytes).toBeGreaterThan(0);
  });

  it('can be captured', async () => {
    const arrays = expertArrays({ ...base, biases: false });
    const w13 = context.tensor('f32', [5, 14, 19], arrays.w13);
    const w2 = context.tensor('f32', [5, 19, 7], arrays.w2);
    const into = allocateExperts(context, { ...base, biases: false, dtype: 'f32' });
    using step = context.capture(() => packExperts({ w13, w2 }, { into }));
    expect((await outputOf(context, into)).every((value) => value === 0)).toBe(true);
    step.replay();
    expect(await outputOf(context, into)).toEqual(
      await outputOf(context, packCase(context, { ...base, biases: false }, arrays)),
    );
  });
});
