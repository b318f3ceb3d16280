import { fusedMoe } from '../lib/index.js';
import type { Bench } from './harness.js';
import { expertWork, layerExperts, mixtralSmall, normal, qwenSmall, routing } from './layers.js';

const sizes = [
  [qwenSmall, 1, 'f32'],
  [qwenSmall, 1, 'bf16'],
  [qwenSmall, 16, 'bf16'],
  [qwenSmall, 256, 'f32'],
  [mixtralSmall, 16, 'f32'],
] as const;

export const bench: Bench = {
  op: 'fused_moe',
  cases: sizes.map(([shape, tokens, dtype]) => (context) => {
    const experts = layerExperts(context, shape, dtype);
    const hidden = normal(context, dtype, [tokens, shape.hidden], 3);
    const { ids, weights, experts: hitExperts } = routing(context, tokens, shape);
    return {
      name: `${shape.name}, ${tokens} tokens, ${dtype}`,
      ...expertWork(shape, tokens, hitExperts, dtype),
      run: () => fusedMoe({ hidden, ids, weights, experts }).dispose(),
      dispose: () => [experts, hidden, ids, weights].forEach((each) => void each.dispose()),
    };
  }),
};
