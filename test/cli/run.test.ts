import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { readSafetensors } from '../../lib/model/safetensors.js';
import { writeSafetensors } from '../../lib/model/safetensors_write.js';
import { fixture, moeKernels } from './command.js';

const scratch = mkdtempSync(join(tmpdir(), 'moe-kernels-run-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

const quantised = ['deepseek_v3_fp8', 'deepseek_v3_int8'];
const families = readdirSync(fixture('')).filter((family) => !quantised.includes(family));
const io = (family: string) => join(fixture(family), 'moe_io.safetensors');
const block = 'model.layers.1.mlp';

describe.each(families)('%s', (family) => {
  it('matches its recording, as JSON', () => {
    const { status, stdout, stderr } = moeKernels(['run', fixture(family), '--json', '--backend', 'cpu']);
    expect(stderr).toBe('');
    expect(status).toBe(0);
    const { layers, ok } = JSON.parse(stdout);
    expect(ok).toBe(true);
    expect(layers).toHaveLength(1);
    expect(layers[0]).toMatchObject({
      layer: 1,
      backend: 'cpu',
      tokens: 38,
      routing: { idsEqual: family === 'llama4_text' ? null : true },
      ms: { load: expect.any(Number), forward: expect.any(Number) },
    });
    expect(layers[0].error.relNorm).toBeLessThanOrEqual(2e-6);
    expect(layers[0].par).toBeGreaterThanOrEqual(1);
  });
});

describe('moe-kernels run', () => {
  it.each([
    ['cpu', 'off', 'bf16', false],
    ['oracle', 'on', 'f32', true],
    ['oracle', 'off', 'f16', false],
    ['cpu', 'on', 'f16', true],
  ])('on %s, shared experts %s, %s', (backend, fuse, dtype, fused) => {
    const args = [
      'run',
      fixture('deepseek_v3'),
      '--json',
      '--backend',
      backend,
      '--fuse-shared',
      fuse,
      '--dtype',
      dtype,
    ];
    const { status, stdout } = moeKernels(args);
    expect(status).toBe(0);
    expect(JSON.parse(stdout)).toMatchObject({ ok: true, layers: [{ backend, fused, sharedExperts: 1 }] });
  });

  it('shows people the backend, the routing, the times and the error', () => {
    const { status, stdout } = moeKernels(['run', fixture('deepseek_v3_256'), '--backend', 'cpu']);
    expect(status).toBe(0);
    expect(stdout).toMatch(/^Backend: cpu \(/);
    expect(stdout).toMatch(/256 experts, top 8: peak-to-average 26\.11/);
    expect(stdout.match(/^ +\d+ \|.{64}\|$/gm)).toHaveLength(4);
    expect(stdout).toMatch(/shared +1 shared expert, fused as slot 256/);
    expect(stdout).toMatch(/time +load [\d.]+ ms, forward [\d.]+ ms: router .* gate .* experts /);
    expect(stdout).toMatch(/error +relative norm .*e-[78] \(limit 0\.000002\)/);
    expect(stdout.trimEnd().endsWith('ok')).toBe(true);
  });

  it('says under auto why other backends were passed over', () => {
    const { stdout } = moeKernels(['run', fixture('olmoe')], { MOE_KERNELS_BACKEND: '' });
    expect(stdout).toMatch(/^Backend: /);
    for (const other of stdout.matchAll(/^ {2}not (\w+): (.*)$/gm))
      expect(other[2].length).toBeGreaterThan(10);
  });

  it('takes input and expectation by file and tensor, and writes the output', async () => {
    const out = join(scratch, 'out.safetensors');
    const source = io('deepseek_v3');
    const args = ['run', fixture('deepseek_v3'), '--layer', '1', '--json', '--out', out, '--backend', 'cpu'];
    const { status, stdout } = moeKernels([
      ...args,
      '--input',
      `${source}:${block}.input`,
      '--expect',
      `${source}:${block}.output`,
    ]);
    expect(status).toBe(0);
    expect(JSON.parse(stdout).layers[0]).toMatchObject({
      error: { maxAbs: expect.any(Number) },
      routing: { idsEqual: null },
    });
    const written = await readSafetensors(out);
    expect(Object.keys(written)).toEqual([`${block}.output`]);
    expect(written[`${block}.output`].shape).toEqual([38, 64]);
    const again = moeKernels([...args, '--input', `${source}:${block}.input`, '--expect', out]);
    expect(JSON.parse(again.stdout).layers[0].error).toEqual({ maxAbs: 0, relNorm: 0 });
  });

  it('reports no error without an expectation', () => {
    const { status, stdout } = moeKernels([
      'run',
      fixture('deepseek_v3'),
      '--json',
      '--input',
      `${io('deepseek_v3')}:${block}.input`,
    ]);
    expect(status).toBe(0);
    expect(JSON.parse(stdout).layers[0]).toMatchObject({ error: null, routing: { idsEqual: null } });
  });

  it('exits with 1 when the result is wrong', async () => {
    const wrong = join(scratch, 'wrong.safetensors');
    const { [`${block}.output`]: recorded } = await readSafetensors(io('deepseek_v3'), [`${block}.output`]);
    const data = (recorded.data as Float32Array).map((value) => value * 1.001);
    await writeSafetensors(wrong, { wrong: { ...recorded, data } as never });
    const { status, stdout } = moeKernels(['run', fixture('deepseek_v3'), '--json', '--expect', wrong]);
    expect(status).toBe(1);
    const { ok, layers } = JSON.parse(stdout);
    expect(ok).toBe(false);
    expect(layers[0].error.relNorm).toBeGreaterThan(9e-4);
    expect(moeKernels(['run', fixture('deepseek_v3'), '--expect', wrong]).stdout).toMatch(/WRONG/);
  });

  it('exits with 1 when other experts are chosen than recorded', () => {
    const copy = join(scratch, 'other_experts');
    cpSync(fixture('deepseek_v3'), copy, { recursive: true });
    const config = join(copy, 'config.json');
    const changed = { ...JSON.parse(readFileSync(config, 'utf8')), topk_group: 1, n_group: 1 };
    writeFileSync(config, JSON.stringify(changed));
    const { status, stdout } = moeKernels(['run', copy, '--json']);
    expect(status).toBe(1);
    expect(JSON.parse(stdout).layers[0].routing.idsEqual).toBe(false);
  });

  it('compares an expectation of the user with the whole layer, the recording with what was recorded', () => {
    const out = join(scratch, 'granite.safetensors');
    const family = fixture('granitemoeshared');
    expect(moeKernels(['run', family, '--json', '--out', out]).status).toBe(0);
    const name = 'model.layers.1.block_sparse_moe.output';
    const { status, stdout } = moeKernels(['run', family, '--json', '--expect', `${out}:${name}`]);
    expect(status).toBe(0);
    expect(JSON.parse(stdout).layers[0].error).toEqual({ maxAbs: 0, relNorm: 0 });
  });

  it.each([
    ['null groups mean none', 'kimi_like', { n_group: null, topk_group: null }, 0, /"ok":true/],
    [
      'a count of shared experts that the width denies',
      'deepseek_v3',
      { n_shared_experts: 7 },
      2,
      /7 shared experts, but 32 columns/,
    ],
  ])('reads configurations to the letter: %s', (_, family, change, status, said) => {
    const copy = join(scratch, `${family}_changed`);
    cpSync(fixture(family), copy, { recursive: true });
    const config = join(copy, 'config.json');
    writeFileSync(config, JSON.stringify({ ...JSON.parse(readFileSync(config, 'utf8')), ...change }));
    const run = moeKernels(['run', copy, '--json']);
    expect({ status: run.status, said: said.test(run.stdout + run.stderr) }, run.stderr).toEqual({
      status,
      said: true,
    });
  });

  it('names the environment variable that is wrong', () => {
    const { status, stderr } = moeKernels(['run', fixture('olmoe'), '--backend', 'cpu'], {
      MOE_KERNELS_THREADS: 'abc',
    });
    expect(status).toBe(2);
    expect(stderr).toMatch(/expected MOE_KERNELS_THREADS: an integer from 1 to 1024 but received 'abc'/);
  });

  const misuse: [string, string[], RegExp][] = [
    ['no command', [], /Usage: moe-kernels/],
    ['an unknown command', ['ran'], /unknown command 'ran'/],
    ['no folder', ['run'], /missing required argument 'checkpoint-dir'/],
    [
      'an unknown option',
      ['run', fixture('olmoe'), '--bakcend', 'cpu'],
      /unknown option '--bakcend'\n\(Did you mean --backend\?\)\n+\(moe-kernels run --help lists the options\)/,
    ],
    [
      'an unknown backend',
      ['run', fixture('olmoe'), '--backend', 'tpu'],
      /Allowed choices are auto, cuda, ascend, cpu, oracle/,
    ],
    ['a layer that is no number', ['run', fixture('olmoe'), '--layer', 'one'], /Expected an integer from 0/],
    [
      'a layer that is not there',
      ['run', fixture('olmoe'), '--layer', '7'],
      /layer 7 has no MoE block; its MoE layers are 1/,
    ],
    ['a folder that is not there', ['run', join(scratch, 'nowhere')], /ERR_MOE_CHECKPOINT: .*nowhere/],
    ['a folder without a checkpoint', ['run', scratch], /ERR_MOE_CHECKPOINT: .*config\.json/],
    ['fp8 weights', ['run', fixture('deepseek_v3_fp8')], /ERR_MOE_UNSUPPORTED: .*fp8 block-quantised/],
    ['int8 weights', ['run', fixture('deepseek_v3_int8')], /ERR_MOE_UNSUPPORTED: .*w8a8 int8/],
    [
      'fusing what cannot be fused',
      ['run', fixture('qwen2_moe'), '--fuse-shared', 'on'],
      /cannot be fused: the shared expert has a gate/,
    ],
    ['a tensor that is not there', ['run', fixture('olmoe'), '--input', `${io('olmoe')}:nothing`], /nothing/],
    [
      'an input of another width',
      ['run', fixture('olmoe'), '--input', `${io('olmoe')}:${block}.gate.out0`],
      /\[tokens, 64\] \(the layer's hidden size\) but it is \[38, 16\]/,
    ],
    [
      'an input that is not safetensors',
      ['run', fixture('olmoe'), '--input', join(fixture('olmoe'), 'config.json')],
      /ERR_MOE_CHECKPOINT/,
    ],
    [
      'an output that cannot be written',
      ['run', fixture('olmoe'), '--out', join(scratch, 'no', 'such', 'folder')],
      /cannot be written \(there is no such folder\)/,
    ],
    ['an output that is a folder', ['run', fixture('olmoe'), '--out', scratch], /cannot be written \(EISDIR/],
  ];
  it.each(misuse)('exits with 2 for %s', (_, args, message) => {
    const { status, stdout, stderr } = moeKernels(args);
    expect({ status, message: message.test(stderr) }, stderr).toEqual({ status: 2, message: true });
    expect(stderr).not.toMatch(/^\s+at /m);
    if (args.includes('--json')) expect(stdout).toBe('');
  });

  it('exits with 2 where nothing was recorded and no input is given', () => {
    const copy = join(scratch, 'unrecorded');
    cpSync(fixture('olmoe'), copy, {
      recursive: true,
      filter: (file) => !file.endsWith('moe_io.safetensors'),
    });
    const { status, stderr } = moeKernels(['run', copy]);
    expect(status).toBe(2);
    expect(stderr).toMatch(/expected --input FILE\[:TENSOR\] with hidden states/);
  });

  it('refuses an unknown architecture and lists the known ones', () => {
    const copy = join(scratch, 'unknown');
    cpSync(fixture('olmoe'), copy, { recursive: true });
    writeFileSync(
      join(copy, 'config.json'),
      '{ "model_type": "mystery", "architectures": ["MysteryForCausalLM"] }',
    );
    const { status, stderr } = moeKernels(['run', copy]);
    expect(status).toBe(2);
    expect(stderr).toMatch(/mystery/);
    for (const name of ['deepseek_v3', 'qwen3_moe', 'gpt_oss', 'llama4']) expect(stderr).toContain(name);
  });

  it('fails for a backend that is not there, with what was tried', () => {
    if (existsSync(join(fixture(''), '..', '..', '..', 'out', 'ascend'))) return;
    const { status, stderr } = moeKernels(['run', fixture('olmoe'), '--backend', 'ascend']);
    expect(status).toBe(2);
    expect(stderr).toMatch(
      /ERR_MOE_BACKEND: .*the ascend backend is not built: .*not in this version.*tried .*ascend: no moe_ascend\.node in build\/Release or prebuilds/,
    );
  });
});
