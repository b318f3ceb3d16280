// `moe-kernels simulate`: replays a trace through several policies and prints what each would have given.
import type { Command } from 'commander';
import { checkPlannable, type Loads } from '../eplb/loads.js';
import { Planner } from '../eplb/planner.js';
import { policies, policyNamed, policySummaries } from '../eplb/registry.js';
import { serveTrace } from '../eplb/serve.js';
import { type PolicyFigures, simulate } from '../eplb/simulate.js';
import { MoeError } from '../errors.js';
import { counted } from '../report/plan_report.js';
import { checkReportFile, renderReport } from '../report/report_file.js';
import { simulationReport } from '../report/simulation_report.js';
import { aboutFile, keepDegenerate } from './about_file.js';
import { definitions } from './help.js';
import { integerOption, movesOption } from './integer_option.js';
import { addLoadsOptions, type LoadsFlags, readFlaggedLoads, requestOf } from './loads_options.js';
import { checkOutputs, writeFiles } from './output_files.js';
import { progress } from './progress.js';

interface SimulateFlags extends LoadsFlags {
  trace: string;
  devices: number;
  slots: number;
  window: number;
  policies?: string;
  maxMoves?: number;
  maxMovesPerLayer?: number;
  budgetFirst?: boolean;
  planSteps?: number;
  layersPerStep?: number;
  keepDegenerate?: boolean;
  report?: string;
  json?: boolean;
  byPlan?: boolean;
}

const misuse = (message: string, arg: string): MoeError =>
  new MoeError('ERR_MOE_INVALID_ARG', message, { op: 'simulate', arg });

type Row = PolicyFigures & { parServed?: number };

/** Adds the command `simulate`. */
export function registerSimulate(program: Command): void {
  const command = program.command('simulate');
  command
    .description('replay recorded loads through planners: quality, moves and time of each')
    .requiredOption('--trace <file>', 'loads: .npy, .json, .csv or .pt, [steps, layers, experts]')
    .requiredOption('--devices <n>', 'number of devices', integerOption('--devices', 1))
    .requiredOption('--slots <n>', 'expert slots per device', integerOption('--slots', 1))
    .requiredOption(
      '--window <n>',
      'steps per window: a plan is made after each',
      integerOption('--window', 1),
    )
    .option('--policies <names>', `comma-separated, of ${[...policies.keys()].join(', ')} (default: all)`)
    .option(
      '--max-moves <n>',
      'most expert weights to move per plan, after the first; unlimited: moves are free (default: what it takes, none for noise)',
      movesOption('--max-moves'),
    )
    .option(
      '--max-moves-per-layer <n>',
      'most expert weights to move per plan and layer, after the first',
      integerOption('--max-moves-per-layer', 0),
    )
    .option('--budget-first', 'the budget binds the first plan too');
  addLoadsOptions(command)
    .option(
      '--plan-steps <n>',
      'also serve the trace step by step, the budget binding every plan; a plan takes n steps',
      integerOption('--plan-steps', 1),
    )
    .option(
      '--layers-per-step <n>',
      'layers exchanged per step when serving (default 1)',
      integerOption('--layers-per-step', 1),
    )
    .option(
      '--keep-degenerate',
      'leave layers without usable load in a window as they are instead of refusing',
    )
    .option('--report <file>', 'write a report: .html or .svg')
    .option('--json', 'print the figures as JSON')
    .option('--by-plan', 'with --json: also the figures of the first plan and of every window')
    .addHelpText('after', definitions('Policies', policySummaries()))
    .action(runSimulate);
}

async function runSimulate(flags: SimulateFlags): Promise<void> {
  const listed = flags.policies?.split(',').map((name) => name.trim()) ?? policies.keys();
  const names = [...new Set(listed)].filter((name) => name !== '');
  if (names.length === 0) throw misuse('expected --policies to name at least one policy', 'policies');
  for (const name of names) policyNamed(name);
  const asked = requestOf('simulate', flags);
  if (flags.layersPerStep !== undefined && flags.planSteps === undefined)
    throw misuse(
      'expected --plan-steps with --layers-per-step: it serves the trace step by step',
      'plan-steps',
    );
  if (flags.byPlan === true && flags.json !== true)
    throw misuse('expected --json with --by-plan: the table has no room for it', 'json');
  if (flags.report !== undefined) checkReportFile(flags.report);
  await checkOutputs('simulate', [['--trace', flags.trace]], [['--report', flags.report]]);
  const trace = await readFlaggedLoads(flags.trace, flags);
  if (flags.keepDegenerate !== true)
    aboutFile(flags.trace, () => checkWindows(trace, flags.window), keepDegenerate);
  const planner = new Planner();
  const shape = {
    devices: flags.devices,
    slots: flags.slots,
    ...asked,
    degenerate: flags.keepDegenerate === true ? ('keep' as const) : ('reject' as const),
    ...(flags.maxMoves === undefined ? {} : { maxMoves: flags.maxMoves }),
    ...(flags.maxMovesPerLayer === undefined ? {} : { maxMovesPerLayer: flags.maxMovesPerLayer }),
    planner: planner.plan.bind(planner),
  };
  const rows: Row[] = [];
  const bar = progress('Simulating', 'plans', true);
  try {
    const figures = await aboutFile(flags.trace, () =>
      simulate(trace, {
        ...shape,
        policies: names,
        window: flags.window,
        budgetFirst: flags.budgetFirst === true,
        onPlan: (policy, plan, plans) =>
          bar.update(names.indexOf(policy) * plans + plan, names.length * plans),
      }),
    );
    const { planSteps } = flags;
    for (const figure of figures) {
      if (planSteps === undefined) rows.push(figure);
      else {
        const served = await aboutFile(flags.trace, () =>
          serveTrace(trace, {
            ...shape,
            policy: figure.name,
            collect: flags.window,
            plan: planSteps,
            layersPerStep: flags.layersPerStep ?? 1,
          }),
        );
        rows.push({ ...figure, parServed: served.mean });
      }
    }
  } finally {
    bar.stop();
    await planner.close();
  }
  if (flags.report !== undefined) {
    const report = simulationReport({ figures: rows, title: flags.trace, given: givenOf(flags, trace) });
    await writeFiles('simulate', [{ file: flags.report, text: await renderReport(flags.report, report) }]);
  }
  process.stdout.write(
    flags.json === true
      ? `${JSON.stringify({ policies: flags.byPlan === true ? rows : rows.map(figuresOf) })}\n`
      : simulationText(rows),
  );
}

/** Every window that will be planned on, before the first plan: the last one only judges. */
function checkWindows(trace: Loads, length: number): void {
  for (let start = 0; start + 2 * length <= trace.steps; start += length)
    checkPlannable(trace.window(start, length), `steps ${start}..${start + length - 1}`);
}

/** What a reader of the report has to know of the command. */
function givenOf(
  { devices, slots, window, maxMoves, ...flags }: SimulateFlags,
  trace: Loads,
): [string, string][] {
  const most = maxMoves === Number.POSITIVE_INFINITY ? 'unlimited' : maxMoves?.toString();
  const which = flags.budgetFirst === true ? 'in every plan' : 'in every plan after the first';
  return [
    [
      'shape',
      `${counted(trace.layers, 'layer')}, ${trace.experts} experts on ${counted(devices, 'device')} × ${counted(slots, 'slot')}`,
    ],
    ['windows', `${Math.floor(trace.steps / window)} of ${counted(window, 'step')}`],
    ...(most === undefined ? [] : [['most moves', `${most} ${which}`] as [string, string]]),
    ...(flags.maxMovesPerLayer === undefined
      ? []
      : [['most moves in a layer', `${flags.maxMovesPerLayer} ${which}`] as [string, string]]),
  ];
}

/** What one plan in the mean gave: the fields that `--json` promises. */
const figuresOf = (row: Row): object => {
  const { name, parSame, parNext, parStepSame, parStepNext, moves, layersTouched, ms, parServed } = row;
  const served = parServed === undefined ? {} : { parServed };
  return { name, parSame, parNext, parStepSame, parStepNext, moves, layersTouched, ms, ...served };
};

/** The figures as a table. */
function simulationText(rows: readonly Row[]): string {
  const columns: [string, (row: Row) => string][] = [
    ['policy', (row) => row.name],
    ['same', (row) => row.parSame.toFixed(4)],
    ['next', (row) => row.parNext.toFixed(4)],
    ['same_step', (row) => row.parStepSame.toFixed(4)],
    ['next_step', (row) => row.parStepNext.toFixed(4)],
    ['moves1', (row) => String(row.movesFirst)],
    ['moves', (row) => row.moves.toFixed(0)],
    ['layers', (row) => row.layersTouched.toFixed(1)],
    ['ms', (row) => row.ms.toFixed(1)],
  ];
  if (rows.some((row) => row.parServed !== undefined))
    columns.push(['served', (row) => row.parServed?.toFixed(4) ?? '']);
  const table = [columns.map(([title]) => title), ...rows.map((row) => columns.map(([, cell]) => cell(row)))];
  const widths = columns.map((_, column) => Math.max(...table.map((line) => line[column]!.length)));
  const lines = table.map((line) =>
    line.map((cell, column) =>
      column === 0 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!),
    ),
  );
  return [
    ...lines.map((line) => line.join('  ')),
    '',
    'PAR (peak over average device load, 1 is perfect) of the window planned on (same) and of the one after it (next),',
    'of their sums and as the mean of single steps; moves of the first plan (moves1) and, in the mean, of later ones.',
    '',
  ].join('\n');
}
