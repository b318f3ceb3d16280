// A run of device benches from its ceilings to its report. What it runs on and beside comes from the caller.
import type { Context } from '../../lib/index.js';
import { recordedOn } from '../peers.js';
import { type CallTimes, callTimes } from './calls.js';
import type { Ceilings, DeviceTable } from './case.js';
import type { Control } from './controls.js';
import { gates, sweep } from './gate_cases.js';
import { experts, routers, sharedTable } from './matrix_cases.js';
import { measureTable } from './measure.js';
import { combines, dispatches } from './move_cases.js';
import { ceilingsText, type MeasuredTable, tableText } from './report.js';
import { Timer, type TimingOptions } from './timing.js';

export const deviceTables: Readonly<Record<string, DeviceTable>> = {
  sweep,
  gates,
  dispatch: dispatches,
  combine: combines,
  router: routers,
  shared: sharedTable,
  experts,
};

/** Controls of the tables that have one, and how many seconds each may take. */
const controlOf: Readonly<Record<string, readonly [script: string, seconds: number]>> = {
  sweep: ['torch_gate.py', 150],
  experts: ['torch_experts.py', 120],
};

/** Not a table of cases: what calls cost the JS thread. */
export const CALLS = 'calls';

export interface DeviceReport {
  readonly date: string;
  readonly device: string;
  readonly node: string;
  readonly command: string;
  readonly method: string;
  /** Where the recorded figures come from. */
  readonly recorded: string;
  readonly ceilings: { readonly before: Ceilings; readonly after?: Ceilings };
  readonly controls: readonly Control[];
  readonly tables: Readonly<Record<string, MeasuredTable>>;
  readonly gateAndDispatch?: CallTimes;
}

export interface DeviceRun {
  /** Names of `tables`, or 'calls'. */
  readonly names: readonly string[];
  readonly command: string;
  readonly open: () => Promise<Context>;
  readonly tables: Readonly<Record<string, DeviceTable>>;
  readonly timing: TimingOptions;
  readonly measureCeilings: () => Ceilings;
  readonly runControl: (script: string, limitSeconds: number) => Control;
  readonly print: (text: string) => void;
  readonly progress: (text: string) => void;
  /** Called after every table: what is there survives whatever comes. */
  readonly save: (report: DeviceReport) => void;
}

export async function runDeviceBench(run: DeviceRun): Promise<DeviceReport> {
  const { names, print, progress } = run;
  const before = run.measureCeilings();
  const controls = names.flatMap((name) => {
    const control = controlOf[name];
    if (control === undefined) return [];
    return [run.runControl(...control)];
  });
  const matmul = controls.map(({ about }) => about.matmulFlopsPerSecond).find(isNumber);
  const ceilings = { ...before, ...(matmul === undefined ? {} : { matmulFlopsPerSecond: matmul }) };

  const context = await run.open();
  const about = {
    date: new Date().toISOString().slice(0, 10),
    device: context.describe().device,
    node: process.version,
    command: run.command,
    method:
      'captures of launches on rotating buffers, a read of 512 MiB before each; wall clock of replays less the read',
    recorded: recordedOn,
  };
  for (const [name, value] of Object.entries(about)) print(`${name}: ${value}`);
  print(ceilingsText('before', ceilings));
  for (const { script, about: facts, lines, note } of controls) {
    const version = facts.torch === undefined ? '' : `PyTorch ${facts.torch}, `;
    print(`bench/${script}: ${version}${lines.length} times${note === undefined ? '' : `; ${note}`}`);
  }

  let report: DeviceReport = { ...about, ceilings: { before: ceilings }, controls, tables: {} };
  const timer = new Timer(context, run.timing);
  for (const name of names) {
    const begun = performance.now();
    if (name === CALLS) {
      const gateAndDispatch = await callTimes(context);
      print('\nA gate and a dispatch of 64 tokens on the JS thread');
      for (const [what, microseconds] of Object.entries(gateAndDispatch)) {
        print(`${what}: ${microseconds.toFixed(2)}`);
      }
      report = { ...report, gateAndDispatch };
    } else {
      const measured = measureTable(run.tables[name], { context, timer, ceilings, controls, progress });
      print(tableText(measured));
      report = { ...report, tables: { ...report.tables, [name]: measured } };
    }
    run.save(report);
    progress(`${name}: ${((performance.now() - begun) / 1e3).toFixed(1)} s`);
  }
  timer.dispose();
  await context.close();
  const after = run.measureCeilings();
  print(`\n${ceilingsText('after', after)}`);
  report = { ...report, ceilings: { before: ceilings, after } };
  run.save(report);
  return report;
}

const isNumber = (value: unknown): value is number => typeof value === 'number';
