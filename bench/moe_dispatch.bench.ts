import { moeDispatch } from '../lib/index.js';
import type { Bench } from './harness.js';
import { dtypeBytes, normal, qwenSmall, routing } from './layers.js';

const sizes = [
  [64, false],
  [4096, false],
  [4096, true],
] as const;

export const bench: Bench = {
  op: 'moe_dispatch',
  cases: sizes.map(([tokens, gather]) => (context) => {
    const { ids } = routing(context, tokens, qwenSmall);
    const hidden = gather ? normal(context, 'bf16', [tokens, qwenSmall.hidden], 1) : undefined;
    const choices = tokens * qwenSmall.topK;
    return {
      name: `${tokens} tokens x ${qwenSmall.topK}, ${qwenSmall.experts} experts${gather ? ', bf16 rows gathered' : ''}`,
      bytes: 12 * choices + (gather ? 2 * choices * qwenSmall.hidden * dtypeBytes('bf16') : 0),
      run: () => {
        const plan = moeDispatch(hidden === undefined ? { ids } : { ids, hidden }, {
          experts: qwenSmall.experts,
        });
        for (const tensor of Object.values(plan)) tensor?.dispose();
      },
      dispose: () => [ids, hidden].forEach((tensor) => void tensor?.dispose()),
    };
  }),
};
