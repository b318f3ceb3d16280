import { moeCombine } from '../lib/index.js';
import type { Bench } from './harness.js';
import { dispatched, dtypeBytes, qwenSmall } from './layers.js';

const sizes = [
  [64, 'f32'],
  [4096, 'bf16'],
] as const;

export const bench: Bench = {
  op: 'moe_combine',
  cases: sizes.map(([tokens, dtype]) => (context) => {
    const { rows, inverse, weights } = dispatched(context, tokens, qwenSmall, dtype);
    const { hidden, topK } = qwenSmall;
    return {
      name: `${tokens} tokens x ${topK}, hidden ${hidden}, ${dtype}`,
      bytes: tokens * (topK + 1) * hidden * dtypeBytes(dtype) + 8 * tokens * topK,
      run: () => moeCombine({ rows, inverse, weights }).dispose(),
      dispose: () => [rows, inverse, weights].forEach((tensor) => void tensor.dispose()),
    };
  }),
};
