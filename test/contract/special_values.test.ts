// Contract 2: NaN, infinities and sums of 0.
import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, type MoeFusedGateOptions, moeFusedGate } from '../../lib/index.js';
import { floatDTypes } from '../cases/floats.js';
import { backends, contextOf } from '../ops/backends.js';

const { NaN: nan, POSITIVE_INFINITY: inf } = Number;

interface Row {
  readonly name: string;
  readonly logits: number[];
  readonly bias?: number[];
  readonly options: MoeFusedGateOptions;
  readonly ids: number[];
  readonly weights: number[];
}

const sigmoid = (x: number) => 1 / (1 + Math.exp(-x));
const rows: Row[] = [
  {
    name: 'a NaN logit is left out of the softmax and ranks below -inf',
    logits: [nan, 0, -inf, 0],
    options: { topK: 4 },
    ids: [1, 3, 2, 0],
    weights: [0.5, 0.5, 0, 0],
  },
  {
    name: 'a NaN bias does the same, whatever the logit',
    logits: [9, 0, 9, 0],
    bias: [nan, 0, -inf, 0],
    options: { topK: 4, scoring: 'sigmoid' },
    ids: [1, 3, 2, 0],
    weights: [0.5, 0.5, sigmoid(9), 0],
  },
  {
    name: 'a NaN bias leaves its expert out of the softmax',
    logits: [9, 0, 0],
    bias: [nan, 0, 0],
    options: { topK: 3 },
    ids: [1, 2, 0],
    weights: [0.5, 0.5, 0],
  },
  {
    name: '+inf entries share a softmax equally',
    logits: [inf, 5, inf, -inf, nan],
    options: { topK: 5 },
    ids: [0, 2, 1, 3, 4],
    weights: [0.5, 0.5, 0, 0, 0],
  },
  {
    name: 'all -inf: softmax 0',
    logits: [-inf, -inf, -inf],
    options: { topK: 2 },
    ids: [0, 1],
    weights: [0, 0],
  },
  {
    name: 'all -inf, renormalised: a sum of 0 gives 0',
    logits: [-inf, -inf, -inf],
    options: { topK: 2, renormalize: true, routedScalingFactor: 2.5, sharedExperts: 1 },
    ids: [0, 1, 3],
    weights: [0, 0, 1],
  },
  {
    name: 'all NaN: lowest ids, weights 0, shared experts as ever',
    logits: [nan, nan, nan],
    options: {
      topK: 2,
      renormalize: true,
      sharedExperts: 1,
      routedScalingFactor: 2.5,
      scalePlacement: 'onOutput',
    },
    ids: [0, 1, 3],
    weights: [0, 0, 0.4],
  },
  {
    name: 'sigmoid of the infinities',
    logits: [-inf, inf, 0],
    options: { topK: 3, scoring: 'sigmoid' },
    ids: [1, 2, 0],
    weights: [1, 0.5, 0],
  },
  {
    name: 'infinite scores share a renormalisation equally',
    logits: [inf, 3, inf, -inf],
    options: { topK: 3, scoring: 'sqrtSoftplus', renormalize: true },
    ids: [0, 2, 1],
    weights: [0.5, 0.5, 0],
  },
  {
    name: 'an infinite score and a bias of -inf rank as NaN',
    logits: [inf, 0],
    bias: [-inf, -inf],
    options: { topK: 2, scoring: 'sqrtSoftplus', renormalize: true },
    ids: [1, 0],
    weights: [1, 0],
  },
  {
    name: 'raw logits: NaN is chosen last and left out of the softmax over the chosen',
    logits: [nan, 1, nan, 1],
    options: { topK: 3, selection: 'logits' },
    ids: [1, 3, 0],
    weights: [0.5, 0.5, 0],
  },
  {
    name: 'raw logits: +inf among the chosen',
    logits: [1, inf, -inf],
    options: { topK: 3, selection: 'logits' },
    ids: [1, 0, 2],
    weights: [1, 0, 0],
  },
  {
    name: 'raw logits: all -inf',
    logits: [-inf, -inf],
    options: { topK: 2, selection: 'logits', renormalize: true },
    ids: [0, 1],
    weights: [0, 0],
  },
  {
    name: 'uniform choices do not look at NaN, which still weighs 0',
    logits: [nan, nan],
    options: { topK: 2, selection: 'uniform', scoring: 'sigmoid' },
    ids: [0, 1], // sorted below
    weights: [0, 0],
  },
  {
    name: 'a group adds the non-NaN scores it has',
    logits: [nan, 3, 0, 0, nan, nan],
    options: { topK: 2, scoring: 'sigmoid', groups: 3, topGroups: 2, groupScore: 'top2Sum' },
    ids: [1, 2],
    weights: [sigmoid(3), 0.5],
  },
  {
    name: 'a group with one NaN beats a group of two small scores',
    logits: [-3, -3, nan, 3],
    options: { topK: 2, scoring: 'sigmoid', groups: 2, topGroups: 1, groupScore: 'top2Sum' },
    ids: [3, 2],
    weights: [sigmoid(3), 0],
  },
  {
    name: 'a group without any number ranks after one of -inf',
    logits: [0, 0, 0, 0],
    bias: [nan, nan, -inf, -inf],
    options: { topK: 2, scoring: 'sigmoid', groups: 2, topGroups: 1 },
    ids: [2, 3],
    weights: [0.5, 0.5],
  },
  {
    name: 'a group sum of inf - inf ranks last',
    logits: [0, 0, 0, 0],
    bias: [inf, -inf, -inf, -inf],
    options: { topK: 2, scoring: 'sigmoid', groups: 2, topGroups: 1 },
    ids: [2, 3],
    weights: [0.5, 0.5],
  },
  {
    name: 'an infinite bias chooses and does not weigh',
    logits: [1, 0, 0],
    bias: [0, 0, inf],
    options: { topK: 1, scoring: 'sigmoid', renormalize: true },
    ids: [2],
    weights: [1],
  },
];

describe.each(backends)('special values on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it.each(rows)('$name', async ({ logits, bias, options, ids, weights }) => {
    for (const dtype of floatDTypes) {
      // Three rows, so that no lane of a row is the last of a block
      const output = moeFusedGate(
        {
          logits: context.tensor(
            dtype,
            [3, logits.length],
            Float32Array.from([...logits, ...logits, ...logits]),
          ),
          ...(bias === undefined
            ? {}
            : { bias: context.tensor('f32', [bias.length], Float32Array.from(bias)) }),
        },
        options,
      );
      const [actualIds, actualWeights] = [await output.ids.read(), await output.weights.read()];
      for (let t = 0; t < 3; t++) {
        const row = [...actualIds.subarray(t * ids.length, (t + 1) * ids.length)];
        expect(options.selection === 'uniform' ? row.toSorted() : row, `${dtype} row ${t}`).toEqual(ids);
        for (const [c, weight] of weights.entries()) {
          expect(Math.abs(actualWeights[t * ids.length + c] - weight), `${dtype} weight ${c}`).toBeLessThan(
            1e-6,
          );
        }
      }
    }
  });
});
