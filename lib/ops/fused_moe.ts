import type { ExpertWeights } from '../experts.js';
import { defineOp } from '../op.js';
import { firstZeroExpert, flag, integer, real } from '../options.js';
import { fused_moe } from '../oracle/fused_moe.js';
import type { FloatDType, Tensor } from '../tensor.js';

export interface FusedMoeInputs {
  /** Hidden states [tokens, hidden]. */
  hidden: Tensor<FloatDType>;
  /** The gate's ids i32 [tokens, columns]; shared experts are ordinary columns, ids that are not local are skipped. */
  ids: Tensor<'i32'>;
  /** The gate's weights f32 [tokens, columns]. */
  weights: Tensor<'f32'>;
  /** Packed weights of the local experts, whose ids are firstExpert .. firstExpert + slots - 1. */
  experts: ExpertWeights;
}

export interface FusedMoeOptions {
  /** Multiplies the sum: the scaling factor under scalePlacement 'onOutput'. Default 1. */
  outputScale?: number;
  /** Id of the first local expert. Default 0. */
  firstExpert?: number;
  /** Zero (identity) experts: ids firstZeroExpert .. firstZeroExpert + zeroExperts - 1 add weight x hidden. */
  zeroExperts?: number;
  /** Needed with zeroExperts: in expert parallelism it does not follow from the local experts. */
  firstZeroExpert?: number;
  /** Multiply the experts' input by the weight instead of their output (Llama 4). Default false. */
  weightsOnInput?: boolean;
}

/**
 * moeDispatch, moeExperts and moeCombine in one call, without materialising gathered rows:
 * `out[t] = outputScale * sum over columns c of weights[t, c] * expert(ids[t, c], hidden[t])`, [tokens, hidden] in the
 * dtype of `hidden`, with `expert(e, x) = down_e(swiglu(gate_up_e(x)))` and the activation of `SwiGLU`. Accumulation is
 * f32; a token's columns are summed in a fixed order: that of the columns, or that of the experts where CUDA streams
 * their weights for few tokens. On the tensor cores of CUDA (bf16 and f16) activations and experts' outputs are rounded
 * to the dtype in between: in f16, where one exceeds 65504, it becomes infinite there.
 * @throws MoeError ERR_MOE_INVALID_ARG for zero experts among the local ids; and what every `Op` throws.
 */
export const fusedMoe = defineOp<FusedMoeInputs, FusedMoeOptions, Tensor<FloatDType>>({
  name: 'fused_moe',
  inputs: {
    hidden: 'f32|bf16|f16[tokens, hidden]',
    ids: 'i32[tokens, columns]',
    weights: 'f32[tokens, columns]',
    experts: 'experts[slots, hidden, intermediate]',
  },
  options: {
    outputScale: real({ default: 1 }),
    firstExpert: integer({ min: 0, max: 0x7fffffff, default: 0 }),
    zeroExperts: integer({ min: 0, max: 65536, default: 0 }),
    firstZeroExpert: firstZeroExpert(),
    weightsOnInput: flag(false),
  },
  outputs: { output: '=hidden[tokens, hidden]' },
  returns: 'tensor',
  rules: [
    [
      'firstZeroExpert',
      ({ dim }) =>
        dim('zeroExperts') === 0 ||
        dim('firstZeroExpert') >= dim('firstExpert') + dim('slots') ||
        dim('firstZeroExpert') + dim('zeroExperts') <= dim('firstExpert') ||
        `expected zero experts outside the local ids ${dim('firstExpert')}..${dim('firstExpert') + dim('slots') - 1} ` +
          `but received ${dim('firstZeroExpert')}..${dim('firstZeroExpert') + dim('zeroExperts') - 1}`,
    ],
  ],
  oracle: fused_moe,
});
