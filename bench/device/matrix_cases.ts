// Router, dense and routed experts on a device, bf16 unless said otherwise.
import {
  allocateExperts,
  type Context,
  type ExpertWeights,
  fusedMoe,
  moeRouter,
  packExperts,
  sharedExperts,
} from '../../lib/index.js';
import { dtypeBytes } from '../layers.js';
import { expertsQwen3, expertsV3EP, expertsV3TP8, type PeerTable } from '../peers.js';
import type { DeviceCase, DeviceTable } from './case.js';
import { Inputs, type RoutingShape, uniformIds } from './inputs.js';
import { peersAt } from './peers_at.js';

export function routerCase(
  tokens: number,
  hidden: number,
  experts: number,
  dtype: 'bf16' | 'f32',
): DeviceCase {
  return {
    op: 'moe_router',
    name: `${hidden} -> ${experts} ${dtype}`,
    tokens,
    reads: (tokens + experts) * hidden * dtypeBytes(dtype),
    writes: 4 * tokens * experts,
    flops: 2 * tokens * hidden * experts,
    recorded: {},
    prepare: (inputs) => (set) => {
      const x = inputs.normal(dtype, [tokens, hidden], set);
      const weight = inputs.normal(dtype, [experts, hidden], set + 1, hidden ** -0.5);
      return () => moeRouter({ hidden: x, weight });
    },
  };
}

/** Packed bf16 weights made a few slots at a time, so that the host never holds a layer. */
function packedExperts(context: Context, slots: number, hidden: number, intermediate: number): ExpertWeights {
  const atOnce = Math.max(1, Math.min(slots, Math.floor(2 ** 24 / (hidden * intermediate))));
  const into = allocateExperts(context, { slots, hidden, intermediate, dtype: 'bf16' });
  for (let firstSlot = 0; firstSlot < slots; firstSlot += atOnce) {
    const count = Math.min(atOnce, slots - firstSlot);
    const inputs = new Inputs(context);
    const w13 = inputs.normal('bf16', [count, 2 * intermediate, hidden], firstSlot, hidden ** -0.5);
    const w2 = inputs.normal('bf16', [count, hidden, intermediate], firstSlot + 1, intermediate ** -0.5);
    packExperts({ w13, w2 }, { into, firstSlot });
    inputs.dispose();
  }
  return into;
}

export function sharedCase(tokens: number, hidden: number, intermediate: number): DeviceCase {
  return {
    op: 'shared_experts',
    name: `hidden ${hidden}, intermediate ${intermediate} bf16`,
    tokens,
    reads: (3 * hidden * intermediate + tokens * hidden) * dtypeBytes('bf16'),
    writes: tokens * hidden * dtypeBytes('bf16'),
    flops: 6 * tokens * hidden * intermediate,
    recorded: {},
    launches: 8,
    prepare: (inputs) => (set) => {
      const x = inputs.normal('bf16', [tokens, hidden], set);
      const experts = inputs.keep(packedExperts(inputs.context, 1, hidden, intermediate));
      return () => sharedExperts({ hidden: x, experts });
    },
  };
}

export interface ExpertsShape extends Omit<RoutingShape, 'tokens'> {
  readonly name: string;
  readonly hidden: number;
  readonly intermediate: number;
  readonly peers?: PeerTable;
}

/** A whole layer of routed experts: from ids and hidden states to their weighted sum. */
export function expertsCase(shape: ExpertsShape, tokens: number): DeviceCase {
  const { name, hidden, intermediate, experts, topK, shared = 0, peers } = shape;
  const columns = topK + shared;
  const slots = experts + shared;
  const routing = { tokens, topK, experts, shared };
  const hit = new Set(uniformIds(routing, 0)).size;
  const states = tokens * hidden * dtypeBytes('bf16');
  return {
    op: 'fused_moe',
    name: `${name}: H ${hidden}, I ${intermediate}, E ${slots}, top ${columns} bf16`,
    tokens,
    reads: hit * 3 * hidden * intermediate * dtypeBytes('bf16') + states,
    writes: states,
    flops: 6 * hidden * intermediate * tokens * columns,
    setBytes: 2 * states,
    recorded: peers === undefined ? {} : peersAt(peers, tokens),
    control: `experts ${name}`,
    launches: tokens <= 256 ? 8 : 4,
    prepare: (inputs) => {
      const weights13and2 = inputs.keep(packedExperts(inputs.context, slots, hidden, intermediate));
      return (set) => {
        const x = inputs.normal('bf16', [tokens, hidden], set);
        const ids = inputs.int32([tokens, columns], uniformIds(routing, set));
        const weights = inputs.normal('f32', [tokens, columns], set);
        return () => fusedMoe({ hidden: x, ids, weights, experts: weights13and2 });
      };
    },
  };
}

const expertShapes = {
  v3TP8: {
    name: 'V3-TP8',
    hidden: 7168,
    intermediate: 256,
    experts: 256,
    shared: 1,
    topK: 8,
    peers: expertsV3TP8,
  },
  v3EP: { name: 'V3-EP', hidden: 7168, intermediate: 2048, experts: 9, topK: 2, peers: expertsV3EP },
  qwen3: { name: 'Qwen3', hidden: 2048, intermediate: 768, experts: 128, topK: 8, peers: expertsQwen3 },
} as const satisfies Record<string, ExpertsShape>;

export const routers: DeviceTable = {
  title: 'Router',
  cases: [
    ...[1, 16, 64, 512, 4096, 40000].map((tokens) => routerCase(tokens, 7168, 256, 'bf16')),
    routerCase(4096, 7168, 256, 'f32'),
  ],
};

export const sharedTable: DeviceTable = {
  title: 'Shared experts (dense)',
  cases: [1, 64, 1024, 4096].map((tokens) => sharedCase(tokens, 7168, 2048)),
};

export const experts: DeviceTable = {
  title: 'Routed experts, a whole layer',
  cases: Object.values(expertShapes).flatMap((shape) =>
    [1, 16, 64, 256, 1024, 4096, 16384].map((tokens) => expertsCase(shape, tokens)),
  ),
};
