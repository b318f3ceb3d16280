import type { ExpertWeights } from '../experts.js';
import { defineOp } from '../op.js';
import { choice } from '../options.js';
import { shared_experts } from '../oracle/shared_experts.js';
import type { FloatDType, Tensor } from '../tensor.js';

export interface SharedExpertsInputs {
  /** Hidden states [tokens, hidden]. */
  hidden: Tensor<FloatDType>;
  /** Packed weights of one dense MLP (one slot). */
  experts: ExpertWeights;
  /** What part 'gateUp' returned, [tokens, 2*intermediate]; for part 'down'. */
  projected?: Tensor<FloatDType>;
  /** Weight [hidden] of a sigmoid gate on the result (Qwen2-MoE, Qwen3-Next). */
  expertGate?: Tensor<FloatDType>;
  /** Added to the result: the routed experts' output [tokens, hidden]. */
  routed?: Tensor<FloatDType>;
}

export interface SharedExpertsOptions {
  /**
   * 'whole' (default), or the two halves that overlap with dispatch and combine: 'gateUp' gives the projection
   * [tokens, 2*intermediate] (gate half, then up half), 'down' takes it as `projected` and does the rest.
   */
  part?: 'whole' | 'gateUp' | 'down';
}

/**
 * Shared experts as a dense MLP beside the routed ones, for layers that do not fuse them:
 * `out = routed + sigmoid(hidden . expertGate) * down(swiglu(gate_up(hidden)))`, [tokens, hidden] in the dtype of
 * `hidden`; gate and `routed` only where given, `swiglu` as in `SwiGLU`. Accumulation is f32. The gate multiplies in
 * 'whole' and in 'down'. On the tensor cores of CUDA (bf16 and f16) the activation is rounded to the dtype in between:
 * in f16, where one exceeds 65504, it becomes infinite there.
 *
 * Like the router it is dense and takes no `validTokens`: rows do not touch each other, so that a padded one costs its
 * time and what comes out of it means nothing.
 * @throws MoeError ERR_MOE_INVALID_ARG for inputs that do not belong to the part; and what every `Op` throws.
 */
export const sharedExperts = defineOp<SharedExpertsInputs, SharedExpertsOptions, Tensor<FloatDType>>({
  name: 'shared_experts',
  inputs: {
    hidden: 'f32|bf16|f16[tokens, hidden]',
    experts: 'experts[slots, hidden, intermediate]',
    projected: '=hidden[tokens, 2*intermediate]?',
    expertGate: 'f32|bf16|f16[hidden]?',
    routed: '=hidden[tokens, hidden]?',
  },
  options: { part: choice(['whole', 'gateUp', 'down'], 'whole') },
  outputs: {
    projected: {
      type: '=hidden[tokens, 2*intermediate]',
      when: ({ options }) => options.part === 'gateUp',
    },
    output: { type: '=hidden[tokens, hidden]', when: ({ options }) => options.part !== 'gateUp' },
  },
  returns: 'tensor',
  rules: [
    [
      'experts',
      ({ dim }) =>
        dim('slots') === 1 || `expected experts: 1 slot (one dense MLP) but received ${dim('slots')}`,
    ],
    [
      'projected',
      ({ options, given }) =>
        (options.part === 'down') === given.has('projected') ||
        (options.part === 'down'
          ? "expected projected (the result of part 'gateUp') with part 'down'"
          : `expected no projected with part '${options.part}'`),
    ],
    [
      'part',
      ({ options, given }) =>
        options.part !== 'gateUp' ||
        (!given.has('expertGate') && !given.has('routed')) ||
        "expected no expertGate and no routed with part 'gateUp': they belong to part 'down'",
    ],
  ],
  oracle: shared_experts,
});
