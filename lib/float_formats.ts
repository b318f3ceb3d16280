// The float formats that JavaScript has no typed array for, as bit conversions. Rounding is to nearest, ties to
// even, as IEEE 754 and every accelerator do; values too large become infinity (e4m3, which has none, saturates).

/** Conversion between a number and the bits of a narrow float. */
export interface FloatFormat {
  decode(bits: number): number;
  encode(value: number): number;
}

const f32 = new Float32Array(1);
const u32 = new Uint32Array(f32.buffer);

/** bfloat16: the upper half of an f32. */
export const bf16: FloatFormat = {
  decode(bits) {
    u32[0] = bits << 16;
    return f32[0];
  },
  encode(value) {
    f32[0] = value;
    const bits = u32[0];
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40; // NaN stays NaN when its low bits are cut
    return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
  },
};

/** IEEE half precision: 5 exponent bits, 10 fraction bits. */
export const f16: FloatFormat = {
  decode(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >>> 10) & 0x1f;
    const fraction = bits & 0x3ff;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  },
  encode(value) {
    if (Number.isNaN(value)) return 0x7e00;
    return encodeFloat(value, { exponentBits: 5, fractionBits: 10, largest: 0x7c00 });
  },
};

/** OCP e4m3 ("fn"): no infinities, one NaN pattern, largest value 448. */
export const f8e4m3: FloatFormat = {
  decode(bits) {
    const sign = bits & 0x80 ? -1 : 1;
    const exponent = (bits >>> 3) & 0xf;
    const fraction = bits & 7;
    if (exponent === 15 && fraction === 7) return Number.NaN;
    if (exponent === 0) return sign * fraction * 2 ** -9;
    return sign * (1 + fraction / 8) * 2 ** (exponent - 7);
  },
  encode(value) {
    if (Number.isNaN(value)) return 0x7f;
    return encodeFloat(value, { exponentBits: 4, fractionBits: 3, largest: 0x7e });
  },
};

/** Rounds to a sign, an exponent and a fraction; `largest` is the pattern of infinity, or of what stands in for it. */
function encodeFloat(
  value: number,
  { exponentBits, fractionBits, largest }: { exponentBits: number; fractionBits: number; largest: number },
): number {
  const bias = 2 ** (exponentBits - 1) - 1;
  const sign = value < 0 || Object.is(value, -0) ? 1 << (exponentBits + fractionBits) : 0;
  const magnitude = Math.abs(Math.fround(value));
  if (magnitude === Number.POSITIVE_INFINITY) return sign | largest;
  f32[0] = magnitude;
  const exponent = Math.max((u32[0] >>> 23) - 127, 1 - bias); // subnormals share the smallest exponent
  const scaled = magnitude * 2 ** (fractionBits - exponent); // exact: a power of two
  const floor = Math.floor(scaled);
  const rest = scaled - floor;
  const rounded = rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
  // A carry out of the fraction runs into the exponent field, which is what rounding up to a power of two means.
  const bits = rounded + ((exponent + bias - 1) << fractionBits);
  return sign | Math.min(bits, largest);
}
