// Contract 4: one owner of the scaling factor. A layer whose shared experts are fused as ordinary slots gives what
// the layer with a separate dense shared MLP gives, however the factor is placed.
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type Context,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeFusedGate,
  moeRouter,
  packExperts,
  sharedExperts,
} from '../../lib/index.js';
import { denseExpert, type ExpertArrays, type ExpertsCase, expertArrays } from '../cases/experts.js';
import { floatDTypes, relativeNorm, relativeTolerance, rounded } from '../cases/floats.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from '../ops/backends.js';
import { packCase } from '../ops/packed.js';

const [tokens, hidden, intermediate, experts, topK] = [33, 40, 12, 8, 3];

/** n slices of one wide shared MLP as n more experts: gate and up split by rows, down by columns. */
function slices(wide: ExpertArrays, n: number): ExpertArrays {
  const width = n * intermediate;
  const w13 = new Float32Array(n * 2 * intermediate * hidden);
  const w2 = new Float32Array(n * hidden * intermediate);
  for (let j = 0; j < n; j++) {
    const part = intermediate * hidden;
    w13.set(wide.w13.subarray(j * part, (j + 1) * part), 2 * j * part);
    w13.set(
      wide.w13.subarray(width * hidden + j * part, width * hidden + (j + 1) * part),
      (2 * j + 1) * part,
    );
    for (let h = 0; h < hidden; h++) {
      const row = h * width + j * intermediate;
      w2.set(wide.w2.subarray(row, row + intermediate), (j * hidden + h) * intermediate);
    }
  }
  return { w13, w2 };
}

const joined = (a: Float32Array, b: Float32Array) => Float32Array.of(...a, ...b);

describe.each(backends)('scaling on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  const grid = [0, 1, 2, 3].flatMap((n) =>
    [true, false].flatMap((renormalize) =>
      [1, 2.5].flatMap((s) =>
        (['inWeights', 'onOutput'] as const).map((place) => ({ n, renormalize, s, place })),
      ),
    ),
  );

  it.each(grid)('fused = unfused: $n shared, renormalize $renormalize, s = $s $place', async (given) => {
    const { n, renormalize, s, place } = given;
    for (const dtype of floatDTypes) {
      const random = new Random(n + 10);
      const routedCase: ExpertsCase = { slots: experts, hidden, intermediate, dtype };
      const wideCase: ExpertsCase = { slots: 1, hidden, intermediate: n * intermediate, dtype, seed: 2 };
      const routed = expertArrays(routedCase);
      const wide = expertArrays(wideCase);
      const x = rounded(dtype, random.normals(tokens * hidden));
      const bias = random.normals(experts, 0.2);
      const router = random.normals(experts * hidden, 0.2);
      const xs = context.tensor(dtype, [tokens, hidden], x);
      const logits = moeRouter({ hidden: xs, weight: context.tensor('f32', [experts, hidden], router) });
      const inputs = { logits, bias: context.tensor('f32', [experts], bias) };
      const options = {
        topK,
        scoring: 'sigmoid',
        groups: 4,
        topGroups: 2,
        renormalize,
        routedScalingFactor: s,
      } as const;

      // Unfused: the routed experts carry s in their weights, the shared MLP is added as it is
      const plain = moeFusedGate(inputs, options);
      const routedOnly = fusedMoe({ hidden: xs, ...plain, experts: packCase(context, routedCase, routed) });
      const unfused =
        n === 0
          ? routedOnly
          : sharedExperts({ hidden: xs, experts: packCase(context, wideCase, wide), routed: routedOnly });

      // Fused: the shared slices are experts E..E+n-1 of every token
      const parts = n === 0 ? { w13: new Float32Array(), w2: new Float32Array() } : slices(wide, n);
      const all = packCase(
        context,
        { ...routedCase, slots: experts + n },
        { w13: joined(routed.w13, parts.w13), w2: joined(routed.w2, parts.w2) },
      );
      const gate = moeFusedGate(inputs, { ...options, sharedExperts: n, scalePlacement: place });
      const outputScale = place === 'onOutput' ? s : 1;
      const fused = fusedMoe({ hidden: xs, ...gate, experts: all }, { outputScale });
      const dispatched = moeDispatch({ ids: gate.ids, hidden: xs }, { experts: experts + n, blockSize: 8 });
      const outputs = moeExperts({ ...places(dispatched), rows: dispatched.rows!, experts: all });
      const combined = moeCombine(
        { rows: outputs, inverse: dispatched.inverse, weights: gate.weights },
        { outputScale },
      );

      // And the layer as the paper writes it, in f64
      const reference = layer(
        { x, ids: await plain.ids.read(), weights: await plain.weights.read() },
        [routedCase, routed],
        [wideCase, wide, n],
      );
      const tolerance = relativeTolerance[dtype];
      expect(relativeNorm(await fused.read(), reference)).toBeLessThan(tolerance);
      expect(relativeNorm(await combined.read(), reference)).toBeLessThan(tolerance);
      expect(relativeNorm(await unfused.read(), reference)).toBeLessThan(tolerance);
    }
  });

  it.each([
    ['inWeights', 1],
    ['onOutput', 0.4],
  ] as const)('%s: a shared expert weighs %f, whatever the routed sum', async (scalePlacement, expected) => {
    for (const renormalize of [true, false]) {
      const logits = context.tensor('f32', [2, 4], Float32Array.of(-9, -9, -9, -9, 9, 9, 9, 9));
      const { weights } = moeFusedGate(
        { logits },
        {
          topK: 2,
          scoring: 'sigmoid',
          sharedExperts: 3,
          renormalize,
          routedScalingFactor: 2.5,
          scalePlacement,
        },
      );
      const values = await weights.read();
      for (const t of [0, 1]) {
        for (const weight of values.subarray(5 * t + 2, 5 * t + 5))
          expect(Math.abs(weight - expected)).toBeLessThan(1e-7);
      }
    }
  });

  it('renormalised weights add up to s, or to 1 where s is on the output', async () => {
    const logits = context.tensor('f32', [33, 60], new Random(4).normals(33 * 60));
    for (const scalePlacement of ['inWeights', 'onOutput'] as const) {
      const options = {
        topK: 7,
        renormalize: true,
        routedScalingFactor: 2.5,
        scalePlacement,
        sharedExperts: 2,
      };
      const values = await moeFusedGate({ logits }, options).weights.read();
      for (let t = 0; t < 33; t++) {
        const sum = values.subarray(9 * t, 9 * t + 7).reduce((a, b) => a + b, 0);
        expect(Math.abs(sum - (scalePlacement === 'inWeights' ? 2.5 : 1))).toBeLessThan(2e-6);
      }
    }
  });

  it('a zero expert adds weight x hidden, once, also through the whole layer', async () => {
    const random = new Random(6);
    const xs = context.tensor('f32', [tokens, hidden], random.normals(tokens * hidden));
    const logits = context.tensor('f32', [tokens, experts + 4], random.normals(tokens * (experts + 4)));
    const options = { topK: 5, zeroExperts: 4, sharedExperts: 1, routedScalingFactor: 6 } as const;
    const gate = moeFusedGate({ logits }, options);
    const silent = packExperts({
      w13: context.tensor('f32', [experts + 1, 2 * intermediate, hidden]),
      w2: context.tensor('f32', [experts + 1, hidden, intermediate]),
    });
    const output = fusedMoe(
      { hidden: xs, ...gate, experts: silent },
      { zeroExperts: 4, firstZeroExpert: experts + 1 },
    );
    const [ids, weights, x] = [await gate.ids.read(), await gate.weights.read(), await xs.read()];
    const expected = x.map((value, i) => {
      const row = Math.floor(i / hidden) * 6;
      const share = [0, 1, 2, 3, 4].reduce(
        (sum, c) => sum + (ids[row + c] > experts ? weights[row + c] : 0),
        0,
      );
      return share * value;
    });
    expect(expected.some((value) => value !== 0)).toBe(true);
    expect(relativeNorm(await output.read(), expected)).toBeLessThan(relativeTolerance.f32);
  });
});

/** What moeExperts takes of a dispatch. */
const places = ({ counts, offsets }: ReturnType<typeof moeDispatch>) => ({ counts, offsets });

/** y = sum of weight x expert + shared MLP, in f64. */
function layer(
  { x, ids, weights }: { x: Float32Array; ids: Int32Array; weights: Float32Array },
  [routedCase, routed]: [ExpertsCase, ExpertArrays],
  [wideCase, wide, n]: [ExpertsCase, ExpertArrays, number],
): Float64Array {
  const output = new Float64Array(tokens * hidden);
  for (let t = 0; t < tokens; t++) {
    const row = x.subarray(t * hidden, (t + 1) * hidden);
    const terms: Float64Array[] = [...ids.subarray(t * topK, (t + 1) * topK)].map((id, c) => {
      const weight = weights[t * topK + c];
      return denseExpert(routedCase, routed, id, row).map((value) => weight * value);
    });
    if (n > 0) terms.push(denseExpert(wideCase, wide, 0, row));
    for (let h = 0; h < hidden; h++) {
      for (const term of terms) output[t * hidden + h] += term[h];
    }
  }
  return output;
}
