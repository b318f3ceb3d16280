// Sorts (token, column) choices by expert: one bucket per local expert, choices ascending inside it.
import type { OracleTensor } from './values.js';

interface Inputs {
  ids: OracleTensor<Int32Array>;
  hidden?: OracleTensor;
}

interface Options {
  experts: number;
  firstExpert: number;
  blockSize: number;
}

interface Outputs {
  order: OracleTensor<Int32Array>;
  inverse: OracleTensor<Int32Array>;
  counts: OracleTensor<Int32Array>;
  offsets: OracleTensor<Int32Array>;
  blockExperts?: OracleTensor<Int32Array>;
  rows?: OracleTensor;
}

export function moe_dispatch(
  { ids, hidden }: Inputs,
  { experts, firstExpert, blockSize }: Options,
  out: Outputs,
): void {
  const columns = ids.shape[1];
  const choices = ids.data.length;
  out.order.data.fill(choices);
  out.inverse.data.fill(-1);
  out.blockExperts?.data.fill(-1);

  let place = 0;
  for (let e = 0; e < experts; e++) {
    out.offsets.data[e] = place;
    for (let choice = 0; choice < choices; choice++) {
      if (ids.data[choice] !== firstExpert + e) continue;
      out.order.data[place] = choice;
      out.inverse.data[choice] = place;
      out.counts.data[e]++;
      place++;
    }
    if (blockSize === 0) continue;
    place = Math.ceil(place / blockSize) * blockSize;
    out.blockExperts?.data.fill(e, out.offsets.data[e] / blockSize, place / blockSize);
  }
  out.offsets.data[experts] = place;

  if (hidden === undefined || out.rows === undefined) return;
  const width = hidden.shape[1];
  for (let p = 0; p < place; p++) {
    const choice = out.order.data[p];
    if (choice === choices) continue;
    const token = Math.floor(choice / columns);
    out.rows.data.set(hidden.data.subarray(token * width, (token + 1) * width), p * width);
  }
}
