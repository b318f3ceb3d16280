// Gates on a device: the sweep over tokens that the project was asked for first, and every shape with a fast path,
// without one, and with what can be fused into it.
import { type FloatDType, type MoeFusedGateOptions, moeFusedGate } from '../../lib/index.js';
import { dtypeBytes } from '../layers.js';
import { gate256, gate384, softmax64, softmax128 } from '../peers.js';
import type { DeviceCase, DeviceTable } from './case.js';
import { peersAt } from './peers_at.js';

interface GateShape {
  readonly name: string;
  readonly experts: number;
  readonly options: MoeFusedGateOptions;
  readonly bias?: boolean;
  /** Rounds of an id map. */
  readonly rounds?: number;
  readonly load?: boolean;
  /** Recorded figures by dtype: which table, and what its columns for this shape end in. */
  readonly peers?: { readonly table: Parameters<typeof peersAt>[0]; readonly suffix?: string };
  readonly control?: string;
}

export function gateCase(shape: GateShape, tokens: number, dtype: FloatDType): DeviceCase {
  const { name, experts, options, bias = false, rounds = 0, load = false } = shape;
  const { topK, sharedExperts = 0 } = options;
  const columns = topK + sharedExperts;
  const ids = experts + sharedExperts;
  const { table, suffix = '' } = shape.peers ?? {};
  return {
    op: 'moe_fused_gate',
    name: `${name} ${dtype}`,
    tokens,
    reads:
      tokens * experts * dtypeBytes(dtype) +
      4 * (bias ? experts : 0) +
      4 * rounds * ids +
      (load ? 8 * ids : 0),
    writes: 8 * tokens * columns + (load ? 8 * ids : 0),
    recorded:
      table === undefined ? {} : peersAt(table, tokens, (column) => column.endsWith(` ${dtype}${suffix}`)),
    ...(shape.control === undefined ? {} : { control: `${shape.control} ${dtype}` }),
    prepare: (inputs) => (set) => {
      const logits = inputs.normal(dtype, [tokens, experts], set);
      // A permutation in every round, as a map of replicas is
      const map = Int32Array.from(
        { length: rounds * ids },
        (_, i) => ((i % ids) * 7 + Math.floor(i / ids)) % ids,
      );
      const given = {
        logits,
        ...(bias ? { bias: inputs.normal('f32', [experts], set + 1, 0.1) } : {}),
        ...(rounds > 0 ? { idMap: inputs.int32([rounds, ids], map) } : {}),
        ...(load ? { load: inputs.keep(inputs.context.tensor('i64', [ids])) } : {}),
      };
      return () => moeFusedGate(given, options);
    },
  };
}

const v3 = {
  scoring: 'sigmoid',
  groups: 8,
  topGroups: 4,
  topK: 8,
  renormalize: true,
  routedScalingFactor: 2.5,
} as const;
const v3Shared = { ...v3, sharedExperts: 1 } as const;

export const gateShapes = {
  v3: {
    name: '256/8/4/8 sigmoid',
    experts: 256,
    options: v3,
    bias: true,
    peers: { table: gate256 },
    control: 'gate 256/8/4/8',
  },
  v3Shared: {
    name: '256/8/4/8 sigmoid, 1 shared',
    experts: 256,
    options: v3Shared,
    bias: true,
    peers: { table: gate256, suffix: ' +1shared' },
  },
  v3Map: { name: '256/8/4/8, 1 shared, map of 16', experts: 256, options: v3Shared, bias: true, rounds: 16 },
  v3Load: {
    name: '256/8/4/8, 1 shared, map, load',
    experts: 256,
    options: v3Shared,
    bias: true,
    rounds: 16,
    load: true,
  },
  kimi: {
    name: '384/1/1/8 sigmoid',
    experts: 384,
    options: { scoring: 'sigmoid', topK: 8, renormalize: true, routedScalingFactor: 2.827 },
    bias: true,
    peers: { table: gate384 },
  },
  qwen3: {
    name: 'softmax 128 top 8',
    experts: 128,
    options: { topK: 8, renormalize: true },
    peers: { table: softmax128 },
  },
  softmax64: {
    name: 'softmax 64 top 6',
    experts: 64,
    options: { topK: 6, renormalize: true },
    peers: { table: softmax64 },
  },
  v2: { name: '160/8/3/6 softmax', experts: 160, options: { topK: 6, groups: 8, topGroups: 3 } },
  large: {
    name: '512/16/8/10 sigmoid',
    experts: 512,
    options: { ...v3, groups: 16, topGroups: 8, topK: 10 },
    bias: true,
  },
  largest: {
    name: '1024/1/1/32 sigmoid',
    experts: 1024,
    options: { scoring: 'sigmoid', topK: 32, renormalize: true },
    bias: true,
  },
  odd: { name: '60/1/1/4 softmax', experts: 60, options: { topK: 4 } },
} as const satisfies Record<string, GateShape>;

const few = [1, 8, 64, 512, 4096];
const sweepTokens = [5000, 10000, 15000, 20000, 25000, 30000, 35000, 40000];
const over = (shape: GateShape, dtype: FloatDType, tokens: readonly number[]) =>
  tokens.map((count) => gateCase(shape, count, dtype));

export const sweep: DeviceTable = {
  title: 'Gate 256/8/4/8 (sigmoid, bias, renormalised, scaled), 5,000 to 40,000 tokens',
  cases: [...over(gateShapes.v3, 'bf16', sweepTokens), ...over(gateShapes.v3, 'f32', sweepTokens)],
};

export const gates: DeviceTable = {
  title: 'Gates',
  cases: [
    ...over(gateShapes.v3, 'bf16', [...few, 131072]),
    ...over(gateShapes.v3, 'f32', [...few, 131072]),
    ...over(gateShapes.v3, 'f16', [64, 4096, 40000]),
    ...over(gateShapes.v3Shared, 'bf16', [1, 64, 512, 4096, 10000, 40000]),
    ...over(gateShapes.v3Shared, 'f32', [1, 4096, 40000]),
    ...over(gateShapes.v3Map, 'bf16', [1, 64, 512, 4096, 40000]),
    ...over(gateShapes.v3Load, 'bf16', [1, 64, 512, 4096, 40000]),
    ...over(gateShapes.kimi, 'f32', [1, 64, 512, 4096, 10000, 40000]),
    ...over(gateShapes.kimi, 'bf16', [40000]),
    ...over(gateShapes.qwen3, 'bf16', [1, 64, 512, 4096, 10000, 40000]),
    ...over(gateShapes.qwen3, 'f32', [40000]),
    ...over(gateShapes.softmax64, 'bf16', [1, 64, 512, 4096, 10000, 40000]),
    ...over(gateShapes.softmax64, 'f32', [40000]),
    ...[gateShapes.v2, gateShapes.large, gateShapes.largest, gateShapes.odd].flatMap((shape) =>
      over(shape, 'bf16', [64, 4096, 40000]),
    ),
  ],
};
