// Chooses experts and weighs them. Every elementary result is rounded to f32; sums run in id order over a row's
// experts and in slot order over its chosen ones. Rank: higher choice first, NaN after everything else, ties to the
// lower id; the same for groups.
import type { OracleTensor } from './values.js';

interface Inputs {
  logits: OracleTensor;
  bias?: OracleTensor;
  /** Already a number from 0 to tokens; absent for all. */
  validTokens?: number;
  idMap?: OracleTensor<Int32Array>;
  load?: OracleTensor<BigInt64Array>;
}

interface Options {
  topK: number;
  scoring: 'softmax' | 'sigmoid' | 'sqrtSoftplus';
  selection: 'score' | 'logits' | 'uniform';
  groups: number;
  topGroups: number;
  groupScore: 'max' | 'top2Sum';
  renormalize: boolean;
  routedScalingFactor: number;
  scalePlacement: 'inWeights' | 'onOutput';
  sharedExperts: number;
  zeroExperts: number;
  captureLogicalIds: boolean;
  seed: number;
}

interface Outputs {
  ids: OracleTensor<Int32Array>;
  weights: OracleTensor;
  logicalIds?: OracleTensor<Int32Array>;
}

const f32 = Math.fround;
const INFINITY = Number.POSITIVE_INFINITY;

export function moe_fused_gate(inputs: Inputs, options: Options, outputs: Outputs): void {
  const { logits, bias, idMap, load } = inputs;
  const { topK, sharedExperts } = options;
  const [tokens, experts] = logits.shape;
  const routed = experts - options.zeroExperts;
  const valid = inputs.validTokens ?? tokens;
  const columns = topK + sharedExperts;
  const scale = f32(options.routedScalingFactor);
  const [routedScale, sharedWeight] = options.scalePlacement === 'inWeights' ? [scale, 1] : [1, 1 / scale];
  outputs.ids.data.fill(-1);
  outputs.logicalIds?.data.fill(-1);

  for (let t = 0; t < valid; t++) {
    const row = logits.data.slice(t * experts, (t + 1) * experts);
    for (let e = 0; e < experts; e++)
      if (bias !== undefined && Number.isNaN(bias.data[e])) row[e] = Number.NaN;
    const scores = score(row, options.scoring);
    const choices = choicesOf(row, scores, bias?.data, t, options);
    const chosen = best(choices, keptExperts(choices, options), topK);
    const weights = weigh(chosen, row, scores, choices, options);
    for (let c = 0; c < columns; c++) {
      let id = routed + c - topK; // a shared expert, unless c is one of the topK
      if (c < topK) id = chosen[c] < routed ? chosen[c] : chosen[c] + sharedExperts;
      if (c < topK && outputs.logicalIds !== undefined) outputs.logicalIds.data[t * topK + c] = id;
      if (idMap !== undefined) id = idMap.data[(t % idMap.shape[0]) * idMap.shape[1] + id];
      if (load !== undefined && id >= 0 && id < load.data.length) load.data[id] += 1n;
      outputs.ids.data[t * columns + c] = id;
      outputs.weights.data[t * columns + c] = c < topK ? weights[c] * routedScale : sharedWeight;
    }
  }
}

/** What logits become. NaN stays NaN and is left out of a softmax; +inf entries share a softmax equally. */
function score(x: Float32Array, scoring: Options['scoring']): Float32Array {
  if (scoring === 'sigmoid') return x.map((v) => 1 / f32(1 + f32(Math.exp(-v))));
  if (scoring === 'sqrtSoftplus') {
    return x.map((v) => Math.sqrt(v > 20 ? v : f32(Math.log1p(f32(Math.exp(v))))));
  }
  const max = Math.max(...x.filter((v) => !Number.isNaN(v))); // -inf where there is none
  if (max === -INFINITY) return x.map((v) => (Number.isNaN(v) ? v : 0));
  return divideBySum(x.map((v) => (v === max ? 1 : Math.exp(f32(v - max)))));
}

/** Divides by the sum of what is not NaN. A sum of 0 gives 0; infinite values share the whole equally. */
function divideBySum(values: Float32Array): Float32Array {
  const infinite = values.filter((v) => v === INFINITY).length;
  if (infinite > 0) return values.map((v) => (Number.isNaN(v) ? v : v === INFINITY ? 1 / infinite : 0));
  const sum = values.reduce((total, v) => (Number.isNaN(v) ? total : f32(total + v)), 0);
  return values.map((v) => (sum === 0 && !Number.isNaN(v) ? 0 : v / sum));
}

/** The numbers that rank the experts of a token. */
function choicesOf(
  row: Float32Array,
  scores: Float32Array,
  bias: Float32Array | undefined,
  token: number,
  { selection, seed }: Options,
): ArrayLike<number> {
  if (selection === 'logits') return row;
  if (selection === 'uniform') return Array.from(row, (_, e) => hash(seed, token, e));
  return bias === undefined ? scores : scores.map((value, e) => value + bias[e]);
}

/** The experts of the best groups, ascending. */
function keptExperts(choices: ArrayLike<number>, { groups, topGroups, groupScore }: Options): number[] {
  const size = choices.length / groups;
  const members = Array.from({ length: groups }, (_, g) =>
    Array.from({ length: size }, (_, i) => g * size + i),
  );
  const groupScores = members.map((experts) => {
    const [first, second = Number.NaN] = best(choices, experts, 2).map((e) => choices[e]);
    return groupScore === 'max' || Number.isNaN(second) ? first : f32(first + second);
  });
  const kept = best(groupScores, [...members.keys()], topGroups);
  return kept.sort((a, b) => a - b).flatMap((g) => members[g]);
}

/** The `count` best of the candidates (ascending indices of values), best first. */
function best(values: ArrayLike<number>, candidates: readonly number[], count: number): number[] {
  const compare = (a: number, b: number): number => {
    if (values[a] > values[b]) return -1;
    if (values[a] < values[b]) return 1;
    return Number(Number.isNaN(values[a])) - Number(Number.isNaN(values[b])) || a - b;
  };
  return [...candidates].sort(compare).slice(0, count);
}

/** Unbiased weights of the chosen experts, before the scaling factor; 0 where the choice is NaN. */
function weigh(
  chosen: readonly number[],
  row: Float32Array,
  scores: Float32Array,
  choices: ArrayLike<number>,
  { selection, scoring, renormalize }: Options,
): Float32Array {
  const amongChosen = selection === 'logits' && scoring === 'softmax';
  const found = amongChosen
    ? score(
        Float32Array.from(chosen, (e) => row[e]),
        scoring,
      )
    : Float32Array.from(chosen, (e) => (Number.isNaN(choices[e]) ? 0 : scores[e])); // +inf score, -inf bias
  const weights = found.map((w) => (Number.isNaN(w) ? 0 : w));
  return renormalize ? divideBySum(weights) : weights;
}

/**
 * The key of an expert under selection 'uniform', an unsigned 32-bit number (all arithmetic modulo 2^32):
 *   h = seed ^ ((token + 1) * 0x9e3779b1);  h = mix(h);  h ^= (expert + 1) * 0x85ebca77;  key = mix(h)
 *   mix (the finaliser of murmur3): h ^= h >>> 16; h *= 0x85ebca6b; h ^= h >>> 13; h *= 0xc2b2ae35; h ^= h >>> 16
 * `token` is the row of the logits, `expert` their column, zero experts included.
 */
function hash(seed: number, token: number, expert: number): number {
  const h = mix(seed ^ Math.imul(token + 1, 0x9e3779b1));
  return mix(h ^ Math.imul(expert + 1, 0x85ebca77)) >>> 0;
}

function mix(value: number): number {
  let h = value;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return h ^ (h >>> 16);
}
