// Dispatch, experts and combine in one call; nothing is rounded to a narrow dtype in between.
import { moe_combine } from './moe_combine.js';
import { moe_dispatch } from './moe_dispatch.js';
import { moe_experts } from './moe_experts.js';
import type { OracleExperts, OracleTensor } from './values.js';

interface Inputs {
  hidden: OracleTensor;
  ids: OracleTensor<Int32Array>;
  weights: OracleTensor;
  experts: OracleExperts;
}

interface Options {
  outputScale: number;
  firstExpert: number;
  zeroExperts: number;
  firstZeroExpert: number;
  weightsOnInput: boolean;
}

export function fused_moe(inputs: Inputs, options: Options, { output }: { output: OracleTensor }): void {
  const { hidden, ids, weights, experts } = inputs;
  const { slots } = experts;
  const [width, capacity] = [hidden.shape[1], ids.data.length];
  const dispatched = {
    order: { shape: [capacity], data: new Int32Array(capacity) },
    inverse: { shape: ids.shape, data: new Int32Array(capacity) },
    counts: { shape: [slots], data: new Int32Array(slots) },
    offsets: { shape: [slots + 1], data: new Int32Array(slots + 1) },
    rows: { shape: [capacity, width], data: new Float32Array(capacity * width) },
  };
  const { firstExpert } = options;
  moe_dispatch({ ids, hidden }, { experts: slots, firstExpert, blockSize: 0 }, dispatched);

  const computed = { shape: [capacity, width], data: new Float32Array(capacity * width) };
  const onInput = options.weightsOnInput ? { order: dispatched.order, weights } : {};
  moe_experts({ ...dispatched, experts, ...onInput }, {}, { output: computed });
  moe_combine({ rows: computed, inverse: dispatched.inverse, weights, ids, hidden }, options, { output });
}
