// Expert weights, routings and a dense layer, all made from seeds.
import type { SwiGLU } from '../../lib/experts.js';
import type { OracleExperts } from '../../lib/oracle/values.js';
import type { FloatDType } from '../../lib/tensor.js';
import { rounded } from './floats.js';
import { Random } from './random.js';

export interface ExpertsCase {
  readonly slots: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly dtype?: FloatDType;
  readonly biases?: boolean;
  readonly swiglu?: SwiGLU;
  readonly seed?: number;
}

/** gpt-oss's activation, with a limit that is reached often. */
export const clampedSwiGLU: Required<SwiGLU> = { alpha: 1.702, beta: 1, limit: 0.9 };

/** Checkpoint tensors: w13 [slots, 2*intermediate, hidden] in halves, w2 [slots, hidden, intermediate]. */
export interface ExpertArrays {
  readonly w13: Float32Array;
  readonly w2: Float32Array;
  readonly b13?: Float32Array;
  readonly b2?: Float32Array;
}

export function expertArrays(given: ExpertsCase): ExpertArrays {
  const { slots, hidden, intermediate, dtype = 'f32', seed = 1 } = given;
  const random = new Random(seed * 31 + 5);
  const normals = (count: number, scale: number) => rounded(dtype, random.normals(count, scale));
  const w13 = normals(slots * 2 * intermediate * hidden, 1.5 / Math.sqrt(hidden));
  const w2 = normals(slots * hidden * intermediate, 1.5 / Math.sqrt(intermediate));
  if (!given.biases) return { w13, w2 };
  return { w13, w2, b13: normals(slots * 2 * intermediate, 0.5), b2: normals(slots * hidden, 0.5) };
}

/** The same weights as the oracle takes them packed. */
export function oracleExperts(given: ExpertsCase, arrays = expertArrays(given)): OracleExperts {
  const { slots, hidden, intermediate, biases = false } = given;
  const perSlot = (values: Float32Array | undefined, size: number) =>
    Array.from(
      { length: slots },
      (_, e) => values?.slice(e * size, (e + 1) * size) ?? new Float32Array(size),
    );
  return {
    slots,
    hidden,
    intermediate,
    biases,
    swiglu: { alpha: 1, beta: 0, limit: 0, ...given.swiglu },
    w13: perSlot(arrays.w13, 2 * intermediate * hidden),
    w2: perSlot(arrays.w2, hidden * intermediate),
    b13: perSlot(arrays.b13, 2 * intermediate),
    b2: perSlot(arrays.b2, hidden),
    round: Math.fround,
  };
}

/** Swaps the last two dimensions of [count, rows, columns]. */
export function transposed(values: Float32Array, count: number, rows: number, columns: number): Float32Array {
  const result = new Float32Array(values.length);
  for (let e = 0; e < count; e++) {
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) {
        result[(e * columns + c) * rows + r] = values[(e * rows + r) * columns + c];
      }
    }
  }
  return result;
}

/** Rows of [count, 2*half, width] from gate half, up half to gate, up, gate, up... */
export function interleaved(values: Float32Array, count: number, half: number, width: number): Float32Array {
  const result = new Float32Array(values.length);
  for (let e = 0; e < count; e++) {
    for (let r = 0; r < 2 * half; r++) {
      const row = values.subarray((e * 2 * half + r) * width, (e * 2 * half + r + 1) * width);
      result.set(row, (e * 2 * half + (r < half ? 2 * r : 2 * (r - half) + 1)) * width);
    }
  }
  return result;
}

export type RoutingKind = 'uniform' | 'skewed' | 'one' | 'none' | 'holes';

/** ids [tokens, columns], different within a row: 'one' sends the first column to one expert, 'holes' has -1. */
export function routing(
  kind: RoutingKind,
  tokens: number,
  columns: number,
  experts: number,
  random: Random,
): { ids: Int32Array; weights: Float32Array } {
  const ids = new Int32Array(tokens * columns).fill(-1);
  const weights = new Float32Array(tokens * columns);
  for (let t = 0; t < tokens; t++) {
    const row = random.distinct(
      Math.min(columns, experts),
      kind === 'skewed' ? Math.max(columns, experts >> 3) : experts,
    );
    for (let c = 0; c < columns; c++) {
      weights[t * columns + c] = random.next();
      if (kind === 'none' || (kind === 'holes' && random.chance(0.4))) continue;
      ids[t * columns + c] = kind === 'one' && c > 0 ? -1 : kind === 'one' ? experts - 1 : (row[c] ?? -1);
    }
  }
  return { ids, weights };
}

/**
 * A second reading of experts, in f64 and from the checkpoint's own tensors: the output of expert e for the vector x,
 * with `scale` on its input.
 */
export function denseExpert(
  { hidden, intermediate, swiglu = {} }: ExpertsCase,
  { w13, w2, b13, b2 }: ExpertArrays,
  e: number,
  x: ArrayLike<number>,
  scale = 1,
): Float64Array {
  const { alpha = 1, beta = 0, limit = 0 } = swiglu;
  const bound = limit > 0 ? limit : Number.POSITIVE_INFINITY;
  const output = Float64Array.from({ length: hidden }, (_, h) => b2?.[e * hidden + h] ?? 0);
  for (let i = 0; i < intermediate; i++) {
    const [gateRow, upRow] = [e * 2 * intermediate + i, (e * 2 + 1) * intermediate + i];
    let [g, u] = [b13?.[gateRow] ?? 0, b13?.[upRow] ?? 0];
    for (let h = 0; h < hidden; h++) {
      g += scale * x[h] * w13[gateRow * hidden + h];
      u += scale * x[h] * w13[upRow * hidden + h];
    }
    g = Math.min(g, bound);
    u = Math.max(-bound, Math.min(u, bound));
    const activation = ((u + beta) * g) / (1 + Math.exp(-alpha * g));
    for (let h = 0; h < hidden; h++) output[h] += activation * w2[(e * hidden + h) * intermediate + i];
  }
  return output;
}

export interface DenseLayer {
  readonly hidden: Float32Array;
  readonly ids: Int32Array;
  readonly weights: Float32Array;
  readonly columns: number;
  readonly outputScale?: number;
  readonly firstExpert?: number;
  readonly zeroExperts?: number;
  readonly firstZeroExpert?: number;
  readonly weightsOnInput?: boolean;
}

/** The whole layer densely: every expert for every token, times its weight in a matrix of tokens x experts. */
export function denseLayer(experts: ExpertsCase, arrays: ExpertArrays, layer: DenseLayer): Float64Array {
  const { hidden, ids, weights, columns, firstExpert = 0, zeroExperts = 0, weightsOnInput = false } = layer;
  const firstZero = layer.firstZeroExpert ?? firstExpert + experts.slots;
  const width = experts.hidden;
  const tokens = hidden.length / width;
  const output = new Float64Array(tokens * width);
  for (let t = 0; t < tokens; t++) {
    const x = hidden.subarray(t * width, (t + 1) * width);
    const chosen = ids.subarray(t * columns, (t + 1) * columns);
    const y = output.subarray(t * width, (t + 1) * width);
    for (let e = 0; e < experts.slots; e++) {
      const weight = chosen.reduce(
        (sum, id, c) => (id === firstExpert + e ? sum + weights[t * columns + c] : sum),
        0,
      );
      if (weight === 0) continue; // random weights are never 0, so that only experts not chosen are skipped
      const expert = denseExpert(experts, arrays, e, x, weightsOnInput ? weight : 1);
      for (let h = 0; h < width; h++) y[h] += (weightsOnInput ? 1 : weight) * expert[h];
    }
    chosen.forEach((id, c) => {
      if (id < firstZero || id >= firstZero + zeroExperts) return;
      for (let h = 0; h < width; h++) y[h] += weights[t * columns + c] * x[h];
    });
    for (let h = 0; h < width; h++) y[h] *= layer.outputScale ?? 1;
  }
  return output;
}
