// The model families this package knows, one row each: where a layer's MoE tensors stand, how they are laid out, and
// what the gate does. A row says what transformers computes for the family; widths come from the tensors, so a row
// never repeats them. A new family is a new row here and nothing else.
import type { SwiGLU } from '../experts.js';
import { keys, type ModelConfig } from './config.js';

/** What the gate of a family does, in the words of moeFusedGate. */
export interface GateRules {
  readonly scoring: 'softmax' | 'sigmoid';
  readonly selection: 'score' | 'logits';
  readonly topK: number;
  readonly groups: number;
  readonly topGroups: number;
  readonly groupScore: 'max' | 'top2Sum';
  readonly renormalize: boolean;
  readonly routedScalingFactor: number;
}

/** Every expert has matrices of its own: `experts.7.gate_proj.weight`. Always [out, in]. */
export interface ListedExperts {
  readonly kind: 'listed';
  readonly gate: string;
  readonly up: string;
  readonly down: string;
}

/** One tensor holds all experts: `experts.gate_up_proj` [experts, ...]. */
export interface StackedExperts {
  readonly kind: 'stacked';
  readonly gateUp: string;
  readonly down: string;
  readonly gateUpBias?: string;
  readonly downBias?: string;
  /** Stored [in, out]. The row decides, since square matrices do not tell. */
  readonly transposed: boolean;
  readonly order: 'halves' | 'interleaved';
}

/** A dense MLP beside the routed experts. Names are relative to the block, or to the decoder layer. */
export interface SharedMlp {
  readonly at: 'block' | 'layer';
  /** Separate gate and up matrices, or one that holds gate rows, then up rows. */
  readonly gateUp: readonly [gate: string, up: string] | readonly [gateUp: string];
  readonly down: string;
}

export interface Architecture {
  /** The `model_type` of the family. */
  readonly name: string;
  /** Other model types whose MoE layer is the same. */
  readonly aliases?: readonly string[];
  /** What `architectures` calls it, up to "For...". */
  readonly classes: readonly string[];
  /** The name of the block inside a decoder layer: of checkpoints first, then of transformers 5 in memory. */
  readonly blocks: readonly string[];
  /** The router's weight, relative to the block and without `.weight`. */
  readonly routers: readonly string[];
  /** The router adds a bias to its logits. */
  readonly routerBias?: boolean;
  /** Score correction bias, relative to the block: the spellings of a tensor that must be there. */
  readonly correctionBias?: readonly string[];
  readonly experts: readonly (ListedExperts | StackedExperts)[];
  readonly shared?: SharedMlp;
  /** Weight of a sigmoid gate on the shared expert, relative to the block. */
  readonly sharedGate?: string;
  /** How many shared experts there are when the configuration does not say. */
  readonly sharedByDefault?: number | ((config: ModelConfig) => number);
  /** The router has columns for zero (identity) experts after the real ones. */
  readonly zeroExperts?: boolean;
  /** The weight multiplies an expert's input. */
  readonly weightsOnInput?: boolean;
  /** What recordings of this block hold, where its forward does more. */
  readonly recordedPart?: 'routed';
  /** Tensors of the block that compute nothing. */
  readonly unused?: RegExp;
  readonly gate: (config: ModelConfig) => GateRules;
  readonly swiglu?: (config: ModelConfig) => SwiGLU;
}

const projections: ListedExperts = { kind: 'listed', gate: 'gate_proj', up: 'up_proj', down: 'down_proj' };
const numbered: ListedExperts = { kind: 'listed', gate: 'w1', up: 'w3', down: 'w2' };
/** How transformers 5 holds experts in memory, and what `save_pretrained` writes without its conversion. */
const stacked: StackedExperts = {
  kind: 'stacked',
  gateUp: 'experts.gate_up_proj',
  down: 'experts.down_proj',
  transposed: false,
  order: 'halves',
};
const usual = [projections, stacked];

const sharedMlp = (name: string): SharedMlp => ({
  at: 'block',
  gateUp: [`${name}.gate_proj`, `${name}.up_proj`],
  down: `${name}.down_proj`,
});

/** Softmax over all experts, the k best of them. Renormalised or not as the family says or its config. */
function softmaxTopK(
  config: ModelConfig,
  renormalize: { fixed: boolean } | { fallback: boolean },
): GateRules {
  config.word(keys.scoring, ['softmax'], 'softmax');
  config.word(keys.selection, ['greedy'], 'greedy');
  config.fixed(keys.groups, 1);
  config.fixed(keys.topGroups, 1);
  config.fixed(keys.scalingFactor, 1);
  if ('fixed' in renormalize) config.fixed(keys.renormalize, renormalize.fixed);
  return {
    scoring: 'softmax',
    selection: 'score',
    topK: config.integer(keys.topK, { min: 1 }),
    groups: 1,
    topGroups: 1,
    groupScore: 'max',
    renormalize:
      'fixed' in renormalize ? renormalize.fixed : config.flag(keys.renormalize, renormalize.fallback),
    routedScalingFactor: 1,
  };
}

/** The k largest logits, weighed among themselves: softmax over the chosen, or each one's sigmoid. */
function logitsTopK(config: ModelConfig, scoring: 'softmax' | 'sigmoid'): GateRules {
  config.word(keys.scoring, [scoring], scoring);
  config.fixed(keys.groups, 1);
  config.fixed(keys.topGroups, 1);
  config.fixed(keys.scalingFactor, 1);
  config.fixed(keys.renormalize, scoring === 'softmax');
  return {
    scoring,
    selection: 'logits',
    topK: config.integer(keys.topK, { min: 1 }),
    groups: 1,
    topGroups: 1,
    groupScore: 'max',
    renormalize: false,
    routedScalingFactor: 1,
  };
}

interface BiasedSigmoidDefaults {
  readonly groups: number;
  readonly topGroups: number;
  readonly renormalize: boolean;
  readonly routedScalingFactor: number;
}

/** DeepSeek-V3's gate: sigmoid, chosen with a bias, groups by the sum of their two best, weighed without the bias. */
function biasedSigmoid(config: ModelConfig, defaults: BiasedSigmoidDefaults): GateRules {
  // dots.llm1 writes the name of the method into both keys.
  config.word(keys.scoring, ['sigmoid', 'noaux_tc'], 'sigmoid');
  config.word(keys.selection, ['noaux_tc'], 'noaux_tc');
  return {
    scoring: 'sigmoid',
    selection: 'score',
    topK: config.integer(keys.topK, { min: 1 }),
    // A key that is there but null says that there are no groups.
    groups: config.integer(keys.groups, {
      min: 1,
      fallback: config.mentions(keys.groups) ? 1 : defaults.groups,
    }),
    topGroups: config.integer(keys.topGroups, {
      min: 1,
      fallback: config.mentions(keys.topGroups) ? 1 : defaults.topGroups,
    }),
    groupScore: 'top2Sum',
    renormalize: config.flag(keys.renormalize, defaults.renormalize),
    routedScalingFactor: config.positive(keys.scalingFactor, defaults.routedScalingFactor),
  };
}

function deepseekV2Gate(config: ModelConfig): GateRules {
  config.word(keys.scoring, ['softmax'], 'softmax');
  const grouped =
    config.word(keys.selection, ['greedy', 'group_limited_greedy'], 'greedy') === 'group_limited_greedy';
  return {
    scoring: 'softmax',
    selection: 'score',
    topK: config.integer(keys.topK, { min: 1 }),
    groups: grouped ? config.integer(keys.groups, { min: 1 }) : 1,
    topGroups: grouped ? config.integer(keys.topGroups, { min: 1 }) : 1,
    groupScore: 'max',
    // transformers never renormalises here, whatever norm_topk_prob says; all published checkpoints say false.
    renormalize: false,
    routedScalingFactor: config.positive(keys.scalingFactor, 1),
  };
}

/** Every family, by name. */
export const architectures: readonly Architecture[] = [
  {
    name: 'deepseek_v2',
    classes: ['DeepseekV2'],
    blocks: ['mlp'],
    routers: ['gate'],
    experts: usual,
    shared: sharedMlp('shared_experts'),
    sharedByDefault: 2,
    gate: deepseekV2Gate,
  },
  {
    name: 'deepseek_v3',
    aliases: ['kimi_k2', 'deepseek_v32'],
    classes: ['DeepseekV3', 'DeepseekV32', 'KimiK2'],
    blocks: ['mlp'],
    routers: ['gate'],
    correctionBias: ['gate.e_score_correction_bias'],
    experts: usual,
    shared: sharedMlp('shared_experts'),
    sharedByDefault: 1,
    gate: (config) =>
      biasedSigmoid(config, { groups: 8, topGroups: 4, renormalize: true, routedScalingFactor: 2.5 }),
  },
  {
    name: 'glm4_moe',
    classes: ['Glm4Moe'],
    blocks: ['mlp'],
    routers: ['gate'],
    correctionBias: ['gate.e_score_correction_bias'],
    experts: usual,
    shared: sharedMlp('shared_experts'),
    sharedByDefault: 1,
    gate: (config) =>
      biasedSigmoid(config, { groups: 1, topGroups: 1, renormalize: true, routedScalingFactor: 1 }),
  },
  {
    name: 'dots1',
    classes: ['Dots1'],
    blocks: ['mlp'],
    routers: ['gate'],
    correctionBias: ['gate.e_score_correction_bias'],
    experts: usual,
    shared: sharedMlp('shared_experts'),
    gate: (config) =>
      biasedSigmoid(config, { groups: 1, topGroups: 1, renormalize: false, routedScalingFactor: 1 }),
  },
  {
    name: 'ernie4_5_moe',
    classes: ['Ernie4_5_Moe', 'Ernie4_5Moe'],
    blocks: ['mlp'],
    routers: ['gate'],
    correctionBias: ['moe_statics.e_score_correction_bias', 'gate.moe_statics.e_score_correction_bias'],
    experts: usual,
    shared: sharedMlp('shared_experts'),
    sharedByDefault: 2,
    gate: (config) => softmaxTopK(config, { fixed: true }),
  },
  {
    name: 'longcat_flash',
    classes: ['LongcatFlash'],
    blocks: ['mlp'],
    routers: ['router.classifier'],
    correctionBias: ['router.e_score_correction_bias'],
    experts: usual,
    zeroExperts: true,
    // save_pretrained splits a stack that has rows for the zero experts too; nobody computes with them.
    unused: /^experts\.\d+\.(gate|up)_proj\.weight$/,
    gate: (config) => {
      config.word(keys.scoring, ['softmax'], 'softmax');
      config.word(['zero_expert_type'], ['identity'], 'identity');
      config.fixed(['router_bias'], false);
      config.fixed(keys.renormalize, false);
      config.fixed(keys.groups, 1);
      config.fixed(keys.topGroups, 1);
      return {
        scoring: 'softmax',
        selection: 'score',
        topK: config.integer(keys.topK, { min: 1 }),
        groups: 1,
        topGroups: 1,
        groupScore: 'max',
        renormalize: false,
        routedScalingFactor: config.positive(keys.scalingFactor, 6),
      };
    },
  },
  {
    name: 'gpt_oss',
    classes: ['GptOss'],
    blocks: ['mlp'],
    routers: ['router'],
    routerBias: true,
    experts: [
      {
        kind: 'stacked',
        gateUp: 'experts.gate_up_proj',
        down: 'experts.down_proj',
        gateUpBias: 'experts.gate_up_proj_bias',
        downBias: 'experts.down_proj_bias',
        transposed: true,
        order: 'interleaved',
      },
    ],
    gate: (config) => logitsTopK(config, 'softmax'),
    swiglu: (config) => ({ alpha: 1.702, beta: 1, limit: config.positive(keys.swigluLimit, 7) }),
  },
  {
    name: 'qwen2_moe',
    classes: ['Qwen2Moe'],
    blocks: ['mlp'],
    routers: ['gate'],
    experts: usual,
    shared: sharedMlp('shared_expert'),
    sharedGate: 'shared_expert_gate',
    sharedByDefault: 1,
    gate: (config) => softmaxTopK(config, { fallback: false }),
  },
  {
    name: 'qwen3_moe',
    classes: ['Qwen3Moe'],
    blocks: ['mlp'],
    routers: ['gate'],
    experts: usual,
    gate: (config) => softmaxTopK(config, { fallback: false }),
  },
  {
    name: 'qwen3_next',
    classes: ['Qwen3Next'],
    blocks: ['mlp'],
    routers: ['gate'],
    experts: usual,
    shared: sharedMlp('shared_expert'),
    sharedGate: 'shared_expert_gate',
    sharedByDefault: 1,
    gate: (config) => softmaxTopK(config, { fallback: true }),
  },
  {
    name: 'mixtral',
    classes: ['Mixtral'],
    blocks: ['block_sparse_moe', 'mlp'],
    routers: ['gate'],
    experts: [numbered, ...usual],
    gate: (config) => softmaxTopK(config, { fixed: true }),
  },
  {
    name: 'olmoe',
    classes: ['Olmoe'],
    blocks: ['mlp'],
    routers: ['gate'],
    experts: usual,
    gate: (config) => softmaxTopK(config, { fallback: false }),
  },
  {
    name: 'minimax_m2',
    classes: ['MiniMaxM2'],
    blocks: ['block_sparse_moe', 'mlp'],
    routers: ['gate'],
    correctionBias: ['e_score_correction_bias', 'gate.e_score_correction_bias'],
    experts: [numbered, ...usual],
    gate: (config) => {
      config.fixed(keys.renormalize, true);
      config.fixed(keys.groups, 1);
      config.fixed(keys.topGroups, 1);
      config.fixed(keys.scalingFactor, 1);
      config.fixed(['use_routing_bias'], true);
      config.fixed(['shared_intermediate_size'], 0);
      return biasedSigmoid(config, { groups: 1, topGroups: 1, renormalize: true, routedScalingFactor: 1 });
    },
  },
  {
    name: 'llama4_text',
    aliases: ['llama4'],
    classes: ['Llama4'],
    blocks: ['feed_forward'],
    routers: ['router'],
    experts: [{ ...stacked, transposed: true }],
    shared: sharedMlp('shared_expert'),
    sharedByDefault: 1,
    weightsOnInput: true,
    gate: (config) => logitsTopK(config, 'sigmoid'),
  },
  {
    name: 'hunyuan_v1_moe',
    classes: ['HunYuanMoEV1'],
    blocks: ['mlp'],
    routers: ['gate.wg'],
    experts: usual,
    shared: sharedMlp('shared_mlp'),
    sharedByDefault: 1,
    gate: (config) => softmaxTopK(config, { fixed: true }),
  },
  {
    name: 'granitemoeshared',
    aliases: ['granitemoe'],
    classes: ['GraniteMoeShared', 'GraniteMoe'],
    blocks: ['block_sparse_moe'],
    routers: ['router.layer', 'router'],
    experts: [{ ...stacked, gateUp: 'input_linear.weight', down: 'output_linear.weight' }, stacked],
    // Beside the block in the decoder layer, which adds the two.
    shared: { at: 'layer', gateUp: ['shared_mlp.input_linear'], down: 'shared_mlp.output_linear' },
    sharedByDefault: (config) => (config.integer(['shared_intermediate_size'], { fallback: 0 }) > 0 ? 1 : 0),
    recordedPart: 'routed',
    gate: (config) => logitsTopK(config, 'softmax'),
  },
];

/** Every `model_type` that is understood, for messages. */
export const architectureNames: readonly string[] = architectures
  .flatMap(({ name, aliases = [] }) => [name, ...aliases])
  .sort();

export function architectureOf(modelType: string): Architecture | undefined {
  return architectures.find(({ name, aliases }) => name === modelType || aliases?.includes(modelType));
}

/** The family of a class name such as `DeepseekV3ForCausalLM`. */
export function architectureOfClass(className: string): Architecture | undefined {
  const stem = className.replace(/(For[A-Z].*|Model)$/, '');
  return architectures.find(({ classes }) => classes.includes(stem));
}
