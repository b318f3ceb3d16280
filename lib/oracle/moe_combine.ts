// The weighted sum of each token's expert outputs, in column order; zero experts add weight x hidden.
import { MoeError } from '../errors.js';
import type { OracleTensor } from './values.js';

interface Inputs {
  rows: OracleTensor;
  inverse: OracleTensor<Int32Array>;
  weights: OracleTensor;
  ids?: OracleTensor<Int32Array>;
  hidden?: OracleTensor;
}

interface Options {
  outputScale: number;
  zeroExperts: number;
  firstZeroExpert: number;
  weightsOnInput: boolean;
}

export function moe_combine(inputs: Inputs, options: Options, { output }: { output: OracleTensor }): void {
  const { rows, inverse, weights, ids, hidden } = inputs;
  const [capacity, width] = rows.shape;
  const [tokens, columns] = inverse.shape;
  const scale = Math.fround(options.outputScale);
  const sum = new Float64Array(width);
  for (let t = 0; t < tokens; t++) {
    sum.fill(0);
    for (let choice = t * columns; choice < (t + 1) * columns; choice++) {
      const zeroExpert = (ids?.data[choice] ?? -1) - options.firstZeroExpert;
      const place = inverse.data[choice];
      if (hidden !== undefined && zeroExpert >= 0 && zeroExpert < options.zeroExperts) {
        for (let h = 0; h < width; h++) sum[h] += weights.data[choice] * hidden.data[t * width + h];
      } else if (place >= 0) {
        if (place >= capacity) {
          const expected = `expected inverse below ${capacity} (capacity from rows) but received ${place}`;
          throw new MoeError('ERR_MOE_RANGE', expected, { op: 'moe_combine', arg: 'inverse' });
        }
        const weight = options.weightsOnInput ? 1 : weights.data[choice];
        for (let h = 0; h < width; h++) sum[h] += weight * rows.data[place * width + h];
      }
    }
    for (let h = 0; h < width; h++) output.data[t * width + h] = scale * sum[h];
  }
}
