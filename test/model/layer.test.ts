// MoeLayer beyond its numbers: fusing, dtypes, options, cancelling, giving memory back, recordings.
import { getEventListeners } from 'node:events';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, describe, expect, test } from 'vitest';
import { createContext } from '../../lib/index.js';
import { openCheckpoint } from '../../lib/model/checkpoint.js';
import { MoeLayer, type MoeLayerOptions, type MoeLayerStage } from '../../lib/model/layer.js';
import { readActivations, readRecording } from '../../lib/model/recording.js';
import { readSafetensors } from '../../lib/model/safetensors.js';
import { type TensorToWrite, writeSafetensors } from '../../lib/model/safetensors_write.js';
import { backends, relNorm, useContext } from './backends.js';
import { families, type Sizes, writeCheckpoint } from './synthetic_checkpoint.js';

const fixtures = fileURLToPath(new URL('../fixtures/hf', import.meta.url));
const fixture = (name: string) => join(fixtures, name);
const scratch = mkdtempSync(join(tmpdir(), 'moe-layer-'));
afterAll(() => rmSync(scratch, { recursive: true }));

const refused = (work: () => Promise<unknown>, code: string, message: RegExp) =>
  expect(work()).rejects.toThrow(expect.objectContaining({ code, message: expect.stringMatching(message) }));

const small: Sizes = {
  hidden: 24,
  intermediate: 8,
  experts: 6,
  topK: 2,
  shared: 1,
  tokens: 5,
  seed: 3,
  layers: [0],
};

describe.each(backends)('%s', (backend) => {
  const context = useContext(backend);
  const load = (dir: string, options: Partial<MoeLayerOptions> = {}) =>
    MoeLayer.load(dir, { layer: 1, context: context(), ...options });

  test('the description is plain, frozen and complete', async () => {
    using layer = await load(fixture('deepseek_v2'));
    const { description } = layer;
    expect(description).toEqual({
      architecture: 'deepseek_v2',
      layer: 1,
      block: 'model.layers.1.mlp',
      hidden: 64,
      intermediate: 32,
      experts: 20,
      zeroExperts: 0,
      scoring: 'softmax',
      selection: 'score',
      topK: 6,
      groups: 4,
      topGroups: 2,
      groupScore: 'max',
      renormalize: false,
      routedScalingFactor: 16,
      sharedExperts: 2,
      sharedIntermediate: 64,
      sharedGate: false,
      fused: true,
      sharedSlots: 2,
      correctionBias: false,
      routerBias: false,
      biases: false,
      weightsOnInput: false,
      swiglu: {},
      dtype: 'f32',
      routerDtype: 'f32',
      overlapped: false,
      recordedPart: 'all',
    });
    expect(Object.isFrozen(description)).toBe(true);
    expect(JSON.parse(JSON.stringify(description))).toEqual(description);
    expect(String(layer)).toBe(
      'deepseek_v2 model.layers.1.mlp: 20 experts of 64 x 32, top 6, 2 shared (fused)',
    );
  });

  test("'on' says why it cannot fuse", async () => {
    const on = { fuseSharedExperts: 'on' } as const;
    using fused = await load(fixture('dots1'), on);
    expect(fused.description).toMatchObject({ fused: true, sharedSlots: 2 });
    await refused(
      () => load(fixture('olmoe'), on),
      'ERR_MOE_UNSUPPORTED',
      /cannot be fused: the layer has no shared/,
    );
    await refused(
      () => load(fixture('qwen2_moe'), on),
      'ERR_MOE_UNSUPPORTED',
      /has a gate of its own \('.*expert_gate/,
    );
    await refused(
      () => load(fixture('granitemoeshared'), on),
      'ERR_MOE_UNSUPPORTED',
      /shared width 32 is not a multiple/,
    );
    const wide = join(scratch, `${backend}-wide`);
    await writeCheckpoint(wide, families.glm4_moe, { ...small, shared: 9 });
    await refused(() => load(wide, { ...on, layer: 0 }), 'ERR_MOE_UNSUPPORTED', /9 times .*; at most 8 fit/);
    const mixed = join(scratch, `${backend}-mixed`);
    await writeCheckpoint(mixed, families.glm4_moe, small);
    const tensors = (await readSafetensors(mixed)) as Record<string, TensorToWrite>;
    for (const [name, { shape, data }] of Object.entries(tensors)) {
      if (name.includes('shared_experts')) tensors[name] = { dtype: 'f16', shape, data };
    }
    await writeSafetensors(join(mixed, 'model.safetensors'), tensors);
    await refused(
      () => load(mixed, { ...on, layer: 0 }),
      'ERR_MOE_UNSUPPORTED',
      /shared expert is f16 but the routed experts are f32/,
    );
    using unfused = await load(mixed, { layer: 0 });
    expect(unfused.description).toMatchObject({
      fused: false,
      unfusedReason: expect.stringMatching(/is f16/),
    });
    using kept = await load(fixture('dots1'), { fuseSharedExperts: 'off' });
    expect(kept.description.unfusedReason).toBe("fuseSharedExperts is 'off'");
  });

  test('eight shared experts fuse, and biases on both sides with them', async () => {
    const dir = join(scratch, `${backend}-biased`);
    const [{ input }] = await writeCheckpoint(dir, families.ernie4_5_moe, { ...small, shared: 8 });
    const tensors = (await readSafetensors(dir)) as Record<string, TensorToWrite>;
    for (const [name, { shape }] of Object.entries(tensors)) {
      if (!/_proj\.weight$/.test(name)) continue;
      const data = Float32Array.from({ length: shape[0] }, (_, i) => Math.sin(i * 1.7 + name.length) / 2);
      tensors[name.replace(/weight$/, 'bias')] = { dtype: 'f32', shape: [shape[0]], data };
    }
    await writeSafetensors(join(dir, 'model.safetensors'), tensors);
    using fused = await load(dir, { layer: 0, fuseSharedExperts: 'on' });
    using unfused = await load(dir, { layer: 0, fuseSharedExperts: 'off' });
    expect(fused.description).toMatchObject({ sharedSlots: 8, biases: true });
    using x = context().tensor('f32', [small.tokens, small.hidden], input);
    using a = fused.forward(x);
    using b = unfused.forward(x);
    expect(relNorm(await a.read(), await b.read())).toBeLessThan(5e-7);
  });

  test('experts are converted, the router keeps its dtype', async () => {
    using narrow = await load(fixture('glm4_moe'), { dtype: 'bf16' });
    using wide = await load(fixture('glm4_moe'));
    expect(narrow.description).toMatchObject({ dtype: 'bf16', routerDtype: 'f32' });
    expect(wide.memory).toBeGreaterThan(33 * 3 * 64 * 32 * 4);
    // Half, and what tiles of 64 pad the intermediate 32 by
    if (backend !== 'oracle') expect(narrow.memory).toBeLessThan(0.7 * wide.memory);
  });

  test('a checkpoint in bf16 keeps its dtype, its bias becomes f32', async () => {
    const dir = join(scratch, `${backend}-bf16`);
    const [{ input, expected }] = await writeCheckpoint(dir, families.deepseek_v3, small);
    const tensors = (await readSafetensors(dir)) as Record<string, TensorToWrite>;
    for (const [name, { shape, data }] of Object.entries(tensors))
      tensors[name] = { dtype: 'bf16', shape, data };
    await writeSafetensors(join(dir, 'model.safetensors'), tensors);
    using layer = await load(dir, { layer: 0 });
    expect(layer.description).toMatchObject({ dtype: 'bf16', routerDtype: 'bf16', fused: true });
    using x = context().tensor('f32', [small.tokens, small.hidden], input);
    using y = layer.forward(x);
    expect(y.dtype).toBe('f32');
    expect(relNorm(await y.read(), expected)).toBeLessThan(2e-2);
  });

  test('stages are announced in order', async () => {
    const stagesOf = async (name: string, fuseSharedExperts: 'auto' | 'off') => {
      using layer = await load(fixture(name), { fuseSharedExperts });
      using x = context().tensor('f32', [2, 64]);
      const stages: MoeLayerStage[] = [];
      layer.forward(x, { onStage: (stage) => stages.push(stage) }).dispose();
      return stages;
    };
    expect(await stagesOf('deepseek_v3', 'auto')).toEqual(['router', 'gate', 'experts']);
    expect(await stagesOf('deepseek_v3', 'off')).toEqual(['router', 'gate', 'experts', 'shared']);
  });

  test('padding rows are not routed; no tokens are fine', async () => {
    using layer = await load(fixture('deepseek_v3'));
    const { input } = (await readRecording(
      join(fixture('deepseek_v3'), 'moe_io.safetensors'),
      layer.description.block,
    ))!;
    using x = context().tensor('f32', [input.tokens, 64], input.data);
    const part = layer.forward(x, { validTokens: 3, returnRouting: true });
    using whole = layer.forward(x);
    const ids = await part.ids.read();
    expect(ids.subarray(3 * 9).every((id) => id === -1)).toBe(true);
    const output = await part.output.read();
    expect(output.subarray(0, 3 * 64)).toEqual((await whole.read()).subarray(0, 3 * 64));
    for (const tensor of Object.values(part)) tensor.dispose();
    using nothing = context().tensor('f32', [0, 64]);
    using empty = layer.forward(nothing);
    expect(empty.shape).toEqual([0, 64]);
    expect(await empty.read()).toHaveLength(0);
  });

  test('a forward can be captured and replayed', async () => {
    using layer = await load(fixture('qwen2_moe'));
    const { input, output } = (await readRecording(
      join(fixture('qwen2_moe'), 'moe_io.safetensors'),
      layer.description.block,
    ))!;
    using x = context().tensor('f32', [input.tokens, 64]);
    using capture = context().capture(() => layer.forward(x));
    x.write(input.data);
    capture.replay();
    expect(relNorm(await capture.output.read(), output!.data)).toBeLessThan(5e-7);
  });

  test('progress counts every expert once', async () => {
    const seen: string[] = [];
    using layer = await load(fixture('deepseek_v2'), {
      onProgress: ({ done, total, unit }) => seen.push(`${done}/${total} ${unit}`),
    });
    expect(layer.description.fused).toBe(true);
    expect(seen).toHaveLength(22);
    expect([seen[0], seen[21]]).toEqual(['1/22 experts', '22/22 experts']);
  });

  test('a load that is cancelled from outside ends at once and listens no longer', async () => {
    await context().synchronize();
    const before = context().memory().used;
    const controller = new AbortController();
    const loading = load(fixture('deepseek_v3_256'), { signal: controller.signal });
    await new Promise((done) => setTimeout(done, 5));
    const begun = performance.now();
    controller.abort('enough');
    await expect(loading).rejects.toMatchObject({ code: 'ERR_MOE_ABORTED', cause: 'enough' });
    expect(performance.now() - begun).toBeLessThan(200);
    expect(getEventListeners(controller.signal, 'abort')).toEqual([]);
    const kept = new AbortController();
    (await load(fixture('olmoe'), { signal: kept.signal })).dispose();
    expect(getEventListeners(kept.signal, 'abort')).toEqual([]);
    await context().synchronize();
    expect(context().memory().used).toBe(before);
  });

  test('a callback that throws in the middle of a forward leaves nothing behind', async () => {
    using layer = await load(fixture('qwen2_moe'));
    using hidden = context().tensor('f32', [3, layer.description.hidden]);
    await context().synchronize();
    const before = context().memory().used;
    for (const at of ['router', 'gate', 'experts', 'shared']) {
      const onStage = (stage: MoeLayerStage) => {
        if (stage === at) throw new Error(`at ${at}`);
      };
      expect(() => layer.forward(hidden, { onStage })).toThrow(`at ${at}`);
      expect(() => context().capture(() => layer.forward(hidden, { onStage }))).toThrow(`at ${at}`);
    }
    await context().synchronize();
    expect(context().memory().used).toBe(before);
  });

  test('whatever ends a load early, everything is given back', async () => {
    await context().synchronize();
    const before = context().memory().used;
    const openFiles = () => (process.platform === 'linux' ? readdirSync('/proc/self/fd').length : 0);
    const controller = new AbortController();
    const abortAt = (expert: number) => ({
      signal: controller.signal,
      onProgress: ({ done }: { done: number }) => {
        if (done === expert) controller.abort(new Error('enough'));
      },
    });
    const files = openFiles();
    await refused(() => load(fixture('deepseek_v3_256'), abortAt(100)), 'ERR_MOE_ABORTED', /cancelled/);
    await refused(
      () => load(fixture('olmoe'), { signal: controller.signal }),
      'ERR_MOE_ABORTED',
      /cancelled/,
    );
    const failing = () => {
      throw new Error('from the caller');
    };
    await expect(load(fixture('deepseek_v3'), { onProgress: failing })).rejects.toThrow('from the caller');
    await refused(
      () => load(fixture('olmoe'), { layer: 0 }),
      'ERR_MOE_CHECKPOINT',
      /layer 0 has no MoE block/,
    );
    await context().synchronize();
    expect(context().memory().used).toBe(before);
    expect(openFiles()).toBe(files);
    const layer = await load(fixture('qwen2_moe'));
    expect(context().memory().used).toBeGreaterThan(before);
    using x = context().tensor('f32', [2, 64]);
    layer.dispose();
    layer.dispose();
    expect(layer.disposed).toBe(true);
    expect(() => layer.forward(x)).toThrow(expect.objectContaining({ code: 'ERR_MOE_DISPOSED' }));
  });

  test('a forward keeps nothing but what it returns', async () => {
    using layer = await load(fixture('qwen2_moe'));
    using x = context().tensor('f32', [2, 64]);
    await context().synchronize();
    const before = context().memory().used;
    layer.forward(x).dispose();
    const { output, ids, weights, logits } = layer.forward(x, { returnRouting: true });
    expect([output.shape, ids.shape, weights.shape, logits.shape]).toEqual([
      [2, 64],
      [2, 4],
      [2, 4],
      [2, 20],
    ]);
    for (const tensor of [output, ids, weights, logits]) tensor.dispose();
    using narrow = context().tensor('f32', [2, 63]);
    expect(() => layer.forward(x, { routerInput: narrow })).toThrow(/expected weight: .*\[20, 63\]/);
    expect(() => layer.forward(narrow)).toThrow(
      '[MoeLayer.forward] expected hidden: a tensor f32|bf16|f16[tokens, 64] but received f32[2, 63]',
    );
    narrow.dispose();
    await context().synchronize();
    expect(context().memory().used).toBe(before);
  });

  test('misuse of options', async () => {
    const bad = (options: object) => () => load(fixture('olmoe'), options as MoeLayerOptions);
    await refused(bad({ layer: 1.5 }), 'ERR_MOE_INVALID_ARG', /layer: an integer >= 0 but received 1.5/);
    await refused(bad({ layer: undefined }), 'ERR_MOE_INVALID_ARG', /layer: an integer/);
    await refused(bad({ context: {} }), 'ERR_MOE_INVALID_ARG', /context: a context from createContext/);
    await refused(
      bad({ fuseSharedExperts: true }),
      'ERR_MOE_INVALID_ARG',
      /fuseSharedExperts: one of 'auto', 'on', 'off'/,
    );
    await refused(bad({ dtype: 'f8' }), 'ERR_MOE_INVALID_ARG', /dtype: one of 'f32', 'bf16', 'f16'/);
    await refused(bad({ signal: 1 }), 'ERR_MOE_INVALID_ARG', /signal: an AbortSignal/);
    await refused(bad({ onProgress: 1 }), 'ERR_MOE_INVALID_ARG', /onProgress: a function/);
    await refused(
      bad({ fuse: 'on' }),
      'ERR_MOE_INVALID_ARG',
      /unknown option 'fuse'; the options are: layer, context/,
    );
    await refused(
      () => MoeLayer.load(fixture('olmoe'), undefined as never),
      'ERR_MOE_INVALID_ARG',
      /options: an object/,
    );
    await refused(
      () => MoeLayer.load(3 as never, { layer: 1, context: context() }),
      'ERR_MOE_INVALID_ARG',
      /expected dir/,
    );
    using layer = await load(fixture('olmoe'));
    using x = context().tensor('f32', [2, 64]);
    expect(() => layer.forward(x, { part: 'shared' as never })).toThrow(
      /part: one of 'all', 'routed' but received 'shared'/,
    );
    expect(() => layer.forward(x, { parts: 'all' } as never)).toThrow(/unknown option 'parts'/);
    expect(() => layer.forward(undefined as never)).toThrow(/expected hidden/);
  });
});

test('an open checkpoint stays open over several loads', async () => {
  await using context = await createContext({ backend: 'oracle' });
  await using checkpoint = await openCheckpoint(fixture('mixtral'));
  for (let i = 0; i < 2; i++) (await MoeLayer.load(checkpoint, { layer: 1, context })).dispose();
  await checkpoint.close();
  await refused(() => MoeLayer.load(checkpoint, { layer: 1, context }), 'ERR_MOE_DISPOSED', /is closed/);
});

describe('recordings', () => {
  const io = (name: string) => join(fixture(name), 'moe_io.safetensors');

  test.each([
    ['mixtral', 'model.layers.1.block_sparse_moe', 'model.layers.1.mlp', 2],
    ['minimax_m2', 'model.layers.1.block_sparse_moe', 'model.layers.1.mlp', 4],
    ['granitemoeshared', 'model.layers.1.block_sparse_moe', 'model.layers.1.block_sparse_moe', 2],
    ['longcat_flash', 'model.layers.1.mlp', 'model.layers.1.mlp', 4],
  ])('%s: %s is recorded as %s', async (name, block, recordedAs, columns) => {
    const recording = (await readRecording(io(name), block))!;
    expect(recording).toMatchObject({
      block: recordedAs,
      input: { tokens: 38, hidden: 64 },
      ids: { columns },
    });
    expect(recording.output!.data).toHaveLength(38 * 64);
  });

  test('what is not there is null', async () => {
    expect(await readRecording(io('mixtral'), 'model.layers.2.mlp')).toBeNull();
    expect((await readRecording(io('llama4_text'), 'model.layers.1.feed_forward'))!.ids).toBeNull();
    expect((await readRecording(io('deepseek_v3_fp8'), 'model.layers.1.mlp'))!.output).toBeNull();
    await refused(() => readRecording(join(scratch, 'none'), 'x.y'), 'ERR_MOE_CHECKPOINT', /no such file/);
  });

  test('activations are found by name, or as the only float tensor', async () => {
    const file = join(scratch, 'activations.safetensors');
    const x: TensorToWrite = { dtype: 'bf16', shape: [2, 3, 4], data: new Float32Array(24).fill(1.5) };
    await writeSafetensors(file, { x, ids: { dtype: 'i32', shape: [6, 1], data: new Int32Array(6) } });
    expect(await readActivations(file)).toEqual({
      name: 'x',
      tokens: 6,
      hidden: 4,
      data: new Float32Array(24).fill(1.5),
    });
    await refused(
      () => readActivations(file, 'ids'),
      'ERR_MOE_CHECKPOINT',
      /expected 'ids': f32\|bf16\|f16.* but it is i32\[6, 1\]/,
    );
    await refused(
      () => readActivations(io('olmoe')),
      'ERR_MOE_CHECKPOINT',
      /holds 4 float tensors; say which one/,
    );
    expect(await readActivations(io('olmoe'), 'model.layers.1.mlp.output')).toMatchObject({
      tokens: 38,
      hidden: 64,
    });
  });
});
