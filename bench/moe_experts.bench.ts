import { moeExperts } from '../lib/index.js';
import type { Bench } from './harness.js';
import { dispatched, expertWork, layerExperts, qwenSmall } from './layers.js';

const sizes = [
  [1, 'f32'],
  [16, 'bf16'],
  [256, 'f32'],
] as const;

export const bench: Bench = {
  op: 'moe_experts',
  cases: sizes.map(([tokens, dtype]) => (context) => {
    const experts = layerExperts(context, qwenSmall, dtype);
    const { rows, counts, offsets, hitExperts } = dispatched(context, tokens, qwenSmall, dtype);
    return {
      name: `${qwenSmall.name}, ${tokens} tokens, ${dtype}`,
      ...expertWork(qwenSmall, tokens, hitExperts, dtype),
      run: () => moeExperts({ rows, counts, offsets, experts }).dispose(),
      dispose: () => [rows, counts, offsets, experts].forEach((each) => void each.dispose()),
    };
  }),
};
