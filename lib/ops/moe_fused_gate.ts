import { defineOp, type Rule } from '../op.js';
import { choice, flag, integer, positive } from '../options.js';
import { moe_fused_gate } from '../oracle/moe_fused_gate.js';
import type { FloatDType, Tensor } from '../tensor.js';

/** Experts that a layer may have, routed and zero experts together. */
export const MAX_EXPERTS = 1024;
/** Routed choices per token. */
export const MAX_TOP_K = 32;

export interface MoeFusedGateInputs {
  /** Router logits [tokens, experts]; with zero experts their columns come last. */
  logits: Tensor<FloatDType>;
  /** Score correction bias, f32 [experts]: decides who is chosen, never how much it weighs. */
  bias?: Tensor<'f32'>;
  /** Rows at and beyond it are padding: id -1, weight 0, counted nowhere. A number, or i32[1] read on the queue. */
  validTokens?: number | Tensor<'i32'>;
  /** Logical to physical ids, i32 [rounds, experts + sharedExperts]: token t uses row `t mod rounds`. */
  idMap?: Tensor<'i32'>;
  /**
   * i64 [slots], in and out: adds the count of every mapped id of valid rows; ids from `slots` on are not counted. On
   * CUDA it is counted in counters that lie apart, which are added to the tensor before anything else is done with it,
   * so that it is exact at any time. They take up to 2 KiB of device memory a slot and 1 MiB a load, from its first use
   * here until it is disposed.
   */
  load?: Tensor<'i64'>;
}

export interface MoeFusedGateOptions {
  /** Routed (and zero) experts chosen per token, 1..32. */
  topK: number;
  /** What a logit x becomes: softmax over the experts (default), 1 / (1 + exp(-x)), or sqrt(log(1 + exp(x))). */
  scoring?: 'softmax' | 'sigmoid' | 'sqrtSoftplus';
  /**
   * What chooses: 'score' (plus `bias` where given, the default); 'logits' (raw logits choose; softmax then runs over
   * the chosen ones only, as in gpt-oss; sigmoid gives Llama 4); 'uniform' (a distinct random choice per token from
   * `seed`, for profile runs: load that is balanced in expectation, whatever the logits).
   */
  selection?: 'score' | 'logits' | 'uniform';
  /** Groups that experts are divided into, in order. Default 1. */
  groups?: number;
  /** Groups that stay eligible. Default: all. */
  topGroups?: number;
  /** A group's score: its best choice, or the sum of its two best. Default 'top2Sum' with a bias, else 'max'. */
  groupScore?: 'max' | 'top2Sum';
  /** Divide the chosen weights by their sum. Default false. */
  renormalize?: boolean;
  /** Multiplies the routed weights. Default 1. */
  routedScalingFactor?: number;
  /**
   * Who applies the scaling factor. 'inWeights' (default): the weights carry it and a shared expert weighs 1.
   * 'onOutput': they do not, a shared expert weighs 1/s, and the caller passes `outputScale: s` to moeCombine or
   * fusedMoe.
   */
  scalePlacement?: 'inWeights' | 'onOutput';
  /** Shared experts n appended to every row as ids R..R+n-1, 0..8. Default 0. */
  sharedExperts?: number;
  /** How many of the logits' last columns are zero (identity) experts; they get the ids after the shared ones. */
  zeroExperts?: number;
  /** Also return the logical ids of the routed choices, before idMap. Default false. */
  captureLogicalIds?: boolean;
  /** Seed of selection 'uniform'. Default 0. */
  seed?: number;
}

export interface MoeFusedGateOutputs {
  /** i32 [tokens, topK + sharedExperts]: routed choices by descending choice score, then the shared experts. */
  ids: Tensor<'i32'>;
  /** f32 [tokens, topK + sharedExperts]. */
  weights: Tensor<'f32'>;
  /** i32 [tokens, topK], with `captureLogicalIds`. */
  logicalIds?: Tensor<'i32'>;
}

const rules: Rule[] = [
  [
    'logits',
    ({ dim }) =>
      (dim('experts') >= 1 && dim('experts') <= MAX_EXPERTS) ||
      `expected logits of 1 to ${MAX_EXPERTS} experts but received ${dim('experts')}`,
  ],
  [
    'groups',
    ({ dim }) =>
      dim('experts') % dim('groups') === 0 ||
      `expected groups to divide experts = ${dim('experts')} but received ${dim('groups')}`,
  ],
  [
    'topGroups',
    ({ dim }) =>
      dim('topGroups') <= dim('groups') ||
      `expected topGroups <= groups = ${dim('groups')} but received ${dim('topGroups')}`,
  ],
  [
    'topK',
    ({ dim }) => {
      const eligible = (dim('experts') / dim('groups')) * dim('topGroups');
      const where = dim('topGroups') < dim('groups') ? 'experts in the chosen groups' : 'experts';
      return dim('topK') <= eligible || `expected topK <= ${eligible} (${where}) but received ${dim('topK')}`;
    },
  ],
  [
    'zeroExperts',
    ({ dim }) =>
      dim('zeroExperts') < dim('experts') ||
      `expected zeroExperts < experts = ${dim('experts')} (columns of logits) but received ${dim('zeroExperts')}`,
  ],
  [
    'bias',
    ({ options, given }) =>
      options.selection === 'score' ||
      !given.has('bias') ||
      `expected no bias with selection '${options.selection}'`,
  ],
  [
    'groups',
    ({ options, dim }) =>
      options.selection === 'score' ||
      dim('groups') === 1 ||
      `expected groups = 1 with selection '${options.selection}' but received ${dim('groups')}`,
  ],
  [
    'idMap',
    ({ dim, given }) =>
      !given.has('idMap') ||
      dim('rounds') >= 1 ||
      `expected idMap of at least 1 round but received ${dim('rounds')}`,
  ],
];

/**
 * Chooses experts and weighs them: scoring, grouped selection, renormalisation, scaling, shared experts, id mapping
 * and load counting in one pass.
 *
 * With s = routedScalingFactor, w the unbiased scores of the chosen experts and W their sum, the routed weights are
 * `w`, divided by W with `renormalize`, times s with scalePlacement 'inWeights'. The weight of a shared expert is 1
 * ('inWeights') or 1/s ('onOutput'); it never depends on W.
 *
 * Arithmetic is f32 from the first operation. Ties go to the lower expert id and the lower group id. A NaN logit or
 * bias gives score 0, ranks below -inf and is left out of a softmax; +inf entries share a softmax (or a
 * renormalisation) equally; a sum of 0 gives weights 0. The formulas are those of DeepSeek-V2 (softmax, group
 * maximum), DeepSeek-V3 (sigmoid + bias, sum of the two best) and their relatives.
 * @throws MoeError ERR_MOE_INVALID_ARG for options that do not go together; and what every `Op` throws.
 */
export const moeFusedGate = defineOp<MoeFusedGateInputs, MoeFusedGateOptions, MoeFusedGateOutputs>({
  name: 'moe_fused_gate',
  inputs: {
    logits: 'f32|bf16|f16[tokens, experts]',
    bias: 'f32[experts]?',
    validTokens: 'count(tokens)?',
    idMap: 'i32[rounds, experts + sharedExperts]?',
    load: 'inout i64[slots]?',
  },
  options: {
    topK: integer({ min: 1, max: MAX_TOP_K }),
    scoring: choice(['softmax', 'sigmoid', 'sqrtSoftplus'], 'softmax'),
    selection: choice(['score', 'logits', 'uniform'], 'score'),
    groups: integer({ min: 1, max: MAX_EXPERTS, default: 1 }),
    topGroups: integer({ min: 1, max: MAX_EXPERTS, default: ({ options }) => options.groups as number }),
    groupScore: choice(['max', 'top2Sum'], ({ given }) => (given.has('bias') ? 'top2Sum' : 'max')),
    renormalize: flag(false),
    routedScalingFactor: positive({ default: 1 }),
    scalePlacement: choice(['inWeights', 'onOutput'], 'inWeights'),
    sharedExperts: integer({ min: 0, max: 8, default: 0 }),
    zeroExperts: integer({ min: 0, max: MAX_EXPERTS, default: 0 }),
    captureLogicalIds: flag(false),
    seed: integer({ min: 0, max: 0xffffffff, default: 0 }),
  },
  outputs: {
    ids: 'i32[tokens, topK + sharedExperts]',
    weights: 'f32[tokens, topK + sharedExperts]',
    logicalIds: { type: 'i32[tokens, topK]', when: ({ options }) => options.captureLogicalIds === true },
  },
  returns: 'record',
  rules,
  oracle: moe_fused_gate,
});
