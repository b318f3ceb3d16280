// What a checkpoint is taken for: spellings of config.json, refusals by name, layers found, layers that are not there.
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, describe, expect, test } from 'vitest';
import { architectureNames } from '../../lib/model/architectures.js';
import { openCheckpoint } from '../../lib/model/checkpoint.js';
import { readSafetensors } from '../../lib/model/safetensors.js';
import { type TensorToWrite, writeSafetensors } from '../../lib/model/safetensors_write.js';
import { families, type Sizes, writeCheckpoint } from './synthetic_checkpoint.js';

const fixtures = fileURLToPath(new URL('../fixtures/hf', import.meta.url));
const scratch = mkdtempSync(join(tmpdir(), 'moe-checkpoint-'));
afterAll(() => rmSync(scratch, { recursive: true }));
let folders = 0;

type Config = Record<string, unknown>;
const configOf = (fixture: string): Config =>
  JSON.parse(readFileSync(join(fixtures, fixture, 'config.json'), 'utf8'));

/** A fixture with its configuration changed (undefined removes a key). */
function variant(fixture: string, change: Config | ((config: Config) => unknown)): string {
  const dir = join(scratch, `${folders++}`);
  mkdirSync(dir);
  const config = configOf(fixture);
  const changed = typeof change === 'function' ? change(config) : { ...config, ...change };
  writeFileSync(join(dir, 'config.json'), typeof changed === 'string' ? changed : JSON.stringify(changed));
  copyFileSync(join(fixtures, fixture, 'model.safetensors'), join(dir, 'model.safetensors'));
  return dir;
}

/** A fixture with its tensors changed. */
async function retensored(
  fixture: string,
  change: (tensors: Record<string, TensorToWrite>) => void,
): Promise<string> {
  const dir = variant(fixture, {});
  const tensors = (await readSafetensors(join(fixtures, fixture))) as Record<string, TensorToWrite>;
  change(tensors);
  await writeSafetensors(join(dir, 'model.safetensors'), tensors);
  return dir;
}

async function planOf(dir: string, layer = 1) {
  await using checkpoint = await openCheckpoint(dir);
  return await checkpoint.plan(layer);
}

const refused = (work: () => Promise<unknown>, message: RegExp, code = 'ERR_MOE_CHECKPOINT') =>
  expect(work()).rejects.toThrow(expect.objectContaining({ code, message: expect.stringMatching(message) }));

describe('configuration', () => {
  const spellings: [fixture: string, change: Config, gate: object][] = [
    [
      'deepseek_v3',
      {},
      { scoring: 'sigmoid', groups: 8, topGroups: 4, renormalize: true, routedScalingFactor: 2.5 },
    ],
    ['deepseek_v3', { scoring_func: 'sigmoid', topk_method: 'noaux_tc' }, { topK: 8, groupScore: 'top2Sum' }],
    ['deepseek_v3', { n_routed_experts: undefined, num_local_experts: 32 }, { topK: 8 }],
    ['deepseek_v3', { model_type: undefined }, { scoring: 'sigmoid' }],
    ['deepseek_v3', { architectures: undefined }, { scoring: 'sigmoid' }],
    ['deepseek_v3', { model_type: 'deepseek_v32', architectures: ['DeepseekV32ForCausalLM'] }, { groups: 8 }],
    ['deepseek_v3', { norm_topk_prob: false }, { renormalize: false }],
    ['kimi_like', { model_type: 'kimi_k2' }, { groups: 1, routedScalingFactor: 2.827 }],
    [
      'deepseek_v2',
      { scoring_func: 'softmax' },
      { groups: 4, topGroups: 2, groupScore: 'max', renormalize: false },
    ],
    ['deepseek_v2_lite', { n_group: 4 }, { groups: 1, topGroups: 1 }],
    ['glm4_moe', { norm_topk_prob: undefined, routed_scaling_factor: undefined }, { renormalize: true }],
    ['dots1', { scoring_func: 'noaux_tc', norm_topk_prob: undefined }, { renormalize: false }],
    [
      'ernie4_5_moe',
      { moe_k: undefined, num_experts_per_tok: 4 },
      { scoring: 'softmax', renormalize: true, topK: 4 },
    ],
    ['longcat_flash', { zero_expert_type: 'identity' }, { renormalize: false, routedScalingFactor: 6 }],
    [
      'gpt_oss',
      { num_local_experts: undefined, num_experts: 16 },
      { scoring: 'softmax', selection: 'logits' },
    ],
    ['qwen2_moe', { norm_topk_prob: undefined }, { renormalize: false }],
    ['qwen3_next', { norm_topk_prob: undefined }, { renormalize: true }],
    ['olmoe', { norm_topk_prob: true }, { renormalize: true }],
    [
      'minimax_m2',
      { scoring_func: 'sigmoid', num_local_experts: 16, num_experts: 16 },
      { renormalize: true },
    ],
    ['hunyuan_v1_moe', { moe_topk: [1, 2], num_experts: [8, 8], num_shared_expert: [1, 1] }, { topK: 2 }],
    ['hunyuan_v1_moe', { n_group: false, topk_group: false, routed_scaling_factor: false }, { groups: 1 }],
    ['granitemoeshared', {}, { scoring: 'softmax', selection: 'logits', topK: 2 }],
  ];
  test.each(spellings)('%s with %j', async (fixture, change, gate) => {
    expect((await planOf(variant(fixture, change))).gate).toMatchObject(gate);
  });

  test('text_config is the language model', async () => {
    const nested = (config: Config) => ({
      model_type: 'llama4',
      architectures: ['Llama4ForConditionalGeneration'],
      text_config: config,
      vision_config: { hidden_act: 'gelu' },
    });
    const plan = await planOf(variant('llama4_text', nested));
    expect(plan).toMatchObject({
      architecture: 'llama4_text',
      gate: { scoring: 'sigmoid', selection: 'logits' },
    });
    const unnamed = variant('llama4_text', (config) => nested({ ...config, model_type: undefined }));
    expect(await planOf(unnamed)).toMatchObject({ architecture: 'llama4' });
  });

  test("gpt_oss takes its limit from the configuration, and the architecture's otherwise", async () => {
    expect((await planOf(variant('gpt_oss', {}))).swiglu).toEqual({ alpha: 1.702, beta: 1, limit: 7 });
    expect((await planOf(variant('gpt_oss', { swiglu_limit: 5 }))).swiglu.limit).toBe(5);
  });

  const unsupported: [fixture: string, change: Config, message: RegExp][] = [
    [
      'deepseek_v3',
      { hidden_act: 'gelu' },
      /hidden_act = 'gelu' is not supported for deepseek_v3; supported: 'silu'/,
    ],
    ['deepseek_v3', { scoring_func: 'softmax' }, /scoring_func = 'softmax'/],
    ['deepseek_v3', { topk_method: 'greedy' }, /topk_method = 'greedy'/],
    ['deepseek_v3', { num_experts_per_tok: 33 }, /33 experts per token; at most 32/],
    ['deepseek_v2', { topk_method: 'noaux_tc' }, /topk_method = 'noaux_tc'/],
    ['deepseek_v2', { scoring_func: 'sigmoid' }, /scoring_func = 'sigmoid'/],
    ['mixtral', { norm_topk_prob: false }, /norm_topk_prob = false .* supported: true/],
    ['qwen3_moe_single', { routed_scaling_factor: 2 }, /routed_scaling_factor = 2/],
    ['olmoe', { scoring_func: 'sigmoid' }, /scoring_func = 'sigmoid'/],
    ['minimax_m2', { scoring_func: 'softmax' }, /scoring_func = 'softmax'/],
    ['minimax_m2', { use_routing_bias: false }, /use_routing_bias = false/],
    ['longcat_flash', { zero_expert_type: 'copy' }, /zero_expert_type = 'copy'/],
    ['longcat_flash', { router_bias: true }, /router_bias = true/],
    ['llama4_text', { hidden_act: 'relu' }, /hidden_act = 'relu'/],
    ['granitemoeshared', { n_group: 4 }, /n_group = 4/],
  ];
  test.each(unsupported)('%s refuses %j', async (fixture, change, message) => {
    const source = fixture === 'qwen3_moe_single' ? 'olmoe' : fixture;
    const rename =
      source === fixture ? {} : { model_type: 'qwen3_moe', architectures: ['Qwen3MoeForCausalLM'] };
    await refused(() => planOf(variant(source, { ...rename, ...change })), message, 'ERR_MOE_UNSUPPORTED');
  });

  const malformed: [fixture: string, change: Config, message: RegExp][] = [
    [
      'deepseek_v3',
      { num_experts_per_tok: 'eight' },
      /num_experts_per_tok: an integer >= 1 but it is 'eight'/,
    ],
    ['deepseek_v3', { num_experts_per_tok: undefined }, /has none of num_experts_per_tok, /],
    ['deepseek_v3', { num_experts_per_tok: 0 }, /num_experts_per_tok: an integer >= 1 but it is 0/],
    ['deepseek_v3', { num_experts_per_tok: 17 }, /chooses 17 experts of 16 eligible/],
    ['deepseek_v3', { n_group: 5 }, /32 experts cannot be divided into 5 groups/],
    ['deepseek_v3', { topk_group: 9 }, /chooses 9 of 8 groups/],
    ['deepseek_v3', { routed_scaling_factor: -1 }, /routed_scaling_factor: a number above 0/],
    ['deepseek_v3', { norm_topk_prob: 'yes' }, /norm_topk_prob: true or false but it is 'yes'/],
    ['deepseek_v3', { n_routed_experts: 31 }, /config.json has 31 experts but the router has 32 rows/],
    ['deepseek_v3', { num_local_experts: 16 }, /n_routed_experts = 32 and num_local_experts = 16 disagree/],
    ['deepseek_v3', { n_shared_experts: 0 }, /has shared experts but config.json says there are none/],
    ['deepseek_v3', { n_shared_experts: null }, /has shared experts but config.json says there are none/],
    ['olmoe', { n_shared_experts: 2 }, /2 shared experts, which olmoe does not have/],
    ['longcat_flash', { zero_expert_num: 4 }, /16 experts and 4 zero experts but the router has 24 rows/],
    ['hunyuan_v1_moe', { moe_topk: [2, 2, 2, 2].slice(0, 0) }, /moe_topk has 0 entries, none for layer 1/],
    ['deepseek_v3', { text_config: 3 }, /text_config is 3/],
    ['deepseek_v3', { model_type: 3 }, /model_type is 3, not a name/],
    [
      'deepseek_v3',
      { architectures: ['MixtralForCausalLM'] },
      /'deepseek_v3' and architectures 'MixtralForCausalLM' contradict/,
    ],
  ];
  test.each(malformed)('%s with the malformed %j', async (fixture, change, message) => {
    await refused(() => planOf(variant(fixture, change)), message);
  });

  test.each([
    { model_type: 'phimoe', architectures: ['PhiMoEForCausalLM'] },
    { model_type: 'qwen3_vl_moe', text_config: { model_type: 'qwen3_vl_moe_text' } },
    { model_type: undefined, architectures: ['LlamaForCausalLM'] },
    { model_type: undefined, architectures: undefined },
  ])('the unknown architecture %j is refused with the known ones', async (change) => {
    const dir = variant('mixtral', change);
    await refused(
      () => planOf(dir),
      /unknown architecture: .*; known are deepseek_v2, deepseek_v3, .*, qwen3_next$/,
    );
  });

  test('the names for messages cover the table', () => {
    expect(architectureNames).toEqual([...architectureNames].sort());
    for (const { modelType } of Object.values(families)) expect(architectureNames).toContain(modelType);
  });

  test('files that are no configuration', async () => {
    await refused(() => planOf(join(scratch, 'none')), /no config.json in it/);
    await refused(() => planOf(join(fixtures, 'mixtral', 'config.json')), /not a checkpoint folder/);
    await refused(
      () => planOf(variant('mixtral', () => '{"model_type":')),
      /config.json: this file is not valid JSON/,
    );
    await refused(() => planOf(variant('mixtral', () => '[]')), /not a JSON object/);
    await refused(() => planOf('' as never), /expected dir/, 'ERR_MOE_INVALID_ARG');
  });
});

describe('tensors', () => {
  const block = 'model.layers.1.mlp';
  type Change = (tensors: Record<string, TensorToWrite>) => void;
  const f32 = (shape: number[]): TensorToWrite => ({
    dtype: 'f32',
    shape,
    data: new Float32Array(shape.reduce((a, b) => a * b, 1)),
  });
  const put =
    (name: string, tensor: TensorToWrite | undefined): Change =>
    (tensors) => {
      if (tensor === undefined) delete tensors[`${block}.${name}`];
      else tensors[`${block}.${name}`] = tensor;
    };
  const wrong: [string, string, Change, RegExp][] = [
    [
      'a missing expert',
      'olmoe',
      put('experts.7.up_proj.weight', undefined),
      /'.*experts.7.up_proj.weight' is missing/,
    ],
    ['a missing router', 'olmoe', put('gate.weight', undefined), /'.*gate.weight' is missing/],
    [
      'a missing correction bias',
      'glm4_moe',
      put('gate.e_score_correction_bias', undefined),
      /e_score_correction_bias' is missing/,
    ],
    [
      'a missing shared expert',
      'glm4_moe',
      (tensors) => {
        for (const name of Object.keys(tensors)) if (name.includes('shared_experts')) delete tensors[name];
      },
      /shared_experts.gate_proj.weight' is missing/,
    ],
    [
      'a missing expert gate',
      'qwen2_moe',
      put('shared_expert_gate.weight', undefined),
      /shared_expert_gate.weight' is missing/,
    ],
    ['a missing bias', 'gpt_oss', put('experts.down_proj_bias', undefined), /down_proj_bias' is missing/],
    [
      'an expert too many',
      'olmoe',
      put('experts.16.up_proj.weight', f32([32, 64])),
      /no place in a layer of olmoe/,
    ],
    ['a tensor that nobody knows', 'olmoe', put('gate.bias', f32([16])), /'.*gate.bias' has no place/],
    [
      'a narrow expert',
      'olmoe',
      put('experts.3.up_proj.weight', f32([31, 64])),
      /expected '.*up_proj.weight': \[32, 64\] but it is f32\[31, 64\]/,
    ],
    [
      'a transposed down',
      'olmoe',
      put('experts.3.down_proj.weight', f32([32, 64])),
      /down_proj.weight': \[64, 32\]/,
    ],
    ['a router of rank 3', 'olmoe', put('gate.weight', f32([16, 64, 1])), /router '.*': \[experts, hidden\]/],
    [
      'a short bias',
      'glm4_moe',
      put('gate.e_score_correction_bias', f32([31])),
      /\[32\] but it is f32\[31\]/,
    ],
    [
      'a stack of another orientation',
      'llama4_text',
      (tensors) => {
        tensors['model.layers.1.feed_forward.experts.down_proj'] = f32([8, 64, 32]);
      },
      /stored \[in, out\]/,
    ],
    [
      'a mixture of dtypes',
      'olmoe',
      put('experts.3.up_proj.weight', { dtype: 'bf16', shape: [32, 64], data: new Uint16Array(2048) }),
      /differ in dtype/,
    ],
    ['two layouts at once', 'olmoe', put('experts.down_proj', f32([16, 64, 32])), /two layouts/],
    [
      'integers for a router',
      'olmoe',
      put('gate.weight', { dtype: 'i32', shape: [16, 64], data: new Int32Array(1024) }),
      /is i32; weights must be/,
    ],
  ];
  test.each(wrong)('%s', async (_, fixture, change, message) => {
    await refused(async () => planOf(await retensored(fixture, change)), message);
  });

  test.each([
    [
      'deepseek_v3_fp8',
      undefined,
      /fp8 block-quantised, blocks of 128 x 128 \(quantization_config.quant_method = 'fp8'\)/,
    ],
    [
      'deepseek_v3_fp8',
      { quantization_config: undefined },
      /fp8 block-quantised \(f8_e4m3, with '.*weight_scale_inv'/,
    ],
    ['deepseek_v3_int8', undefined, /w8a8 int8 \(W8A8_DYNAMIC\)/],
    ['deepseek_v3_int8', { quantization_config: undefined }, /w8a8 int8 \(i8, with '.*' beside them\)/],
    ['mixtral', { quantization_config: { quant_method: 'gptq', bits: 4 } }, /quantised as gptq/],
    ['gpt_oss', { quantization_config: { quant_method: 'mxfp4' } }, /quantised as mxfp4/],
    ['mixtral', { quantization: { bits: 4 } }, /quantised \(config.json has quantization\)/],
  ] as [string, Config | undefined, RegExp][])(
    '%s with %j is refused by name',
    async (fixture, change, message) => {
      const dir = variant(fixture, change ?? {});
      await refused(() => planOf(dir), message, 'ERR_MOE_UNSUPPORTED');
      await refused(() => planOf(dir), /only f32, bf16 and f16 weights can be loaded/, 'ERR_MOE_UNSUPPORTED');
    },
  );

  test('scales beside float weights are quantisation too', async () => {
    const dir = await retensored('olmoe', put('experts.0.up_proj.weight_scale', f32([32, 1])));
    await refused(
      () => planOf(dir),
      /quantised: they have '.*weight_scale' beside them/,
      'ERR_MOE_UNSUPPORTED',
    );
  });
});

describe('layers', () => {
  const sizes: Sizes = {
    hidden: 8,
    intermediate: 4,
    experts: 4,
    topK: 2,
    shared: 1,
    tokens: 1,
    seed: 1,
    layers: [],
  };

  test('dense layers are told from MoE layers', async () => {
    const dir = join(scratch, 'layers');
    await writeCheckpoint(dir, families.qwen3_moe, { ...sizes, layers: [1, 3, 4, 5] });
    const tensors = (await readSafetensors(dir)) as Record<string, TensorToWrite>;
    const dense: TensorToWrite = { dtype: 'f32', shape: [2, 8], data: new Float32Array(16) };
    for (const name of ['model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight'])
      tensors[name] = dense;
    tensors['mtp.layers.0.mlp.gate.weight'] = dense;
    await writeSafetensors(join(dir, 'model.safetensors'), tensors);
    await using checkpoint = await openCheckpoint(dir);
    expect(checkpoint.moeLayers).toEqual([1, 3, 4, 5]);
    await refused(
      () => checkpoint.plan(0),
      /layer 0 has no MoE block; its MoE layers are 1, 3-5 \(qwen3_moe\)/,
    );
    await refused(() => checkpoint.plan(9), /layer 9 has no MoE block/);
    expect((await checkpoint.plan(3)).block).toBe('model.layers.3.mlp');
  });

  test.each(['layers', 'model.layers', 'language_model.model.layers', 'model.language_model.layers'])(
    'blocks under %s',
    async (prefix) => {
      const dir = join(scratch, `prefix-${prefix}`);
      await writeCheckpoint(dir, families.mixtral, {
        ...sizes,
        layers: [2],
        prefix: prefix.replace(/layers$/, ''),
      });
      expect((await planOf(dir, 2)).block).toBe(`${prefix}.2.block_sparse_moe`);
    },
  );

  test('a checkpoint without MoE layers', async () => {
    const dir = join(scratch, 'dense');
    await writeCheckpoint(dir, families.mixtral, sizes);
    await using checkpoint = await openCheckpoint(dir);
    expect(checkpoint.moeLayers).toEqual([]);
    await refused(() => checkpoint.plan(0), /it has none/);
  });

  test('a checkpoint of which one shard is missing', async () => {
    const dir = join(scratch, 'missing-shard');
    await writeCheckpoint(dir, families.mixtral, { ...sizes, layers: [0], shards: 3 });
    rmSync(join(dir, 'model-00002-of-00003.safetensors'));
    await refused(() => planOf(dir, 0), /model-00002-of-00003.safetensors: no such file/);
  });
});
