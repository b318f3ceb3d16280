// Float values as tests compare them.
import { decode, encode, type FloatDType } from '../../lib/tensor.js';

export const floatDTypes = ['f32', 'bf16', 'f16'] as const satisfies readonly FloatDType[];

/** How far experts may be from the oracle, by relative norm. */
export const relativeTolerance: Record<FloatDType, number> = { f32: 5e-6, f16: 1e-3, bf16: 6e-3 };

/** The values that a tensor of this dtype holds after it was filled from `values`. */
export function rounded(dtype: FloatDType, values: Float32Array): Float32Array {
  return decode(dtype, encode(dtype, values)) as Float32Array;
}

/** |actual - expected| / |expected|, 2-norms; 0 for two zero vectors, NaN where there is a NaN. */
export function relativeNorm(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length)
    throw new Error(`lengths differ: ${actual.length} and ${expected.length}`);
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return difference === 0 ? 0 : Math.sqrt(difference) / Math.sqrt(norm);
}
