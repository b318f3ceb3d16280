// A dense MLP beside the routed experts: routed + sigmoid(hidden . expertGate) * down(swiglu(gate_up(hidden))).
import { dot, type OracleExperts, type OracleTensor, swiglu } from './values.js';

interface Inputs {
  hidden: OracleTensor;
  /** One slot. */
  experts: OracleExperts;
  projected?: OracleTensor;
  expertGate?: OracleTensor;
  routed?: OracleTensor;
}

interface Options {
  part: 'whole' | 'gateUp' | 'down';
}

interface Outputs {
  /** With part 'gateUp'. */
  projected?: OracleTensor;
  /** With the other parts. */
  output?: OracleTensor;
}

export function shared_experts(inputs: Inputs, { part }: Options, outputs: Outputs): void {
  const { hidden, experts, expertGate, routed } = inputs;
  const [tokens, width] = hidden.shape;
  const { intermediate } = experts;
  const [w13, w2, b13, b2] = [experts.w13[0], experts.w2[0], experts.b13[0], experts.b2[0]];
  const active = new Float32Array(intermediate);
  for (let t = 0; t < tokens; t++) {
    const projected = new Float32Array(2 * intermediate);
    for (let i = 0; i < 2 * intermediate; i++) {
      if (part === 'down') projected[i] = inputs.projected!.data[t * 2 * intermediate + i];
      else projected[i] = dot(w13, i * width, hidden.data, t * width, width) + b13[i];
    }
    if (part === 'gateUp') {
      outputs.projected!.data.set(projected, t * 2 * intermediate);
      continue;
    }
    for (let i = 0; i < intermediate; i++) {
      active[i] = swiglu(projected[i], projected[intermediate + i], experts.swiglu);
    }
    const gateLogit = expertGate
      ? dot(expertGate.data, 0, hidden.data, t * width, width)
      : Number.POSITIVE_INFINITY;
    const gate = 1 / (1 + Math.exp(-gateLogit));
    for (let h = 0; h < width; h++) {
      const down = dot(w2, h * intermediate, active, 0, intermediate) + b2[h];
      outputs.output!.data[t * width + h] = (routed?.data[t * width + h] ?? 0) + gate * down;
    }
  }
}
