import { moeFusedGate } from '../lib/index.js';
import type { Bench } from './harness.js';
import { dtypeBytes, normal } from './layers.js';

const v3 = {
  scoring: 'sigmoid',
  groups: 8,
  topGroups: 4,
  topK: 8,
  renormalize: true,
  routedScalingFactor: 2.5,
} as const;
const qwen = { topK: 8, renormalize: true } as const;

const rows = [
  ['DeepSeek-V3', 256, v3, 1, 'f32'],
  ['DeepSeek-V3', 256, v3, 512, 'f32'],
  ['DeepSeek-V3', 256, v3, 4096, 'bf16'],
  ['DeepSeek-V3 + shared', 256, { ...v3, sharedExperts: 1 }, 4096, 'f32'],
  ['Qwen3', 128, qwen, 4096, 'f32'],
] as const;

export const bench: Bench = {
  op: 'moe_fused_gate',
  cases: rows.map(([family, experts, options, tokens, dtype]) => (context) => {
    const logits = normal(context, dtype, [tokens, experts], 1);
    const bias = 'groups' in options ? normal(context, 'f32', [experts], 2, 0.1) : undefined;
    const columns = options.topK + ('sharedExperts' in options ? options.sharedExperts : 0);
    return {
      name: `${family}, ${tokens} tokens, ${dtype}`,
      bytes: tokens * (experts * dtypeBytes(dtype) + 8 * columns),
      run: () => {
        const { ids, weights } = moeFusedGate(bias === undefined ? { logits } : { logits, bias }, options);
        ids.dispose();
        weights.dispose();
      },
      dispose: () => [logits, bias].forEach((tensor) => void tensor?.dispose()),
    };
  }),
};
