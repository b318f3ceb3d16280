// Checkpoints of any size in the naming of any family, written with the expected output of a forward that shares no
// code with the package: plain loops in f64 over the values that were written.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type TensorToWrite, writeSafetensors } from '../../lib/model/safetensors_write.js';

export interface Sizes {
  hidden: number;
  intermediate: number;
  experts: number;
  topK: number;
  /** Shared experts, or for families with a shared width of its own: that width. */
  shared: number;
  tokens: number;
  seed: number;
  layers: number[];
  prefix?: string;
  shards?: number;
  /** Store experts as transformers 5 holds them in memory. */
  inMemory?: boolean;
}

interface Matrix {
  rows: number;
  columns: number;
  data: Float32Array;
}

interface Mlp {
  gate: Matrix;
  up: Matrix;
  down: Matrix;
  bias?: { gate: Float32Array; up: Float32Array; down: Float32Array };
}

type Gate = (logits: number[], bias: Float32Array | undefined, sizes: Sizes) => Map<number, number>;

interface Family {
  modelType: string;
  block: string;
  router: string;
  routerBias?: boolean;
  correctionBias?: string;
  experts: 'projections' | 'numbered' | 'granite' | 'gptOss' | 'llama4';
  shared?: { name: string; joined?: boolean; gate?: string; width: (sizes: Sizes) => number };
  zeroExperts?: number;
  onInput?: boolean;
  gate: Gate;
  /** The configuration in the spelling before transformers 5, and in that of transformers 5. */
  config: (sizes: Sizes) => [before: object, after: object];
}

const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
const softmax = (logits: number[]): number[] => {
  const top = Math.max(...logits);
  const e = logits.map((x) => Math.exp(x - top));
  const sum = e.reduce((a, b) => a + b);
  return e.map((x) => x / sum);
};
const best = (scores: number[], k: number, among = scores.map((_, i) => i)): number[] =>
  [...among].sort((a, b) => scores[b] - scores[a] || a - b).slice(0, k);
const normalised = (weights: Map<number, number>): Map<number, number> => {
  const sum = [...weights.values()].reduce((a, b) => a + b);
  return new Map([...weights].map(([id, w]) => [id, w / sum]));
};
const scaled = (weights: Map<number, number>, s: number) =>
  new Map([...weights].map(([id, w]) => [id, w * s]));

function softmaxGate({
  renormalize,
  biased = false,
  s = 1,
}: {
  renormalize: boolean;
  biased?: boolean;
  s?: number;
}): Gate {
  return (logits, bias, { topK }) => {
    const scores = softmax(logits);
    const ids = best(biased ? scores.map((x, i) => x + bias![i]) : scores, topK);
    const weights = new Map(ids.map((id) => [id, scores[id]]));
    return scaled(renormalize ? normalised(weights) : weights, s);
  };
}

function groupedGate(o: {
  groups: number;
  topGroups: number;
  sigmoid: boolean;
  renormalize: boolean;
  s: number;
}): Gate {
  return (logits, bias, { topK }) => {
    const scores = o.sigmoid ? logits.map(sigmoid) : softmax(logits);
    const choice = bias === undefined ? scores : scores.map((x, i) => x + bias[i]);
    const width = logits.length / o.groups;
    const members = Array.from({ length: o.groups }, (_, g) =>
      Array.from({ length: width }, (_, i) => g * width + i),
    );
    const groupScores = members.map((ids) =>
      best(choice, o.sigmoid ? 2 : 1, ids).reduce((sum, id) => sum + choice[id], 0),
    );
    const eligible = best(groupScores, o.topGroups).flatMap((g) => members[g]);
    const weights = new Map(best(choice, topK, eligible).map((id) => [id, scores[id]]));
    return scaled(o.renormalize ? normalised(weights) : weights, o.s);
  };
}

const chosenLogits =
  (weigh: (logits: number[]) => number[]): Gate =>
  (logits, _bias, { topK }) => {
    const ids = best(logits, topK);
    const weights = weigh(ids.map((id) => logits[id]));
    return new Map(ids.map((id, i) => [id, weights[i]]));
  };

const multiple = ({ shared, intermediate }: Sizes) => shared * intermediate;
const ownWidth = ({ shared }: Sizes) => shared;
const deepseek =
  (more: object) =>
  ({ experts, topK, shared }: Sizes) => ({
    n_routed_experts: experts,
    num_experts_per_tok: topK,
    n_shared_experts: shared,
    ...more,
  });

/** Every family, described a second time and independently of lib/model. */
export const families: Record<string, Family> = {
  deepseek_v2: {
    modelType: 'deepseek_v2',
    block: 'mlp',
    router: 'gate.weight',
    experts: 'projections',
    shared: { name: 'shared_experts', width: multiple },
    gate: groupedGate({ groups: 3, topGroups: 2, sigmoid: false, renormalize: false, s: 4.5 }),
    config: (sizes) => {
      const rest = {
        n_group: 3,
        topk_group: 2,
        topk_method: 'group_limited_greedy',
        routed_scaling_factor: 4.5,
      };
      const after = deepseek(rest)(sizes);
      return [{ ...after, scoring_func: 'softmax', norm_topk_prob: false }, after];
    },
  },
  deepseek_v3: {
    modelType: 'deepseek_v3',
    block: 'mlp',
    router: 'gate.weight',
    correctionBias: 'gate.e_score_correction_bias',
    experts: 'projections',
    shared: { name: 'shared_experts', width: multiple },
    gate: groupedGate({ groups: 3, topGroups: 2, sigmoid: true, renormalize: true, s: 2.5 }),
    config: (sizes) => {
      const after = deepseek({ n_group: 3, topk_group: 2, norm_topk_prob: true })(sizes);
      return [
        { ...after, scoring_func: 'sigmoid', topk_method: 'noaux_tc', routed_scaling_factor: 2.5 },
        after,
      ];
    },
  },
  kimi_k2: {
    modelType: 'kimi_k2',
    block: 'mlp',
    router: 'gate.weight',
    correctionBias: 'gate.e_score_correction_bias',
    experts: 'projections',
    shared: { name: 'shared_experts', width: multiple },
    gate: groupedGate({ groups: 1, topGroups: 1, sigmoid: true, renormalize: true, s: 2.827 }),
    config: (sizes) => {
      const after = deepseek({
        n_group: 1,
        topk_group: 1,
        norm_topk_prob: true,
        routed_scaling_factor: 2.827,
      })(sizes);
      const { n_routed_experts, ...rest } = after;
      return [
        { ...after, scoring_func: 'sigmoid', topk_method: 'noaux_tc' },
        { ...rest, num_local_experts: n_routed_experts },
      ];
    },
  },
  glm4_moe: {
    modelType: 'glm4_moe',
    block: 'mlp',
    router: 'gate.weight',
    correctionBias: 'gate.e_score_correction_bias',
    experts: 'projections',
    shared: { name: 'shared_experts', width: multiple },
    gate: groupedGate({ groups: 1, topGroups: 1, sigmoid: true, renormalize: true, s: 1.5 }),
    config: (sizes) => {
      const after = deepseek({ routed_scaling_factor: 1.5 })(sizes);
      return [{ ...after, n_group: 1, topk_group: 1, norm_topk_prob: true }, after];
    },
  },
  dots1: {
    modelType: 'dots1',
    block: 'mlp',
    router: 'gate.weight',
    correctionBias: 'gate.e_score_correction_bias',
    experts: 'projections',
    shared: { name: 'shared_experts', width: multiple },
    gate: groupedGate({ groups: 1, topGroups: 1, sigmoid: true, renormalize: false, s: 2.5 }),
    config: (sizes) => {
      const after = deepseek({ routed_scaling_factor: 2.5 })(sizes);
      return [{ ...after, scoring_func: 'noaux_tc', topk_method: 'noaux_tc', norm_topk_prob: false }, after];
    },
  },
  ernie4_5_moe: {
    modelType: 'ernie4_5_moe',
    block: 'mlp',
    router: 'gate.weight',
    correctionBias: 'moe_statics.e_score_correction_bias',
    experts: 'projections',
    shared: { name: 'shared_experts', width: multiple },
    gate: softmaxGate({ renormalize: true, biased: true }),
    config: ({ experts, topK, shared }) => [
      { moe_num_experts: experts, moe_k: topK, moe_num_shared_experts: shared },
      { num_experts: experts, num_experts_per_tok: topK, moe_num_shared_experts: shared },
    ],
  },
  longcat_flash: {
    modelType: 'longcat_flash',
    block: 'mlp',
    router: 'router.classifier.weight',
    correctionBias: 'router.e_score_correction_bias',
    experts: 'projections',
    zeroExperts: 5,
    gate: softmaxGate({ renormalize: false, biased: true, s: 6 }),
    config: ({ experts, topK }) => [
      {
        n_routed_experts: experts,
        moe_topk: topK,
        zero_expert_num: 5,
        zero_expert_type: 'identity',
        router_bias: false,
      },
      { num_local_experts: experts, num_experts_per_tok: topK, zero_expert_num: 5, routed_scaling_factor: 6 },
    ],
  },
  gpt_oss: {
    modelType: 'gpt_oss',
    block: 'mlp',
    router: 'router.weight',
    routerBias: true,
    experts: 'gptOss',
    gate: chosenLogits(softmax),
    config: ({ experts, topK }) => [
      { num_local_experts: experts, experts_per_token: topK, num_experts_per_tok: topK, swiglu_limit: 7.0 },
      { num_local_experts: experts, num_experts_per_tok: topK },
    ],
  },
  qwen2_moe: {
    modelType: 'qwen2_moe',
    block: 'mlp',
    router: 'gate.weight',
    experts: 'projections',
    shared: { name: 'shared_expert', gate: 'shared_expert_gate.weight', width: ownWidth },
    gate: softmaxGate({ renormalize: false }),
    config: ({ experts, topK, shared }) => [
      {
        num_experts: experts,
        num_experts_per_tok: topK,
        norm_topk_prob: false,
        shared_expert_intermediate_size: shared,
      },
      { num_local_experts: experts, num_experts_per_tok: topK, shared_expert_intermediate_size: shared },
    ],
  },
  qwen3_moe: {
    modelType: 'qwen3_moe',
    block: 'mlp',
    router: 'gate.weight',
    experts: 'projections',
    gate: softmaxGate({ renormalize: true }),
    config: ({ experts, topK }) => [
      { num_experts: experts, num_experts_per_tok: topK, norm_topk_prob: true },
      { num_local_experts: experts, num_experts_per_tok: topK, norm_topk_prob: true },
    ],
  },
  qwen3_next: {
    modelType: 'qwen3_next',
    block: 'mlp',
    router: 'gate.weight',
    experts: 'projections',
    shared: { name: 'shared_expert', gate: 'shared_expert_gate.weight', width: ownWidth },
    gate: softmaxGate({ renormalize: true }),
    config: ({ experts, topK }) => [
      { num_experts: experts, num_experts_per_tok: topK, norm_topk_prob: true },
      { num_local_experts: experts, num_experts_per_tok: topK },
    ],
  },
  mixtral: {
    modelType: 'mixtral',
    block: 'block_sparse_moe',
    router: 'gate.weight',
    experts: 'numbered',
    gate: softmaxGate({ renormalize: true }),
    config: ({ experts, topK }) => [
      { num_local_experts: experts, num_experts_per_tok: topK },
      { num_experts: experts, num_experts_per_tok: topK },
    ],
  },
  olmoe: {
    modelType: 'olmoe',
    block: 'mlp',
    router: 'gate.weight',
    experts: 'projections',
    gate: softmaxGate({ renormalize: false }),
    config: ({ experts, topK }) => [
      { num_experts: experts, num_experts_per_tok: topK, norm_topk_prob: false },
      { num_local_experts: experts, num_experts_per_tok: topK },
    ],
  },
  minimax_m2: {
    modelType: 'minimax_m2',
    block: 'block_sparse_moe',
    router: 'gate.weight',
    correctionBias: 'e_score_correction_bias',
    experts: 'numbered',
    gate: groupedGate({ groups: 1, topGroups: 1, sigmoid: true, renormalize: true, s: 1 }),
    config: ({ experts, topK }) => [
      {
        num_local_experts: experts,
        num_experts_per_tok: topK,
        scoring_func: 'sigmoid',
        use_routing_bias: true,
      },
      { num_experts: experts, num_experts_per_tok: topK },
    ],
  },
  llama4_text: {
    modelType: 'llama4_text',
    block: 'feed_forward',
    router: 'router.weight',
    experts: 'llama4',
    shared: { name: 'shared_expert', width: multiple },
    onInput: true,
    gate: chosenLogits((logits) => logits.map(sigmoid)),
    config: ({ experts, topK }) => [
      { num_local_experts: experts, num_experts_per_tok: topK },
      { num_experts: experts, num_experts_per_tok: topK },
    ],
  },
  hunyuan_v1_moe: {
    modelType: 'hunyuan_v1_moe',
    block: 'mlp',
    router: 'gate.wg.weight',
    experts: 'projections',
    shared: { name: 'shared_mlp', width: multiple },
    gate: softmaxGate({ renormalize: true }),
    config: ({ experts, topK, shared }) => [
      {
        num_experts: Array(9).fill(experts),
        moe_topk: Array(9).fill(topK),
        num_shared_expert: Array(9).fill(shared),
        norm_topk_prob: true,
        n_group: false,
        routed_scaling_factor: false,
      },
      { num_experts: experts, moe_topk: topK, moe_intermediate_size: 3 },
    ],
  },
  granitemoeshared: {
    modelType: 'granitemoeshared',
    block: 'block_sparse_moe',
    router: 'router.layer.weight',
    experts: 'granite',
    shared: { name: '../shared_mlp', joined: true, width: multiple },
    gate: chosenLogits(softmax),
    config: ({ experts, topK, shared, intermediate }) => [
      {
        num_local_experts: experts,
        num_experts_per_tok: topK,
        shared_intermediate_size: shared * intermediate,
      },
      { num_experts: experts, num_experts_per_tok: topK, shared_intermediate_size: shared * intermediate },
    ],
  },
};

/** A stable generator (mulberry32) of roughly normal numbers. */
export function normals(seed: number): () => number {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

export interface Written {
  block: string;
  layer: number;
  input: Float32Array;
  expected: Float64Array;
  expectedRouted: Float64Array;
  /** The chosen experts of each token, ascending. */
  ids: string[];
}

/** Writes a checkpoint and returns, per layer, an input with what must come out. */
export async function writeCheckpoint(
  dir: string,
  family: Family,
  sizes: Sizes,
  spelling: 'before' | 'after' = 'after',
): Promise<Written[]> {
  const next = normals(sizes.seed);
  const tensors: Record<string, TensorToWrite> = {};
  const written = sizes.layers.map((layer) => addLayer(tensors, family, sizes, layer, next));
  mkdirSync(dir, { recursive: true });
  const [before, after] = family.config(sizes);
  const config = {
    model_type: family.modelType,
    hidden_act: 'silu',
    ...(spelling === 'before' ? before : after),
  };
  writeFileSync(join(dir, 'config.json'), JSON.stringify(config));
  const names = Object.keys(tensors);
  const shards = sizes.shards ?? 1;
  if (shards === 1) {
    await writeSafetensors(join(dir, 'model.safetensors'), tensors, { format: 'pt' });
    return written;
  }
  const map: Record<string, string> = {};
  for (let shard = 0; shard < shards; shard++) {
    const file = `model-0000${shard + 1}-of-0000${shards}.safetensors`;
    const mine = names.filter((_, i) => i % shards === shard);
    for (const name of mine) map[name] = file;
    await writeSafetensors(join(dir, file), Object.fromEntries(mine.map((name) => [name, tensors[name]])));
  }
  writeFileSync(join(dir, 'model.safetensors.index.json'), JSON.stringify({ metadata: {}, weight_map: map }));
  return written;
}

function addLayer(
  tensors: Record<string, TensorToWrite>,
  family: Family,
  sizes: Sizes,
  layer: number,
  next: () => number,
): Written {
  const { hidden, intermediate, experts, tokens } = sizes;
  const block = `${sizes.prefix ?? 'model.'}layers.${layer}.${family.block}`;
  const vector = (length: number, scale = 1) => Float32Array.from({ length }, () => next() * scale);
  const matrix = (rows: number, columns: number): Matrix => ({
    rows,
    columns,
    data: vector(rows * columns, 0.3),
  });
  const mlp = (width: number, biased = false): Mlp => ({
    gate: matrix(width, hidden),
    up: matrix(width, hidden),
    down: matrix(hidden, width),
    ...(biased && { bias: { gate: vector(width), up: vector(width), down: vector(hidden) } }),
  });
  const put = (name: string, shape: number[], data: Float32Array) => {
    const full = name.startsWith('../')
      ? `${block.slice(0, block.lastIndexOf('.'))}.${name.slice(3)}`
      : `${block}.${name}`;
    tensors[full] = { dtype: 'f32', shape, data };
  };
  const putMatrix = (name: string, { rows, columns, data }: Matrix) => put(name, [rows, columns], data);

  const columns = experts + (family.zeroExperts ?? 0);
  const router = matrix(columns, hidden);
  putMatrix(family.router, router);
  const routerBias = family.routerBias ? vector(columns) : undefined;
  if (routerBias !== undefined) put('router.bias', [columns], routerBias);
  const bias = family.correctionBias === undefined ? undefined : vector(columns, 0.05);
  if (bias !== undefined) {
    put(family.correctionBias!, family.modelType === 'ernie4_5_moe' ? [1, columns] : [columns], bias);
  }
  const routed = Array.from({ length: experts }, () => mlp(intermediate, family.experts === 'gptOss'));
  putExperts(family, sizes, routed, put, putMatrix);

  let shared: Mlp | undefined;
  let sharedGate: Float32Array | undefined;
  if (family.shared !== undefined && sizes.shared > 0) {
    const { name, joined, gate, width } = family.shared;
    shared = mlp(width(sizes));
    if (joined) {
      putMatrix(`${name}.input_linear.weight`, stackRows([shared.gate, shared.up]));
      putMatrix(`${name}.output_linear.weight`, shared.down);
    } else {
      for (const part of ['gate', 'up', 'down'] as const)
        putMatrix(`${name}.${part}_proj.weight`, shared[part]);
    }
    if (gate !== undefined) {
      sharedGate = vector(hidden, 0.3);
      put(gate, [1, hidden], sharedGate);
    }
  }

  const input = vector(tokens * hidden);
  const expected = new Float64Array(tokens * hidden);
  const expectedRouted = new Float64Array(tokens * hidden);
  const ids: string[] = [];
  for (let t = 0; t < tokens; t++) {
    const x = Array.from(input.subarray(t * hidden, (t + 1) * hidden));
    const logits = times(router, x).map((v, e) => v + (routerBias?.[e] ?? 0));
    const weights = family.gate(logits, bias, sizes);
    ids.push([...weights.keys()].sort((a, b) => a - b).join(' '));
    const out = new Array<number>(hidden).fill(0);
    for (const [id, w] of weights) {
      const y =
        id >= experts
          ? x
          : run(routed[id], family.onInput ? x.map((v) => v * w) : x, family.experts === 'gptOss');
      for (let h = 0; h < hidden; h++) out[h] += family.onInput ? y[h] : y[h] * w;
    }
    expectedRouted.set(out, t * hidden);
    if (shared !== undefined) {
      const scale =
        sharedGate === undefined ? 1 : sigmoid(x.reduce((sum, v, h) => sum + v * sharedGate[h], 0));
      for (const [h, v] of run(shared, x, false).entries()) out[h] += scale * v;
    }
    expected.set(out, t * hidden);
  }
  return { block, layer, input, expected, expectedRouted, ids };
}

function putExperts(
  family: Family,
  { hidden, intermediate, experts, inMemory }: Sizes,
  routed: Mlp[],
  put: (name: string, shape: number[], data: Float32Array) => void,
  putMatrix: (name: string, matrix: Matrix) => void,
): void {
  const stack = (name: string, matrices: Matrix[]) => {
    const [{ rows, columns }] = matrices;
    put(name, [matrices.length, rows, columns], stackRows(matrices).data);
  };
  const joined = routed.map(({ gate, up }) => stackRows([gate, up]));
  const down = routed.map((mlp) => mlp.down);
  if (family.experts === 'gptOss') {
    const interleaved = routed.map(({ gate, up }) => interleaveRows(gate, up));
    stack('experts.gate_up_proj', interleaved.map(transpose));
    stack('experts.down_proj', down.map(transpose));
    const biases = routed.flatMap(({ bias }) => Array.from(bias!.gate, (g, i) => [g, bias!.up[i]]).flat());
    put('experts.gate_up_proj_bias', [experts, 2 * intermediate], Float32Array.from(biases));
    put(
      'experts.down_proj_bias',
      [experts, hidden],
      Float32Array.from(routed.flatMap(({ bias }) => [...bias!.down])),
    );
  } else if (family.experts === 'llama4') {
    stack('experts.gate_up_proj', joined.map(transpose));
    stack('experts.down_proj', down.map(transpose));
  } else if (inMemory) {
    stack('experts.gate_up_proj', joined);
    stack('experts.down_proj', down);
  } else if (family.experts === 'granite') {
    stack('input_linear.weight', joined);
    stack('output_linear.weight', down);
  } else {
    const names = family.experts === 'numbered' ? ['w1', 'w3', 'w2'] : ['gate_proj', 'up_proj', 'down_proj'];
    for (const [e, { gate, up, down }] of routed.entries()) {
      for (const [i, part] of [gate, up, down].entries()) putMatrix(`experts.${e}.${names[i]}.weight`, part);
    }
  }
}

function stackRows(matrices: Matrix[]): Matrix {
  const [{ columns }] = matrices;
  const rows = matrices.reduce((sum, matrix) => sum + matrix.rows, 0);
  const data = new Float32Array(rows * columns);
  let at = 0;
  for (const matrix of matrices) {
    data.set(matrix.data, at);
    at += matrix.data.length;
  }
  return { rows, columns, data };
}

function interleaveRows(a: Matrix, b: Matrix): Matrix {
  const { rows, columns } = a;
  const data = new Float32Array(2 * rows * columns);
  for (let row = 0; row < rows; row++) {
    data.set(a.data.subarray(row * columns, (row + 1) * columns), 2 * row * columns);
    data.set(b.data.subarray(row * columns, (row + 1) * columns), (2 * row + 1) * columns);
  }
  return { rows: 2 * rows, columns, data };
}

function transpose({ rows, columns, data }: Matrix): Matrix {
  const out = new Float32Array(data.length);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) out[c * rows + r] = data[r * columns + c];
  return { rows: columns, columns: rows, data: out };
}

function times({ rows, columns, data }: Matrix, x: number[]): number[] {
  return Array.from({ length: rows }, (_, r) => {
    let sum = 0;
    for (let c = 0; c < columns; c++) sum += data[r * columns + c] * x[c];
    return sum;
  });
}

function run({ gate, up, down, bias }: Mlp, x: number[], gptOss: boolean): number[] {
  const g = times(gate, x).map((v, i) => v + (bias?.gate[i] ?? 0));
  const u = times(up, x).map((v, i) => v + (bias?.up[i] ?? 0));
  const h = g.map((v, i) => {
    if (!gptOss) return v * sigmoid(v) * u[i];
    const clamped = Math.min(v, 7);
    return (Math.min(Math.max(u[i], -7), 7) + 1) * clamped * sigmoid(1.702 * clamped);
  });
  return times(down, h).map((v, i) => v + (bias?.down[i] ?? 0));
}
