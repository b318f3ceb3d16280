// `moe-kernels doctor`: what this machine can run, what it cannot and why, and whether what runs is right.
import { arch, availableParallelism, cpus, platform, release } from 'node:os';
import type { Command } from 'commander';
import { env } from '../env.js';
import { type BackendName, backendStatuses, createContext, MoeError } from '../index.js';
import { packageManifest } from '../package.js';
import { type SelfTest, selfTest } from './self_test.js';

interface BackendReport {
  state: string;
  detail: string;
  loadedFrom: string | null;
  attempts: readonly { path: string; error: string }[];
  devices: readonly string[];
  facts: Readonly<Record<string, string>>;
  /** Whether results of this backend on hardware were seen by this project. */
  verifiedOnHardware: boolean;
  selfTest: SelfTest | null;
}

interface Report {
  package: { name: string; version: string };
  node: string;
  os: { platform: string; arch: string; release: string };
  cpu: { model: string; threads: number; features: string };
  backends: Record<string, BackendReport>;
  /** What `createContext()` takes here, or why it fails. */
  auto: { backend: BackendName | null; error?: string };
  ok: boolean;
}

/**
 * Backends that have run on this kind of machine; the others are compiled and tested as far as that goes without it,
 * the CPU backend for other platforms by emulators (test/native/cross.sh).
 */
const verifiedOnHardware: Record<BackendName, boolean> = {
  cuda: true,
  ascend: false,
  cpu: platform() === 'linux' && arch() === 'x64',
  oracle: true,
};

export function registerDoctor(program: Command): void {
  program
    .command('doctor')
    .description('what this machine can run, and a self-test of every op of every backend that is ready')
    .option('--json', 'print one JSON object')
    .action(async ({ json }: { json?: boolean }) => {
      const report = await diagnose();
      console.log(json ? JSON.stringify(report, null, 2) : format(report));
      if (!report.ok) process.exitCode = 1;
    });
}

async function diagnose(): Promise<Report> {
  const { name, version } = packageManifest();
  const backends: Record<string, BackendReport> = {};
  for (const { backend, loadedFrom, ...status } of backendStatuses()) {
    backends[backend] = {
      ...status,
      loadedFrom: loadedFrom ?? null,
      verifiedOnHardware: verifiedOnHardware[backend],
      selfTest: status.state === 'ready' ? await test(backend) : null,
    };
  }
  backends.oracle = {
    state: 'ready',
    detail: 'pure TypeScript; the reference of every other backend',
    loadedFrom: null,
    attempts: [],
    devices: [],
    facts: {},
    verifiedOnHardware: verifiedOnHardware.oracle,
    selfTest: null,
  };
  const auto = await chosen();
  return {
    package: { name, version },
    node: process.version,
    os: { platform: platform(), arch: arch(), release: release() },
    cpu: {
      model: cpus()[0]?.model.trim() ?? 'unknown',
      threads: availableParallelism(),
      features: backends.cpu?.facts.features ?? '',
    },
    backends,
    auto,
    ok:
      auto.error === undefined &&
      Object.values(backends).every(({ state, selfTest }) => state !== 'failed' && (selfTest?.ok ?? true)),
  };
}

async function chosen(): Promise<Report['auto']> {
  try {
    await using context = await createContext();
    return { backend: context.backend };
  } catch (error) {
    if (!(error instanceof MoeError)) throw error;
    return { backend: null, error: error.message };
  }
}

async function test(backend: BackendName): Promise<SelfTest> {
  try {
    await using context = await createContext({ backend });
    return await selfTest(context);
  } catch (error) {
    if (!(error instanceof MoeError)) throw error;
    return { ok: false, ops: {}, error: error.message };
  }
}

function format({ package: { name, version }, node, os, cpu, backends, auto, ok }: Report): string {
  const lines = [
    `${name} ${version}, node ${node}, ${os.platform}-${os.arch} (${os.release})`,
    `CPU: ${cpu.model}, ${cpu.threads} threads${cpu.features === '' ? '' : `, ${cpu.features}`}`,
    '',
  ];
  for (const [backend, report] of Object.entries(backends)) {
    lines.push(`${backend.padEnd(7)} ${report.state}: ${report.detail}`);
    if (report.loadedFrom !== null) lines.push(`        loaded from ${report.loadedFrom}`);
    for (const { path, error } of report.attempts) lines.push(`        tried ${path}: ${error}`);
    for (const device of report.devices) lines.push(`        device ${device}`);
    const { isa, 'usable isas': isas } = report.facts;
    if (isa !== undefined) lines.push(`        instruction set ${isa} (of ${isas})`);
    if (!report.verifiedOnHardware) lines.push('        not run on hardware by this version');
    const { selfTest } = report;
    if (selfTest === null) continue;
    if (selfTest.error !== undefined) lines.push(`        self-test failed: ${selfTest.error}`);
    for (const [op, { ok: good, error }] of Object.entries(selfTest.ops)) {
      lines.push(`        ${good ? 'ok    ' : 'WRONG '} ${op}${error === undefined ? '' : `: ${error}`}`);
    }
  }
  const { name: variable, read } = env.backend;
  const asked = read() === undefined ? '' : ` (${variable}=${read()})`;
  lines.push('', auto.error ?? `createContext() takes ${auto.backend}${asked}.`);
  lines.push(ok ? 'Everything that is here works.' : 'Something is wrong; see above.');
  return lines.join('\n');
}
