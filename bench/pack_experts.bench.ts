import { allocateExperts, packExperts } from '../lib/index.js';
import type { Bench } from './harness.js';
import { dtypeBytes, normal } from './layers.js';

const [SLOTS, HIDDEN, INTERMEDIATE] = [4, 512, 768];
const rows = [
  ['bf16', 'bf16', false],
  ['f32', 'bf16', true],
] as const;

export const bench: Bench = {
  op: 'pack_experts',
  cases: rows.map(([from, to, transposed]) => (context) => {
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
      name: `${SLOTS} slots, ${HIDDEN} x ${INTERMEDIATE}, ${from} -> ${to}${transposed ? ', transposed' : ''}`,
      bytes: 3 * SLOTS * HIDDEN * INTERMEDIATE * (dtypeBytes(from) + dtypeBytes(to)),
      run: () => void packExperts({ w13, w2 }, { into, transposed }),
      dispose: () => [w13, w2, into].forEach((each) => void each.dispose()),
    };
  }),
};
