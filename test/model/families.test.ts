// Every family: the recordings made by transformers, and checkpoints of other sizes against a forward of their own.
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, describe, expect, test } from 'vitest';
import type { FloatDType } from '../../lib/index.js';
import { openCheckpoint } from '../../lib/model/checkpoint.js';
import { MoeLayer } from '../../lib/model/layer.js';
import { RECORDING_FILE, readRecording } from '../../lib/model/recording.js';
import { backends, idSets, relNorm, useContext } from './backends.js';
import { families, type Sizes, writeCheckpoint } from './synthetic_checkpoint.js';

const fixtures = fileURLToPath(new URL('../fixtures/hf', import.meta.url));
const quantised = ['deepseek_v3_fp8', 'deepseek_v3_int8'];
const recorded = readdirSync(fixtures).filter((name) => !quantised.includes(name));
const scratch = mkdtempSync(join(tmpdir(), 'moe-families-'));
afterAll(() => rmSync(scratch, { recursive: true }));

const tolerance = { f32: 2e-6, bf16: 6e-3, f16: 1e-3 };

test('the fixtures are all there', () => {
  expect(recorded).toHaveLength(19);
});

describe.each(backends)('%s', (backend) => {
  const context = useContext(backend);

  async function runRecording(name: string, shared: 'auto' | 'off' | 'overlapped', dtype: FloatDType) {
    const dir = join(fixtures, name);
    await using checkpoint = await openCheckpoint(dir);
    const [number] = checkpoint.moeLayers;
    using layer = await MoeLayer.load(checkpoint, {
      layer: number,
      context: context(),
      ...(shared === 'overlapped' ? { overlapSharedExperts: true } : { fuseSharedExperts: shared }),
      dtype,
    });
    const { block, topK, sharedSlots, recordedPart: part } = layer.description;
    const recording = (await readRecording(join(dir, RECORDING_FILE), block))!;
    const { data, tokens, hidden } = recording.input;
    using routerInput = context().tensor('f32', [tokens, hidden], data);
    using input = context().tensor(dtype, [tokens, hidden], data);
    const routed = layer.forward(input, { returnRouting: true, part, routerInput });
    const result = {
      output: await routed.output.read(),
      ids: await routed.ids.read(),
      dtype: routed.output.dtype,
    };
    for (const tensor of [routed.output, routed.ids, routed.weights, routed.logits]) tensor.dispose();
    const columns = topK + (part === 'all' ? sharedSlots : 0);
    return { layer: layer.description, recording, ...result, sets: idSets(result.ids, columns, topK) };
  }

  for (const name of recorded) {
    test(`${name}: output and ids as transformers recorded them, fused and unfused`, async () => {
      const fused = await runRecording(name, 'auto', 'f32');
      const unfused = await runRecording(name, 'off', 'f32');
      const { recording } = fused;
      for (const { output, sets } of [fused, unfused]) {
        expect(relNorm(output, recording.output!.data)).toBeLessThan(5e-7);
        if (recording.ids !== null) {
          expect(sets).toEqual(idSets(recording.ids.data, recording.ids.columns, recording.ids.columns));
        }
      }
      expect(recording.ids === null).toBe(name === 'llama4_text');
      expect(unfused.layer.fused).toBe(false);
      expect(relNorm(fused.output, unfused.output)).toBeLessThan(5e-7);
      const overlapped = await runRecording(name, 'overlapped', 'f32');
      expect(overlapped.layer).toMatchObject({
        fused: false,
        overlapped: overlapped.layer.sharedIntermediate > 0,
      });
      expect(relNorm(overlapped.output, unfused.output)).toBeLessThan(5e-7);
    });

    test.each(['bf16', 'f16'] as const)(`${name}: within tolerance in %s, routed in f32`, async (dtype) => {
      const { output, recording, sets, dtype: returned } = await runRecording(name, 'auto', dtype);
      expect(returned).toBe(dtype);
      expect(relNorm(output, recording.output!.data)).toBeLessThan(tolerance[dtype]);
      if (recording.ids !== null) {
        expect(sets).toEqual(idSets(recording.ids.data, recording.ids.columns, recording.ids.columns));
      }
    });
  }

  const sizes: Record<string, Partial<Sizes>> = {
    'other widths': {},
    'three shared experts, two layers, four shards': { shared: 3, layers: [2, 7], shards: 4, seed: 5 },
    'stored as transformers 5 holds it in memory': { inMemory: true, seed: 9, shared: 2 },
    'wide experts under a language_model prefix': {
      prefix: 'language_model.model.',
      intermediate: 52,
      seed: 12,
      experts: 6,
      topK: 2,
    },
  };
  for (const [name, family] of Object.entries(families)) {
    test.each(Object.entries(sizes))(`${name}, %s`, async (title, more) => {
      const size: Sizes = {
        hidden: 44,
        intermediate: 20,
        experts: 15,
        topK: 3,
        shared: 1,
        tokens: 9,
        seed: 1,
        layers: [3],
        ...more,
      };
      const spellings = ['before', 'after'] as const;
      for (const spelling of spellings) {
        const dir = join(scratch, `${backend}-${name}-${title.replaceAll(' ', '_')}-${spelling}`);
        const written = await writeCheckpoint(dir, family, size, spelling);
        await using checkpoint = await openCheckpoint(dir);
        expect(checkpoint.moeLayers).toEqual(size.layers);
        for (const { layer: number, block, input, expected, expectedRouted, ids } of written) {
          for (const fuseSharedExperts of ['auto', 'off'] as const) {
            using layer = await MoeLayer.load(checkpoint, {
              layer: number,
              context: context(),
              fuseSharedExperts,
            });
            const { description } = layer;
            expect(description).toMatchObject({ block, hidden: 44, experts: size.experts, topK: size.topK });
            expect(description.intermediate).toBe(size.intermediate);
            const fusible = family.shared !== undefined && family.shared.gate === undefined;
            expect(description.fused).toBe(fusible && fuseSharedExperts === 'auto');
            expect(description.sharedSlots).toBe(description.fused ? size.shared : 0);
            using x = context().tensor('f32', [size.tokens, size.hidden], input);
            using whole = layer.forward(x);
            expect(relNorm(await whole.read(), expected)).toBeLessThan(1e-6);
            const part = layer.forward(x, { part: 'routed', returnRouting: true });
            expect(relNorm(await part.output.read(), expectedRouted)).toBeLessThan(1e-6);
            expect(idSets(await part.ids.read(), size.topK, size.topK)).toEqual(ids);
            for (const tensor of [part.output, part.ids, part.weights, part.logits]) tensor.dispose();
          }
        }
      }
    });
  }
});
