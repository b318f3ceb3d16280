// Copies expert weights into slots: gate rows, then up rows; matrices as [out, in]; rounded to the dtype held.
import { MoeError } from '../errors.js';
import type { OracleExperts, OracleTensor } from './values.js';

interface Inputs {
  experts: OracleExperts;
  /** [count, 2*intermediate, hidden], or the last two swapped if `transposed`. */
  w13: OracleTensor;
  /** [count, hidden, intermediate], or the last two swapped if `transposed`. */
  w2: OracleTensor;
  b13?: OracleTensor;
  b2?: OracleTensor;
}

interface Options {
  gateUp: 'halves' | 'interleaved';
  transposed: boolean;
  firstSlot: number;
}

export function pack_experts(
  { experts, w13, w2, b13, b2 }: Inputs,
  options: Options,
  _outputs: object,
): void {
  const { hidden, intermediate } = experts;
  const { transposed, firstSlot } = options;
  const [count] = w13.shape;
  if (!experts.biases && (b13 !== undefined || b2 !== undefined)) {
    throw new MoeError('ERR_MOE_INVALID_ARG', 'expected no biases: these experts were allocated without', {
      op: 'pack_experts',
      arg: b13 === undefined ? 'b2' : 'b13',
    });
  }
  // Row r of the packed [gate; up] is this row of the source
  const source = (r: number): number => {
    if (options.gateUp === 'halves') return r;
    return r < intermediate ? 2 * r : 2 * (r - intermediate) + 1;
  };
  for (let e = 0; e < count; e++) {
    const slot = firstSlot + e;
    const from13 = e * 2 * intermediate * hidden;
    for (let r = 0; r < 2 * intermediate; r++) {
      for (let h = 0; h < hidden; h++) {
        const at = transposed ? h * 2 * intermediate + source(r) : source(r) * hidden + h;
        experts.w13[slot][r * hidden + h] = experts.round(w13.data[from13 + at]);
      }
      experts.b13[slot][r] = b13?.data[e * 2 * intermediate + source(r)] ?? 0;
    }
    const from2 = e * hidden * intermediate;
    for (let h = 0; h < hidden; h++) {
      for (let i = 0; i < intermediate; i++) {
        const at = transposed ? i * hidden + h : h * intermediate + i;
        experts.w2[slot][h * intermediate + i] = experts.round(w2.data[from2 + at]);
      }
      experts.b2[slot][h] = b2?.data[e * hidden + h] ?? 0;
    }
  }
}
