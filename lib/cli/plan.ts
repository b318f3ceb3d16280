// `moe-kernels plan`: loads in, an expert map out. Everything is computed and checked before the first byte of any
// output file is written.
import type { Command } from 'commander';
import { checkPlannable, Loads } from '../eplb/loads.js';
import { bytesToMove } from '../eplb/metrics.js';
import type { Plan, PlanRequest } from '../eplb/plan.js';
import { Planner } from '../eplb/planner.js';
import { defaultPolicy, policies, policySummaries } from '../eplb/registry.js';
import { linear } from '../eplb/stay.js';
import { type Transfer, transferSchedule } from '../eplb/transfer.js';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import {
  type ExpertMapFormat,
  expertMapFormats,
  formatExpertMap,
  readExpertMap,
} from '../placement/expert_map_file.js';
import type { Placement } from '../placement/placement.js';
import { counted, planReport } from '../report/plan_report.js';
import { checkReportFile, renderReport } from '../report/report_file.js';
import { aboutFile, keepDegenerate } from './about_file.js';
import { definitions } from './help.js';
import { integerOption, movesOption } from './integer_option.js';
import { addLoadsOptions, type LoadsFlags, readFlaggedLoads, requestOf, sharedOf } from './loads_options.js';
import { checkOutputs, type OutputFile, writeFiles } from './output_files.js';
import { progress } from './progress.js';

interface PlanFlags extends LoadsFlags {
  loads: string;
  devices: number;
  slots: number;
  policy?: string;
  current?: string;
  physical?: boolean;
  maxMoves?: number;
  maxMovesPerLayer?: number;
  seed?: number;
  keepDegenerate?: boolean;
  format: string;
  out?: string;
  transfers?: string;
  expertBytes?: number;
  report?: string;
  json?: boolean;
}

const misuse = (message: string, arg: string): MoeError =>
  new MoeError('ERR_MOE_INVALID_ARG', message, { op: 'plan', arg });

/** Adds the command `plan`. */
export function registerPlan(program: Command): void {
  const command = program.command('plan');
  command
    .description('decide which device holds which expert, from recorded loads')
    .requiredOption(
      '--loads <file>',
      'loads: .npy, .json, .csv or .pt, [layers, experts] or [steps, layers, experts]',
    )
    .requiredOption('--devices <n>', 'number of devices', integerOption('--devices', 1))
    .requiredOption('--slots <n>', 'expert slots per device', integerOption('--slots', 1))
    .option('--policy <name>', `one of ${[...policies.keys()].join(', ')} (default: ${defaultPolicy})`)
    .option('--current <map>', 'expert map in use; without it everything is planned anew')
    .option('--physical', 'the loads are counts per slot of --current');
  addLoadsOptions(command)
    .option(
      '--max-moves <n>',
      'most expert weights to move, all layers together; unlimited: moves are free (default: what it takes, none for noise)',
      movesOption('--max-moves'),
    )
    .option(
      '--max-moves-per-layer <n>',
      'most expert weights to move in a layer',
      integerOption('--max-moves-per-layer', 0),
    )
    .option('--seed <n>', 'seed of planners that draw numbers', integerOption('--seed', 0))
    .option('--keep-degenerate', 'leave layers without usable load as they are instead of refusing')
    .option('--format <name>', `format of --out: ${expertMapFormats.join(', ')}`, expertMapFormats[0])
    .option('--out <map>', 'write the expert map')
    .option('--transfers <file>', 'write who sends which expert to whom, as JSON')
    .option(
      '--expert-bytes <n>',
      "bytes of one expert's weights, to state the bytes to move",
      integerOption('--expert-bytes', 1),
    )
    .option('--report <file>', 'write a report: .html or .svg')
    .option('--json', 'print the plan as JSON')
    .addHelpText('after', definitions('Policies', policySummaries()))
    .action(runPlan);
}

async function runPlan(flags: PlanFlags): Promise<void> {
  const format = flags.format as ExpertMapFormat;
  if (!expertMapFormats.includes(format))
    throw misuse(
      `expected --format to be one of ${expertMapFormats.join(', ')} but received ${describeValue(flags.format)}`,
      'format',
    );
  const asked = requestOf('plan', flags);
  if (flags.report !== undefined) checkReportFile(flags.report);
  const beside = [
    ['--transfers', flags.transfers],
    ['--report', flags.report],
  ] as const;
  await checkOutputs('plan', [['--loads', flags.loads]], [['--out', flags.out], ...beside]);
  await checkOutputs('plan', [['--current', flags.current]], beside); // --out may replace the map in use
  const { loads, current } = await readInputs(flags);
  if (flags.keepDegenerate !== true) aboutFile(flags.loads, () => checkPlannable(loads), keepDegenerate);
  const request: PlanRequest = {
    loads,
    devices: flags.devices,
    slots: flags.slots,
    ...asked,
    degenerate: flags.keepDegenerate === true ? 'keep' : 'reject',
    ...(current === undefined ? {} : { current }),
    ...(flags.policy === undefined ? {} : { policy: flags.policy }),
    ...(flags.maxMoves === undefined ? {} : { maxMoves: flags.maxMoves }),
    ...(flags.maxMovesPerLayer === undefined ? {} : { maxMovesPerLayer: flags.maxMovesPerLayer }),
    ...(flags.seed === undefined ? {} : { seed: flags.seed }),
  };
  const planner = new Planner();
  let plan: Plan;
  const others: Plan[] = [];
  const bar = progress('Planning', 'layers', true);
  try {
    plan = await aboutFile(flags.loads, () =>
      planner.plan(request, { onProgress: (done, layers) => bar.update(done, layers) }),
    );
    // The report shows what every policy that moves experts would make of these loads
    if (flags.report !== undefined)
      for (const policy of policies.keys())
        if (policy !== plan.policy && policy !== linear.name)
          others.push(await planner.plan({ ...request, policy }));
  } finally {
    bar.stop();
    await planner.close();
  }
  const outputs: OutputFile[] = [];
  if (flags.out !== undefined)
    outputs.push({ file: flags.out, text: formatExpertMap(plan.placements, format) });
  if (flags.transfers !== undefined) {
    const text = `${JSON.stringify({ layers: transfersOf(plan) })}\n`;
    outputs.push({ file: flags.transfers, text });
  }
  if (flags.report !== undefined) {
    const report = planReport({ loads, plan, others, title: flags.loads, given: givenOf(flags) });
    outputs.push({ file: flags.report, text: await renderReport(flags.report, report) });
  }
  await writeFiles('plan', outputs);
  process.stdout.write(
    flags.json === true ? `${JSON.stringify(planJson(plan, loads, flags))}\n` : planText(plan, flags),
  );
}

const transfersOf = ({ from, placements }: Plan): Transfer[][] =>
  placements.map((placement, layer) => transferSchedule(from[layer]!, placement));

/** What a reader of the report has to know of the command beside the shape. */
function givenOf({ current, maxMoves, maxMovesPerLayer, ...flags }: PlanFlags): [string, string][] {
  const { sharedPlacement, groups, nodes } = flags;
  const shared = sharedOf(flags);
  const where = sharedPlacement === 'free' ? 'placed freely' : 'on every device';
  const rows: [label: string, value: string | undefined][] = [
    ['placement in use', current ?? 'none given: experts in order, copies appended'],
    ['most moves', maxMoves === Number.POSITIVE_INFINITY ? 'unlimited' : maxMoves?.toString()],
    ['most moves in a layer', maxMovesPerLayer?.toString()],
    ['shared experts', shared === 0 ? undefined : `the last ${shared}, ${where}`],
    ['expert groups, nodes', (groups ?? nodes) === undefined ? undefined : `${groups ?? 1}, ${nodes ?? 1}`],
  ];
  return rows.filter((row): row is [string, string] => row[1] !== undefined);
}

async function readInputs(flags: PlanFlags): Promise<{ loads: Loads; current: Placement[] | undefined }> {
  if (flags.sharedTopK !== undefined && flags.physical === true)
    throw misuse(
      'expected no --shared-top-k with --physical: the slots of shared experts have counts of their own',
      'shared-top-k',
    );
  if (flags.physical === true && flags.current === undefined)
    throw misuse('expected --current with --physical: it says which expert each slot held', 'current');
  const raw = await readFlaggedLoads(flags.loads, flags);
  const current =
    flags.current === undefined
      ? undefined
      : await readExpertMap(flags.current, {
          devices: flags.devices,
          ...(flags.physical === true ? {} : { experts: raw.experts }),
        });
  const contradiction = (message: string): MoeError =>
    new MoeError('ERR_MOE_CHECKPOINT', `${flags.current}: ${message}`, { op: 'plan', arg: 'current' });
  if (current !== undefined && current.length !== raw.layers)
    throw contradiction(
      `expected ${raw.layers} layers, as in ${flags.loads}, but received ${current.length}`,
    );
  if (current !== undefined && current[0]!.slots !== flags.slots)
    throw contradiction(
      `expected ${flags.slots} slots on every device (--slots) but received ${current[0]!.slots}`,
    );
  const loads =
    flags.physical === true ? aboutFile(flags.loads, () => Loads.fromPhysical(raw, current!)) : raw;
  return { loads, current };
}

function planJson(plan: Plan, loads: Loads, flags: PlanFlags): object {
  return {
    policy: plan.policy,
    ms: plan.ms,
    layers: loads.layers,
    devices: flags.devices,
    slots: flags.slots,
    par: { before: plan.par.before.mean, after: plan.par.after.mean },
    parStep: { before: plan.parStep.before.mean, after: plan.parStep.after.mean },
    moves: plan.moves,
    layersTouched: plan.layersTouched,
    ...(flags.expertBytes === undefined ? {} : { bytes: bytesToMove(plan.movesPerLayer, flags.expertBytes) }),
    placement: plan.placements.map((placement) => placement.toRows()),
  };
}

function planText(plan: Plan, { devices, slots, out, transfers, report, expertBytes }: PlanFlags): string {
  const arrow = (before: number, after: number): string => `${before.toFixed(4)} -> ${after.toFixed(4)}`;
  return [
    `policy          ${plan.policy} (${plan.ms.toFixed(1)} ms)`,
    `placement       ${counted(plan.placements.length, 'layer')}, ${plan.placements[0]!.experts} experts ` +
      `on ${counted(devices, 'device')} x ${counted(slots, 'slot')}`,
    `PAR of window   ${arrow(plan.par.before.mean, plan.par.after.mean)} (worst layer ${arrow(plan.par.before.max, plan.par.after.max)})`,
    `PAR of steps    ${arrow(plan.parStep.before.mean, plan.parStep.after.mean)}`,
    `moves           ${counted(plan.moves, 'expert')} in ${counted(plan.layersTouched, 'layer')}`,
    ...(expertBytes === undefined ? [] : [`bytes to move   ${bytesToMove(plan.movesPerLayer, expertBytes)}`]),
    ...(out === undefined ? [] : [`map             ${out}`]),
    ...(transfers === undefined ? [] : [`transfers       ${transfers}`]),
    ...(report === undefined ? [] : [`report          ${report}`]),
    '',
  ].join('\n');
}
