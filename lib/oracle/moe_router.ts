// Router logits: hidden x weight^T + bias.
import { dot, type OracleTensor } from './values.js';

interface Inputs {
  hidden: OracleTensor;
  weight: OracleTensor;
  bias?: OracleTensor;
}

export function moe_router(
  { hidden, weight, bias }: Inputs,
  _options: object,
  { logits }: { logits: OracleTensor },
): void {
  const [tokens, width] = hidden.shape;
  const [experts] = weight.shape;
  for (let t = 0; t < tokens; t++) {
    for (let e = 0; e < experts; e++) {
      const product = dot(hidden.data, t * width, weight.data, e * width, width);
      logits.data[t * experts + e] = product + (bias?.data[e] ?? 0);
    }
  }
}
