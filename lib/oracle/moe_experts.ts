// The expert MLP of every dispatched row: down(swiglu(gate_up(row))). Rows of expert e are
// [offsets[e], offsets[e] + counts[e]); other places stay 0.
import { MoeError } from '../errors.js';
import { dot, type OracleExperts, type OracleTensor, swiglu } from './values.js';

interface Inputs {
  rows: OracleTensor;
  counts: OracleTensor<Int32Array>;
  offsets: OracleTensor<Int32Array>;
  experts: OracleExperts;
  order?: OracleTensor<Int32Array>;
  weights?: OracleTensor;
}

export function moe_experts(inputs: Inputs, _options: object, { output }: { output: OracleTensor }): void {
  const { rows, counts, offsets, experts, order, weights } = inputs;
  const { slots, hidden, intermediate } = experts;
  const capacity = rows.shape[0];
  const active = new Float32Array(intermediate);
  const taken = new Uint8Array(capacity);
  for (let e = 0; e < slots; e++) {
    const [first, count] = [offsets.data[e], counts.data[e]];
    if (count < 0) refuse('counts', `counts[${e}] >= 0 but received ${count}`);
    if (count > 0 && (first < 0 || first + count > capacity)) {
      refuse(
        'offsets',
        `the rows of expert ${e} among 0..${capacity - 1} but received ${first}..${first + count - 1}`,
      );
    }
    for (let p = first; p < first + count; p++) {
      if (taken[p] === 1) refuse('offsets', `every row to belong to one expert but row ${p} belongs to two`);
      taken[p] = 1;
      let scale = 1;
      if (order !== undefined && weights !== undefined) {
        const choice = order.data[p];
        if (choice < 0 || choice >= weights.data.length) {
          refuse('order', `order[${p}] among the ${weights.data.length} choices but received ${choice}`);
        }
        scale = weights.data[choice];
      }
      for (let i = 0; i < intermediate; i++) {
        const gate = scale * dot(experts.w13[e], i * hidden, rows.data, p * hidden, hidden);
        const up = scale * dot(experts.w13[e], (intermediate + i) * hidden, rows.data, p * hidden, hidden);
        active[i] = swiglu(gate + experts.b13[e][i], up + experts.b13[e][intermediate + i], experts.swiglu);
      }
      for (let h = 0; h < hidden; h++) {
        const down = dot(experts.w2[e], h * intermediate, active, 0, intermediate);
        output.data[p * hidden + h] = down + experts.b2[e][h];
      }
    }
  }
}

function refuse(arg: string, expectation: string): never {
  throw new MoeError('ERR_MOE_RANGE', `expected ${expectation}`, { op: 'moe_experts', arg });
}
