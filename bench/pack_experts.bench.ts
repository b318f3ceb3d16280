import { allocateExperts, packExperts } from '../lib/index.js';
import type { Bench } from './harness.js';
import { dtypeBytes, normal } from './layers.js';

// Beyond any cache: 75 to 200 MB go in and out.
const [SLOTS, HIDDEN, INTERMEDIATE] = [4, 2048, 1024];
const rows = [
  ['bf16', 'bf16', false, 'halves'],
  ['f32', 'bf16', false, 'halves'],
  ['bf16', 'bf16', true, 'interleaved'], // as gpt-oss has them
  ['f32', 'bf16', true, 'interleaved'],
  ['f32', 'bf16', true, 'halves'],
  ['f32', 'f32', true, 'halves'],
] as const;

export const bench: Bench = {
  op: 'pack_experts',
  cases: rows.map(([from, to, transposed, gateUp]) => (context) => {
    const shape = (outer: number, inner: number) =>
      transposed ? [SLOTS, inner, outer] : [SLOTS, outer, inner];
    const w13 = normal(context, from, shape(2 * INTERMEDIATE, HIDDEN), 1);
    const w2 = normal(context, from, shape(HIDDEN, INTERMEDIATE), 2);
    const into = allocateExperts(context, {
      slots: SLOTS,
      hidden: HIDDEN,
      intermediate: INTERMEDIATE,
      dtype: to,
    });
    return {
      name: `${SLOTS} slots, ${HIDDEN} x ${INTERMEDIATE}, ${from} -> ${to}${transposed ? `, transposed, ${gateUp}` : ''}`,
      bytes: 3 * SLOTS * HIDDEN * INTERMEDIATE * (dtypeBytes(from) + dtypeBytes(to)),
      run: () => void packExperts({ w13, w2 }, { into, transposed, gateUp }),
      dispose: () => [w13, w2, into].forEach((each) => void each.dispose()),
    };
  }),
};
