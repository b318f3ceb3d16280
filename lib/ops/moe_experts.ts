import type { ExpertWeights } from '../experts.js';
import { defineOp } from '../op.js';
import { moe_experts } from '../oracle/moe_experts.js';
import type { FloatDType, Tensor } from '../tensor.js';

export interface MoeExpertsInputs {
  /** Rows sorted by expert [capacity, hidden], from moeDispatch. */
  rows: Tensor<FloatDType>;
  /** i32 [slots], from moeDispatch. */
  counts: Tensor<'i32'>;
  /** i32 [slots + 1], from moeDispatch. */
  offsets: Tensor<'i32'>;
  /** Packed weights. */
  experts: ExpertWeights;
  /** i32 [capacity], from moeDispatch; needed with `weights`. */
  order?: Tensor<'i32'>;
  /** Gate weights f32 [tokens, columns]: multiply each row's input (Llama 4) instead of its output. */
  weights?: Tensor<'f32'>;
}

/**
 * Grouped expert MLP over dispatched rows: `down(swiglu(gate_up(row)))` with the weights of the row's expert, biases
 * included. Returns [capacity, hidden] in the dtype of `rows`; places that hold no row are 0.
 *
 * Products accumulate in f32; the activation, whose formula is that of `SwiGLU`, is evaluated in f32. With `weights`,
 * row p is multiplied by the weight of choice order[p] before the first product (in the accumulator, so a bias is not
 * scaled). On the tensor cores of CUDA (bf16 and f16) the activation is rounded to the dtype in between: in f16, where
 * one exceeds 65504, it becomes infinite there.
 * @throws MoeError What every `Op` throws; at the wait ERR_MOE_RANGE where counts, offsets or order leave the rows.
 */
export const moeExperts = defineOp<MoeExpertsInputs, Record<never, never>, Tensor<FloatDType>>({
  name: 'moe_experts',
  inputs: {
    rows: 'f32|bf16|f16[capacity, hidden]',
    counts: 'i32[slots]',
    offsets: 'i32[slots + 1]',
    experts: 'experts[slots, hidden, intermediate]',
    order: 'i32[capacity]?',
    weights: 'f32[tokens, columns]?',
  },
  outputs: { output: '=rows[capacity, hidden]' },
  returns: 'tensor',
  rules: [
    [
      'order',
      ({ given }) =>
        given.has('order') === given.has('weights') ||
        'expected order and weights together: order says whose weight is whose',
    ],
  ],
  oracle: moe_experts,
});
