import { sharedExperts } from '../lib/index.js';
import type { Bench } from './harness.js';
import { expertWork, layerExperts, normal } from './layers.js';

const shape = { name: 'dense MLP', hidden: 512, intermediate: 1792, experts: 1, topK: 1 };
const sizes = [
  [1, 'bf16'],
  [64, 'f32'],
] as const;

export const bench: Bench = {
  op: 'shared_experts',
  cases: sizes.map(([tokens, dtype]) => (context) => {
    const experts = layerExperts(context, shape, dtype);
    const hidden = normal(context, dtype, [tokens, shape.hidden], 3);
    return {
      name: `${shape.hidden} x ${shape.intermediate}, ${tokens} tokens, ${dtype}`,
      ...expertWork(shape, tokens, 1, dtype),
      run: () => sharedExperts({ hidden, experts }).dispose(),
      dispose: () => [experts, hidden].forEach((each) => void each.dispose()),
    };
  }),
};
