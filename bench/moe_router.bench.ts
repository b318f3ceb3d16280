import { moeRouter } from '../lib/index.js';
import type { Bench } from './harness.js';
import { dtypeBytes, normal } from './layers.js';

const sizes = [
  [1, 'bf16'],
  [64, 'f32'],
  [512, 'bf16'],
] as const;
const [HIDDEN, EXPERTS] = [1024, 256];

export const bench: Bench = {
  op: 'moe_router',
  cases: sizes.map(([tokens, dtype]) => (context) => {
    const hidden = normal(context, dtype, [tokens, HIDDEN], 1);
    const weight = normal(context, dtype, [EXPERTS, HIDDEN], 2);
    return {
      name: `${tokens} tokens, ${HIDDEN} -> ${EXPERTS}, ${dtype}`,
      bytes: (tokens + EXPERTS) * HIDDEN * dtypeBytes(dtype) + 4 * tokens * EXPERTS,
      flops: 2 * tokens * HIDDEN * EXPERTS,
      run: () => moeRouter({ hidden, weight }).dispose(),
      dispose: () => [hidden, weight].forEach((tensor) => void tensor.dispose()),
    };
  }),
};
