// What the oracle computes with. It is the slow independent reading of every op: plain loops over plain arrays, no
// import from ../ops and nothing of the native code's structure, so that agreement with it means something.
//
// bf16 and f16 arrive widened to Float32Array; float outputs are Float32Array and the caller rounds them. Outputs
// arrive zero-filled, optional arguments that were left out are undefined, options have their defaults filled in.
// The gate rounds every elementary result to f32; matrix products accumulate in f64.

/** A tensor's values, row-major: Float32Array, Int32Array or BigInt64Array. */
export interface OracleTensor<A = Float32Array> {
  readonly shape: readonly number[];
  readonly data: A;
}

/** Parameters of `(u + beta) * g * sigmoid(alpha * g)`; with limit > 0, g and u are clamped before. */
export interface OracleSwiGLU {
  readonly alpha: number;
  readonly beta: number;
  /** g is cut at +limit and u at +-limit; 0 for no clamping. */
  readonly limit: number;
}

/** Packed expert weights: one array per slot. */
export interface OracleExperts {
  readonly slots: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly swiglu: OracleSwiGLU;
  readonly biases: boolean;
  /** Per slot [2*intermediate, hidden]: all gate rows, then all up rows. */
  readonly w13: readonly Float32Array[];
  /** Per slot [hidden, intermediate]. */
  readonly w2: readonly Float32Array[];
  /** Per slot [2*intermediate], 0 where `biases` is false. */
  readonly b13: readonly Float32Array[];
  /** Per slot [hidden], 0 where `biases` is false. */
  readonly b2: readonly Float32Array[];
  /** Rounds to the dtype that w13 and w2 are held in. Biases are held in f32. */
  round(value: number): number;
}

/** The dot product of two vectors that lie inside larger arrays, accumulated in f64. */
export function dot(
  a: Float32Array,
  aStart: number,
  b: Float32Array,
  bStart: number,
  length: number,
): number {
  let sum = 0;
  for (let i = 0; i < length; i++) sum += a[aStart + i] * b[bStart + i];
  return sum;
}

/** The gated activation, rounded to f32 once. */
export function swiglu(gate: number, up: number, { alpha, beta, limit }: OracleSwiGLU): number {
  let [g, u] = [gate, up];
  if (limit > 0) {
    if (g > limit) g = limit;
    if (u > limit) u = limit;
    if (u < -limit) u = -limit;
  }
  return Math.fround((u + beta) * (g / (1 + Math.exp(-alpha * g))));
}
