import { defineOp } from '../op.js';
import { moe_router } from '../oracle/moe_router.js';
import type { FloatDType, Tensor } from '../tensor.js';

export interface MoeRouterInputs {
  /** Hidden states [tokens, hidden]. */
  hidden: Tensor<FloatDType>;
  /** Router weight [experts, hidden]. */
  weight: Tensor<FloatDType>;
  /** Added to the logits, f32 [experts] (gpt-oss). Not the correction bias, which belongs to the gate. */
  bias?: Tensor<'f32'>;
}

/**
 * Router logits: `logits = hidden x weight^T + bias`, f32 [tokens, experts].
 *
 * Every dtype is widened to f32 first and products are accumulated in f32, because choices depend on the last bits.
 * @throws MoeError What every `Op` throws.
 */
export const moeRouter = defineOp<MoeRouterInputs, Record<never, never>, Tensor<'f32'>>({
  name: 'moe_router',
  inputs: {
    hidden: 'f32|bf16|f16[tokens, hidden]',
    weight: 'f32|bf16|f16[experts, hidden]',
    bias: 'f32[experts]?',
  },
  outputs: { logits: 'f32[tokens, experts]' },
  returns: 'tensor',
  oracle: moe_router,
});
