import { defineOp } from '../op.js';
import { firstZeroExpert, flag, integer, real } from '../options.js';
import { moe_combine } from '../oracle/moe_combine.js';
import type { FloatDType, Tensor } from '../tensor.js';

export interface MoeCombineInputs {
  /** Expert outputs [capacity, hidden], from moeExperts. */
  rows: Tensor<FloatDType>;
  /** i32 [tokens, columns], from moeDispatch: the row of each choice, or -1. */
  inverse: Tensor<'i32'>;
  /** Gate weights f32 [tokens, columns]. */
  weights: Tensor<'f32'>;
  /** The gate's ids i32 [tokens, columns]; needed for zero experts. */
  ids?: Tensor<'i32'>;
  /** The layer's input [tokens, hidden]; needed for zero experts. */
  hidden?: Tensor<FloatDType>;
}

export interface MoeCombineOptions {
  /** Multiplies the sum: the scaling factor under scalePlacement 'onOutput'. Default 1. */
  outputScale?: number;
  /** Zero (identity) experts: ids firstZeroExpert .. firstZeroExpert + zeroExperts - 1 add weight x hidden. */
  zeroExperts?: number;
  /** Needed with zeroExperts: in expert parallelism it follows neither from the ids nor from the local experts. */
  firstZeroExpert?: number;
  /** The rows carry their weights already (moeExperts got `weights`), so they are summed as they are. */
  weightsOnInput?: boolean;
}

/**
 * The weighted sum of a token's expert outputs, [tokens, hidden] in the dtype of `rows`:
 * `out[t] = outputScale * sum over columns c of weights[t, c] * rows[inverse[t, c]]`, in f32 and in column order.
 * Choices with inverse -1 add nothing, zero experts add `weights[t, c] * hidden[t]`.
 * @throws MoeError ERR_MOE_INVALID_ARG for zero experts without ids and hidden; what every `Op` throws; at the wait
 *   ERR_MOE_RANGE where `inverse` leaves the rows.
 */
export const moeCombine = defineOp<MoeCombineInputs, MoeCombineOptions, Tensor<FloatDType>>({
  name: 'moe_combine',
  inputs: {
    rows: 'f32|bf16|f16[capacity, hidden]',
    inverse: 'i32[tokens, columns]',
    weights: 'f32[tokens, columns]',
    ids: 'i32[tokens, columns]?',
    hidden: '=rows[tokens, hidden]?',
  },
  options: {
    outputScale: real({ default: 1 }),
    zeroExperts: integer({ min: 0, max: 65536, default: 0 }),
    firstZeroExpert: firstZeroExpert(),
    weightsOnInput: flag(false),
  },
  outputs: { output: '=rows[tokens, hidden]' },
  returns: 'tensor',
  rules: [
    [
      'zeroExperts',
      ({ dim, given }) =>
        dim('zeroExperts') === 0 ||
        (given.has('ids') && given.has('hidden')) ||
        'expected ids and hidden with zeroExperts',
    ],
  ],
  oracle: moe_combine,
});
