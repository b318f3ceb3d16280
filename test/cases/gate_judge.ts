// Judges a gate's result without computing one: a second reading of the gate in f64 that accepts every legal answer.
// It shares nothing with the oracle, so it judges the oracle too.
//
// Choices closer than `gap` may come in either order, because backends round differently; what is equal in its
// inputs must follow the tie rule exactly.
import type { GateInputs, ResolvedGateOptions } from './gate.js';

export const gap = 2e-6;

/** A token's row as the f64 reading sees it. */
export interface JudgedRow {
  readonly choices: readonly number[];
  readonly scores: readonly number[];
  readonly logits: readonly number[];
  readonly groupScores: readonly number[];
  /** Whether two experts are ranked by the tie rule and nothing else. */
  tied(a: number, b: number): boolean;
  /** Whether any backend must rank expert a above expert b. */
  above(a: number, b: number): boolean;
  groupAbove(a: number, b: number): boolean;
  groupsTied(a: number, b: number): boolean;
}

export function judgedRow(inputs: GateInputs, options: ResolvedGateOptions, token: number): JudgedRow {
  const { experts, bias } = inputs;
  const logits = Array.from(inputs.logits.subarray(token * experts, (token + 1) * experts), (x, e) =>
    bias !== undefined && Number.isNaN(bias[e]) ? Number.NaN : x,
  );
  const scores = judgedScores(logits, options.scoring);
  const choices = logits.map((x, e) => {
    if (options.selection === 'logits') return x;
    if (options.selection === 'uniform') return uniformKey(options.seed, token, e);
    return scores[e] + (bias?.[e] ?? 0);
  });
  const size = experts / options.groups;
  const members = Array.from({ length: options.groups }, (_, g) => choices.slice(g * size, (g + 1) * size));
  const groupScores = members.map((values) => {
    const numbers = values.filter((v) => !Number.isNaN(v)).sort((a, b) => (a === b ? 0 : b - a));
    if (numbers.length === 0) return Number.NaN;
    return options.groupScore === 'max' || numbers.length === 1 ? numbers[0] : numbers[0] + numbers[1];
  });
  const tolerance = options.selection === 'score' ? gap : 0;
  const clearlyAbove = (a: number, b: number): boolean => {
    if (Number.isNaN(a)) return false;
    if (Number.isNaN(b)) return true;
    if (tolerance === 0 || !Number.isFinite(a) || !Number.isFinite(b)) return a > b;
    return a > b + tolerance * Math.max(1, Math.abs(a), Math.abs(b));
  };
  const exactlyEqual = (a: number, b: number) => Object.is(a, b) && !Number.isFinite(a);
  const tied = (a: number, b: number) =>
    exactlyEqual(choices[a], choices[b]) ||
    (options.selection !== 'uniform' && logits[a] === logits[b] && (bias?.[a] ?? 0) === (bias?.[b] ?? 0));
  const experts_ = [...Array(size).keys()];
  return {
    choices,
    scores,
    logits,
    groupScores,
    tied,
    above: (a, b) => clearlyAbove(choices[a], choices[b]),
    groupAbove: (a, b) => clearlyAbove(groupScores[a], groupScores[b]),
    groupsTied: (a, b) =>
      exactlyEqual(groupScores[a], groupScores[b]) || experts_.every((i) => tied(a * size + i, b * size + i)),
  };
}

function judgedScores(logits: readonly number[], scoring: ResolvedGateOptions['scoring']): number[] {
  if (scoring === 'sigmoid') return logits.map((x) => 1 / (1 + Math.exp(-x)));
  if (scoring === 'sqrtSoftplus') return logits.map((x) => Math.sqrt(x > 20 ? x : Math.log1p(Math.exp(x))));
  const numbers = logits.filter((x) => !Number.isNaN(x));
  const top = Math.max(...numbers);
  const share = (x: number): number => {
    if (!Number.isFinite(top)) return top > 0 && x === top ? 1 : 0;
    return Math.exp(x - top);
  };
  const sum = numbers.reduce((total, x) => total + share(x), 0);
  return logits.map((x) => (Number.isNaN(x) ? Number.NaN : sum === 0 ? 0 : share(x) / sum));
}

/** The key of selection 'uniform', in arithmetic of unbounded integers. */
export function uniformKey(seed: number, token: number, expert: number): number {
  const mask = 0xffffffffn;
  const mix = (value: bigint): bigint => {
    let h = ((value ^ (value >> 16n)) * 0x85ebca6bn) & mask;
    h = ((h ^ (h >> 13n)) * 0xc2b2ae35n) & mask;
    return h ^ (h >> 16n);
  };
  const h = mix(BigInt(seed) ^ ((BigInt(token + 1) * 0x9e3779b1n) & mask));
  return Number(mix(h ^ ((BigInt(expert + 1) * 0x85ebca77n) & mask)));
}

/** The column of the logits that an id stands for, or undefined for ids of shared experts and others. */
function columnOf(
  id: number,
  experts: number,
  { zeroExperts, sharedExperts }: ResolvedGateOptions,
): number | undefined {
  const routed = experts - zeroExperts;
  if (id >= 0 && id < routed) return id;
  const column = id - sharedExperts;
  return column >= routed && column < experts ? column : undefined;
}

/** What is wrong with a row's choices and weights, or undefined. `ids` are logical: before any map. */
export function judgeRow(
  row: JudgedRow,
  options: ResolvedGateOptions,
  ids: ArrayLike<number>,
  weights: ArrayLike<number>,
): string | undefined {
  const experts = row.choices.length;
  const { topK, groups, topGroups } = options;
  const chosen: number[] = [];
  for (let c = 0; c < topK; c++) {
    const column = columnOf(ids[c], experts, options);
    if (column === undefined) return `id ${ids[c]} is not a routed or zero expert`;
    if (chosen.includes(column)) return `id ${ids[c]} is chosen twice`;
    chosen.push(column);
  }

  // Groups: none of the chosen ones may be beaten by topGroups others
  const groupOf = (e: number) => Math.floor((e * groups) / experts);
  const used = new Set(chosen.map(groupOf));
  if (used.size > topGroups) return `${used.size} groups are used`;
  const { sure, possible } = keptGroups(row, options);
  for (const g of used) if (!possible.has(g)) return `group ${g} is not among the best`;

  // Experts: none left out of a kept group may beat a chosen one
  for (let e = 0; e < experts; e++) {
    if (chosen.includes(e) || !(sure.has(groupOf(e)) || used.has(groupOf(e)))) continue;
    for (const c of chosen) {
      if (row.above(e, c)) return `expert ${e} is left out for ${c}, which is worse`;
      if (row.tied(e, c) && e < c)
        return `expert ${e} is left out for ${c}, which is equal and has a higher id`;
    }
  }
  for (let i = 1; i < topK; i++) {
    const [a, b] = [chosen[i - 1], chosen[i]];
    if (row.above(b, a) || (row.tied(a, b) && b < a)) return `expert ${b} comes after ${a}, which it beats`;
  }
  return judgeWeights(row, options, chosen, weights);
}

/** Groups that every backend keeps, and groups that one may keep. */
function keptGroups(row: JudgedRow, { groups, topGroups }: ResolvedGateOptions) {
  const all = [...Array(groups).keys()];
  if (topGroups === groups) return { sure: new Set(all), possible: new Set(all) };
  const beats = (a: number, b: number) => row.groupAbove(a, b) || (a < b && row.groupsTied(a, b));
  return {
    sure: new Set(all.filter((g) => all.filter((h) => h !== g && !beats(g, h)).length < topGroups)),
    possible: new Set(all.filter((g) => all.filter((h) => h !== g && beats(h, g)).length < topGroups)),
  };
}

function judgeWeights(
  row: JudgedRow,
  options: ResolvedGateOptions,
  chosen: readonly number[],
  weights: ArrayLike<number>,
): string | undefined {
  const { topK, selection, scoring, routedScalingFactor: s, sharedExperts } = options;
  const inWeights = options.scalePlacement === 'inWeights';
  let expected = chosen.map((e) => (Number.isNaN(row.choices[e]) ? 0 : row.scores[e]));
  if (selection === 'logits' && scoring === 'softmax') {
    expected = judgedScores(
      chosen.map((e) => row.logits[e]),
      'softmax',
    );
  }
  expected = expected.map((w) => (Number.isNaN(w) ? 0 : w));
  let tolerance = gap;
  if (options.renormalize) {
    const most = Math.max(...expected);
    const smallest = scoring === 'sqrtSoftplus' ? most ** 2 : most; // of what f32 has to hold on the way
    if (most > 0 && smallest < 1e-30) return undefined; // f32 may have it as 0
    if (most > 0 && most < 1) tolerance *= 1 - Math.log(most) / 8; // x - max has few bits left after the point
    const infinite = expected.filter((w) => w === Number.POSITIVE_INFINITY).length;
    const sum = expected.reduce((total, w) => total + w, 0);
    expected = expected.map((w) => {
      if (infinite > 0) return w === Number.POSITIVE_INFINITY ? 1 / infinite : 0;
      return sum === 0 ? 0 : w / sum;
    });
  }
  if (inWeights) expected = expected.map((w) => w * s);
  for (let j = 0; j < sharedExperts; j++) expected.push(inWeights ? 1 : 1 / s);
  for (let c = 0; c < topK + sharedExperts; c++) {
    const close = Math.abs(weights[c] - expected[c]) <= tolerance * Math.max(1, s, expected[c]);
    if (!close && weights[c] !== expected[c]) return `weight ${c} is ${weights[c]} instead of ${expected[c]}`;
  }
  return undefined;
}

/**
 * Whether a row's choices are the same on every backend: 'order' when all of them are clear, 'set' when only their
 * order is not, undefined when another expert or group is as close as `gap`.
 */
export function clearness(
  row: JudgedRow,
  options: ResolvedGateOptions,
  ids: ArrayLike<number>,
): 'order' | 'set' | undefined {
  const experts = row.choices.length;
  const { topK, groups, topGroups } = options;
  const chosen = Array.from({ length: topK }, (_, c) => columnOf(ids[c], experts, options) ?? -1);
  const unclear = (a: number, b: number) => !row.above(a, b) && !row.above(b, a) && !row.tied(a, b);
  const { sure: kept } = keptGroups(row, options);
  if (kept.size !== topGroups) return undefined;
  for (let e = 0; e < experts; e++) {
    if (!kept.has(Math.floor((e * groups) / experts)) || chosen.includes(e)) continue;
    if (chosen.some((c) => unclear(c, e))) return undefined;
  }
  return chosen.some((c, i) => i > 0 && unclear(chosen[i - 1], c)) ? 'set' : 'order';
}
