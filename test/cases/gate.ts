// Gate cases: inputs made from a seed, and options with their documented defaults written out.
import type { MoeFusedGateOptions } from '../../lib/ops/moe_fused_gate.js';
import type { FloatDType } from '../../lib/tensor.js';
import { floatDTypes, rounded } from './floats.js';
import { Random } from './random.js';

export type ResolvedGateOptions = Required<MoeFusedGateOptions>;

const rowKinds = {
  normal: (random: Random) => 2 * random.normal(),
  /** Multiples of 1/2, zeros of both signs: many exact ties. */
  coarse: (random: Random) => Math.round(3 * random.normal()) / 2,
  nan: (random: Random) => (random.chance(0.3) ? Number.NaN : 2 * random.normal()),
  infinite: (random: Random) =>
    random.pick([Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, ...random.normals(6)]),
  minusInfinite: (random: Random) => (random.chance(0.9) ? Number.NEGATIVE_INFINITY : random.normal()),
  everything: (random: Random) =>
    random.pick([
      Number.NaN,
      Number.POSITIVE_INFINITY,
      Number.NEGATIVE_INFINITY,
      0,
      -0,
      1,
      1,
      random.normal(),
    ]),
  extreme: (random: Random) =>
    random.pick([-3e4, -100, -20, -1e-30, 1e-30, 20, 20.5, 100, 3e4]) * (1 + random.next()),
  equal: () => 0.75,
  allNaN: () => Number.NaN,
  allMinusInfinity: () => Number.NEGATIVE_INFINITY,
  allInfinity: () => Number.POSITIVE_INFINITY,
} as const satisfies Record<string, (random: Random) => number>;

export type RowKind = keyof typeof rowKinds;

/** 'mixed' gives every row the next kind; 'skewed' lets all rows prefer the same few experts. */
export type LogitKind = RowKind | 'mixed' | 'skewed';

export interface GateCase {
  readonly tokens: number;
  readonly experts: number;
  readonly options: MoeFusedGateOptions;
  readonly kind?: LogitKind;
  readonly dtype?: FloatDType;
  /** 'special' has NaN, infinities and equal values among them. */
  readonly bias?: 'normal' | 'special';
  readonly validTokens?: number;
  /** Rounds of a random id map, which also has ids outside the slots. */
  readonly rounds?: number;
  /** Slots of a load that does not start at 0. */
  readonly slots?: number;
  readonly seed?: number;
  /** Rows repeat after this many: large batches that are quick to make and to judge. */
  readonly period?: number;
}

export interface GateInputs {
  readonly tokens: number;
  readonly experts: number;
  readonly dtype: FloatDType;
  readonly logits: Float32Array;
  readonly bias?: Float32Array;
  readonly validTokens?: number;
  readonly rounds: number;
  readonly idMap?: Int32Array;
  readonly load?: BigInt64Array;
}

export function gateLogits(
  kind: LogitKind,
  tokens: number,
  experts: number,
  random: Random,
  period = tokens,
): Float32Array {
  const logits = new Float32Array(tokens * experts);
  const kinds = Object.keys(rowKinds) as RowKind[];
  for (let t = 0; t < Math.min(period, tokens); t++) {
    const rowKind = kind === 'mixed' ? kinds[t % kinds.length] : kind === 'skewed' ? 'normal' : kind;
    for (let e = 0; e < experts; e++) {
      logits[t * experts + e] = rowKinds[rowKind](random) + (kind === 'skewed' && e % 7 === 1 ? 6 : 0);
    }
  }
  for (let t = period; t < tokens; t++)
    logits.copyWithin(t * experts, (t % period) * experts, ((t % period) + 1) * experts);
  return logits;
}

export function gateInputs(given: GateCase): GateInputs {
  const { tokens, experts, kind = 'normal', dtype = 'f32', rounds = 0, seed = 1 } = given;
  const random = new Random(seed);
  const logits = rounded(dtype, gateLogits(kind, tokens, experts, random, given.period));
  const bias = random.normals(experts, 0.3);
  if (given.bias === 'special') {
    for (let e = 0; e < experts; e++) if (random.chance(0.3)) bias[e] = rowKinds.everything(random);
  }
  const ids = experts + (given.options.sharedExperts ?? 0);
  const slots = given.slots ?? 2 * ids;
  return {
    tokens,
    experts,
    dtype,
    logits,
    ...(given.bias === undefined ? {} : { bias }),
    ...(given.validTokens === undefined ? {} : { validTokens: given.validTokens }),
    rounds,
    ...(rounds === 0
      ? {}
      : { idMap: Int32Array.from({ length: rounds * ids }, () => random.integer(slots + 3) - 1) }),
    ...(given.slots === undefined
      ? {}
      : { load: BigInt64Array.from({ length: slots }, (_, i) => BigInt(i)) }),
  };
}

export function resolveGateOptions({ options, bias }: GateCase): ResolvedGateOptions {
  const { groups = 1 } = options;
  return {
    scoring: 'softmax',
    selection: 'score',
    groups,
    topGroups: groups,
    groupScore: bias === undefined ? 'max' : 'top2Sum',
    renormalize: false,
    routedScalingFactor: 1,
    scalePlacement: 'inWeights',
    sharedExperts: 0,
    zeroExperts: 0,
    captureLogicalIds: false,
    seed: 0,
    ...options,
  };
}

/** The gates of known models, by family. */
export const gateFamilies: Record<string, Omit<GateCase, 'tokens'>> = {
  mixtral: { experts: 8, options: { topK: 2, renormalize: true } },
  qwen3: { experts: 128, options: { topK: 8, renormalize: true } },
  'deepseek-v2': {
    experts: 160,
    options: { topK: 6, groups: 8, topGroups: 3, routedScalingFactor: 16, sharedExperts: 2 },
  },
  'deepseek-v3': {
    experts: 256,
    bias: 'normal',
    options: {
      topK: 8,
      scoring: 'sigmoid',
      groups: 8,
      topGroups: 4,
      renormalize: true,
      routedScalingFactor: 2.5,
      sharedExperts: 1,
    },
  },
  'kimi-k2': {
    experts: 384,
    bias: 'normal',
    options: { topK: 8, scoring: 'sigmoid', renormalize: true, routedScalingFactor: 2.827, sharedExperts: 1 },
  },
  'deepseek-v4': {
    experts: 256,
    bias: 'normal',
    options: {
      topK: 6,
      scoring: 'sqrtSoftplus',
      renormalize: true,
      routedScalingFactor: 1.5,
      sharedExperts: 1,
    },
  },
  'gpt-oss': { experts: 128, options: { topK: 4, selection: 'logits' } },
  llama4: { experts: 16, options: { topK: 1, selection: 'logits', scoring: 'sigmoid' } },
  'ernie-4.5': { experts: 64, bias: 'normal', options: { topK: 6, renormalize: true, sharedExperts: 2 } },
  longcat: { experts: 768, bias: 'normal', options: { topK: 12, zeroExperts: 256, routedScalingFactor: 6 } },
  'forced balance': { experts: 256, options: { topK: 8, selection: 'uniform', seed: 7, sharedExperts: 1 } },
};

export const gateTokens = [0, 1, 2, 31, 32, 33, 127] as const;
export const gateExperts = [1, 3, 8, 60, 64, 160, 256, 384, 512, 1024] as const;

/** One random case of the grid: every option, all dtypes, odd divisors, up to the limits. */
export function randomGateCase(seed: number): GateCase {
  const random = new Random(seed * 7919 + 13);
  const experts = random.pick(gateExperts);
  const selection = random.pick(['score', 'score', 'score', 'logits', 'uniform'] as const);
  const divisors = [...Array(experts).keys()].map((d) => d + 1).filter((d) => experts % d === 0 && d <= 256);
  const groups = selection === 'score' && random.chance(0.6) ? random.pick(divisors) : 1;
  const topGroups = 1 + random.integer(groups);
  const eligible = (experts / groups) * topGroups;
  const tokens = random.pick(experts >= 384 ? [0, 1, 2, 31, 33] : gateTokens);
  const bias =
    selection === 'score' ? random.pick([undefined, 'normal', 'normal', 'special'] as const) : undefined;
  return {
    tokens,
    experts,
    kind: random.pick(['normal', 'coarse', 'mixed', 'mixed', 'skewed'] as const),
    dtype: random.pick(floatDTypes),
    ...(bias === undefined ? {} : { bias }),
    ...(random.chance(0.4) ? { validTokens: random.integer(tokens + 1) } : {}),
    ...(random.chance(0.4) ? { rounds: random.pick([1, 2, 5]) } : {}),
    ...(random.chance(0.4) ? { slots: 1 + random.integer(experts + 8) } : {}),
    options: {
      topK: 1 + random.integer(Math.min(32, eligible)),
      scoring: random.pick(['softmax', 'sigmoid', 'sqrtSoftplus']),
      selection,
      groups,
      topGroups,
      ...(random.chance(0.5) ? { groupScore: random.pick(['max', 'top2Sum'] as const) } : {}),
      renormalize: random.chance(0.5),
      routedScalingFactor: random.pick([1, 2.5, 0.7]),
      scalePlacement: random.pick(['inWeights', 'onOutput']),
      sharedExperts: random.integer(9),
      zeroExperts: random.chance(0.3) ? random.integer(experts) : 0,
      captureLogicalIds: true,
      seed: random.integer(2 ** 32),
    },
    seed,
  };
}
