// ExpertWeights: the weights of a layer's experts in whatever layout the backend likes best. Opaque on purpose:
// what goes in are ordinary tensors, and only ops read what is inside.
import type { Context } from './context.js';
import { MoeError } from './errors.js';
import { OwnedMemory } from './owned_memory.js';
import { constructionKey, type FloatDType, type Handle } from './tensor.js';

/**
 * The activation of one fused layer: (u + beta) * g * sigmoid(alpha * g), g the gate half and u the up half of the
 * first product, clamped by `limit` where given. The defaults are SwiGLU; gpt-oss has alpha 1.702, beta 1 and limit 7.
 */
export interface SwiGLU {
  /** Slope inside the sigmoid. Default 1, which with beta 0 is silu(g) * u. */
  readonly alpha?: number;
  /** Added to the up half: 1 in gpt-oss. Default 0. */
  readonly beta?: number;
  /** g is cut at +limit and u at +-limit before anything else. Default 0: no clamping. */
  readonly limit?: number;
}

/** What a backend needs to know to hold a layer's experts. */
export interface ExpertsLayout {
  readonly slots: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly dtype: FloatDType;
  readonly biases: boolean;
  readonly swiglu: Required<SwiGLU>;
}

/**
 * The packed weights of `slots` experts. Made by `packExperts` or `allocateExperts`; slots can be overwritten later
 * with `packExperts({ w13, w2 }, { into, firstSlot })`.
 */
export class ExpertWeights extends OwnedMemory implements ExpertsLayout {
  readonly slots: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly dtype: FloatDType;
  readonly biases: boolean;
  readonly swiglu: Required<SwiGLU>;
  /** Bytes held on the device. */
  readonly bytes: number;

  /** @internal Made by contexts. */
  constructor(secret: symbol, context: Context, layout: ExpertsLayout, handle: Handle, bytes: number) {
    if (secret !== constructionKey) {
      throw new MoeError('ERR_MOE_INVALID_ARG', 'expert weights are made by packExperts or allocateExperts', {
        op: 'ExpertWeights',
      });
    }
    super(context, handle);
    this.slots = layout.slots;
    this.hidden = layout.hidden;
    this.intermediate = layout.intermediate;
    this.dtype = layout.dtype;
    this.biases = layout.biases;
    this.swiglu = Object.freeze({ ...layout.swiglu });
    this.bytes = bytes;
    Object.freeze(this); // what kernels were told stays true
  }

  /** `experts bf16[257, 7168, 2048]`: slots, hidden, intermediate. */
  override toString(): string {
    return `experts ${this.dtype}[${this.slots}, ${this.hidden}, ${this.intermediate}]`;
  }
}
