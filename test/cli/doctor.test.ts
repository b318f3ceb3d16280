import { describe, expect, it } from 'vitest';
import { env } from '../../lib/env.js';
import { policies } from '../../lib/eplb/registry.js';
import { moeKernels } from './command.js';

describe('moe-kernels doctor', () => {
  it('reports machine, backends and self-tests as JSON', () => {
    const { status, stdout } = moeKernels(['doctor', '--json']);
    expect(status).toBe(0);
    const report = JSON.parse(stdout);
    expect(report).toMatchObject({
      package: { name: 'moe-kernels' },
      node: process.version,
      os: { platform: process.platform, arch: process.arch },
      cpu: { model: expect.any(String), threads: expect.any(Number) },
      ok: true,
    });
    expect(Object.keys(report.backends)).toEqual(['cuda', 'ascend', 'cpu', 'oracle']);
    const states = ['ready', 'not built', 'no driver', 'no device', 'failed'];
    for (const { state, detail } of Object.values<{ state: string; detail: string }>(report.backends)) {
      expect(states).toContain(state);
      expect(detail.length).toBeGreaterThan(5);
    }
    expect(report.backends.cpu.loadedFrom).toMatch(/moe_cpu\.node$/);
    expect(report.backends.cpu.selfTest.ok).toBe(true);
    expect(report.backends.ascend.verifiedOnHardware).toBe(false);
    expect(report.backends[report.auto.backend].state).toBe('ready');
  });

  it('says what a context that does not say gets, or that its variables are wrong', () => {
    const asked = moeKernels(['doctor'], { MOE_KERNELS_BACKEND: 'oracle' });
    expect(asked.status).toBe(0);
    expect(asked.stdout).toMatch(/^createContext\(\) takes oracle \(MOE_KERNELS_BACKEND=oracle\)\.$/m);
    for (const [name, value] of [
      ['MOE_KERNELS_BACKEND', 'gpu'],
      ['MOE_KERNELS_THREADS', '0'],
    ]) {
      const wrong = moeKernels(['doctor'], { [name]: value });
      expect(wrong.status).toBe(1);
      expect(wrong.stdout).toMatch(new RegExp(`expected ${name}: .* but received '${value}'`));
      expect(wrong.stdout).toMatch(/Something is wrong; see above\./);
    }
  });

  it('tells people the same', () => {
    const { status, stdout } = moeKernels(['doctor']);
    expect(status).toBe(0);
    expect(stdout).toMatch(/^moe-kernels \d+\.\d+\.\d+, node v/);
    expect(stdout).toMatch(/^cpu +ready: /m);
    expect(stdout).toMatch(/ok +fused_moe/);
    expect(stdout).toMatch(/^ascend .*\n(.*\n)*? +not run on hardware/m);
    expect(stdout).toMatch(/Everything that is here works\./);
  });
});

describe('moe-kernels bench', () => {
  it('measures one op beside its floor and its baseline', () => {
    const { status, stdout, stderr } = moeKernels(['bench', 'moe_router', '--backend', 'cpu', '--json']);
    expect(status, stderr).toBe(0);
    const { circumstances, results } = JSON.parse(stdout);
    expect(circumstances).toMatchObject({
      backend: 'cpu',
      node: process.version,
      command: expect.stringMatching(/bench/),
    });
    expect(results.length).toBeGreaterThan(0);
    for (const result of results) {
      expect(result.op).toBe('moe_router');
      expect(result.microseconds).toBeGreaterThan(0);
      expect(result.floorMicroseconds).toBeGreaterThan(0);
      expect(result.path).not.toBe('');
    }
  });

  it('refuses unknown ops and lists the known ones', () => {
    const { status, stderr } = moeKernels(['bench', 'moe_magic']);
    expect(status).toBe(2);
    expect(stderr).toMatch(/one of .*fused_moe.*moe_router.* but received 'moe_magic'/);
  });
});

describe('moe-kernels --help', () => {
  it('lists every environment variable, and the commands that plan every policy', () => {
    const { status, stdout } = moeKernels(['--help']);
    expect(status).toBe(0);
    for (const { name } of Object.values(env)) expect(stdout).toMatch(new RegExp(`^  ${name} +\\S`, 'm'));
    for (const command of ['plan', 'simulate']) {
      const { stdout: help } = moeKernels([command, '--help']);
      for (const { name, summary } of policies.values())
        expect(help.replaceAll(/\s+/g, ' ')).toContain(` ${name} ${summary}`);
    }
    for (const line of stdout.split('\n')) expect(line.length, line).toBeLessThanOrEqual(80);
  });
});
