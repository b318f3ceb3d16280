// Dispatch and combine on a device: what sorts choices and moves rows.
import { moeCombine, moeDispatch } from '../../lib/index.js';
import { dtypeBytes } from '../layers.js';
import { align257 } from '../peers.js';
import type { DeviceCase, DeviceTable } from './case.js';
import { type RoutingShape, uniformIds } from './inputs.js';
import { peersAt } from './peers_at.js';

/** Launches that move rows of a whole hidden state: as many as the recorded runs had. */
const ROW_LAUNCHES = 4;

interface DispatchShape extends RoutingShape {
  readonly blockSize?: number;
  /** Hidden size of bf16 rows to be gathered. */
  readonly hidden?: number;
}

export function dispatchCase({ blockSize = 0, hidden, ...routing }: DispatchShape): DeviceCase {
  const { tokens, topK, shared = 0 } = routing;
  const experts = routing.experts + shared;
  const columns = topK + shared;
  const choices = tokens * columns;
  // The sizes of `order` and `blockExperts` for the worst routing
  const worst =
    blockSize === 0 ? choices : Math.min(choices + experts * (blockSize - 1), choices * blockSize);
  const blocks = blockSize === 0 ? 0 : Math.ceil(worst / blockSize);
  const places = blockSize === 0 ? choices : blocks * blockSize;
  const rowBytes = (hidden ?? 0) * dtypeBytes('bf16');
  const compared = experts === 257 && columns === 9;
  const permute = (column: string) => column === 'vLLM moe_permute';
  const align = (column: string) => column.endsWith('align') && blockSize === 128;
  return {
    op: 'moe_dispatch',
    name:
      `${experts} experts, ${columns} columns, ` +
      `${blockSize === 0 ? 'no blocks' : `blocks of ${blockSize}`}${hidden === undefined ? '' : `, rows of ${hidden} bf16`}`,
    tokens,
    reads: 4 * choices + tokens * rowBytes,
    writes: 4 * (choices + places + blocks + 2 * experts + 1) + places * rowBytes,
    recorded: compared
      ? peersAt(
          align257,
          tokens,
          hidden === 7168 && blockSize === 0 ? permute : hidden === undefined ? align : () => false,
        )
      : {},
    ...(hidden === undefined ? {} : { launches: ROW_LAUNCHES }),
    prepare: (inputs) => (set) => {
      const ids = inputs.int32([tokens, columns], uniformIds(routing, set));
      const given =
        hidden === undefined ? { ids } : { ids, hidden: inputs.normal('bf16', [tokens, hidden], set) };
      return () => moeDispatch(given, { experts, ...(blockSize === 0 ? {} : { blockSize }) });
    },
  };
}

interface CombineShape extends RoutingShape {
  readonly hidden: number;
  readonly dtype: 'bf16' | 'f32';
}

export function combineCase({ hidden, dtype, ...routing }: CombineShape): DeviceCase {
  const { tokens, topK, shared = 0 } = routing;
  const columns = topK + shared;
  return {
    op: 'moe_combine',
    name: `${columns} columns of ${hidden} ${dtype}`,
    tokens,
    reads: tokens * columns * (hidden * dtypeBytes(dtype) + 8),
    writes: tokens * hidden * dtypeBytes(dtype),
    recorded:
      columns === 9 && hidden === 7168 && dtype === 'bf16'
        ? peersAt(align257, tokens, (column) => column === 'vLLM moe_unpermute')
        : {},
    ...(tokens > 64 ? { launches: ROW_LAUNCHES } : {}),
    prepare: (inputs) => (set) => {
      const ids = uniformIds(routing, set);
      // Places as a dispatch gives them: rows of an expert lie together
      const next = new Int32Array(routing.experts + shared + 1);
      for (const id of ids) next[id + 1]++;
      for (let e = 1; e < next.length; e++) next[e] += next[e - 1];
      const inverse = inputs.int32(
        [tokens, columns],
        ids.map((id) => next[id]++),
      );
      const rows = inputs.normal(dtype, [tokens * columns, hidden], set);
      const weights = inputs.normal('f32', [tokens, columns], set);
      return () => moeCombine({ rows, inverse, weights });
    },
  };
}

const v3 = { topK: 8, experts: 256, shared: 1 } as const;
const many = [1, 8, 64, 512, 1024, 4096, 5000, 10000, 20000, 40000];

export const dispatches: DeviceTable = {
  title: 'Dispatch',
  cases: [
    ...many.map((tokens) => dispatchCase({ ...v3, tokens, blockSize: 128 })),
    ...[1, 64, 4096, 40000].map((tokens) => dispatchCase({ ...v3, tokens })),
    dispatchCase({ topK: 8, experts: 256, tokens: 4096 }),
    ...[64, 1024, 4096, 10000].map((tokens) => dispatchCase({ ...v3, tokens, hidden: 7168 })),
    dispatchCase({ ...v3, tokens: 4096, hidden: 7168, blockSize: 128 }),
  ],
};

export const combines: DeviceTable = {
  title: 'Combine',
  cases: [
    ...[1, 64, 512, 1024, 4096, 10000].map((tokens) =>
      combineCase({ ...v3, tokens, hidden: 7168, dtype: 'bf16' }),
    ),
    combineCase({ ...v3, tokens: 4096, hidden: 7168, dtype: 'f32' }),
    combineCase({ topK: 8, experts: 128, tokens: 4096, hidden: 2048, dtype: 'bf16' }),
  ],
};
