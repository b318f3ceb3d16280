// The report of one plan: what the load looks like, what the devices carry before and after, and what it costs.
import { Arguments } from '../arguments.js';
import { Loads } from '../eplb/loads.js';
import { deviceLoads, parByStep } from '../eplb/metrics.js';
import type { Plan } from '../eplb/plan.js';
import { transferSchedule } from '../eplb/transfer.js';
import { Placement } from '../placement/placement.js';
import {
  type DeviceLoad,
  deviceLoadPicture,
  type HeatCell,
  heatPicture,
  movesPicture,
  parByLayerPicture,
  parByPolicyPicture,
  parOverTimePicture,
} from './pictures.js';
import type { Report, ReportPicture } from './report.js';

export interface PlanReportInput {
  loads: Loads;
  plan: Plan;
  /** What other policies plan for the same loads, to be drawn beside this plan over time. */
  others?: readonly Plan[];
  /** What was planned, for the title: usually the file of the loads. */
  title: string;
  /** Label and value of what was asked for beside the shape, such as a budget of moves. */
  given?: readonly (readonly [label: string, value: string])[];
}

/** `1 layer`, `2 layers`. */
export const counted = (count: number, noun: string): string => `${count} ${noun}${count === 1 ? '' : 's'}`;

const overMean = (values: ArrayLike<number>): number[] => {
  const list = Array.from(values);
  const mean = list.reduce((sum, value) => sum + value, 0) / list.length;
  return list.map((value) => (mean > 0 ? Math.round((value / mean) * 1000) / 1000 : 0));
};

const mostPoints = 200;

/** At most `mostPoints` steps and their values: the first of a group of neighbours, and their mean. */
const grouped = (values: Float64Array): { step: number; value: number }[] => {
  const points = Math.min(mostPoints, values.length);
  return Array.from({ length: points }, (_, point) => {
    const step = Math.floor((point * values.length) / points);
    const part = values.subarray(step, Math.floor(((point + 1) * values.length) / points));
    return { step, value: part.reduce((sum, value) => sum + value, 0) / part.length };
  });
};

const check = new Arguments('plan_report');

function checkLayers(arg: string, placements: readonly Placement[], loads: Loads): void {
  if (check.instances(arg, placements, Placement).length !== loads.layers)
    check.refuse(arg, `placements of ${loads.layers} layers, as the loads have`, placements);
}

/** Builds the report. Throws ERR_MOE_INVALID_ARG where loads, plans and placements do not belong together. */
export function planReport(input: PlanReportInput): Report {
  const known = ['loads', 'plan', 'others', 'title', 'given'];
  const { loads, plan, others = [], title, given = [] } = check.object('input', input, known);
  check.instance('loads', loads, Loads);
  check.text('title', title);
  for (const [name, one] of [
    ['plan', plan] as const,
    ...check.list('others', others).map((other) => ['others', other] as const),
  ])
    checkLayers(name, check.object(name, one).placements, loads);
  checkLayers('plan.from', plan.from, loads);
  check.list('given', given);
  const { from } = plan;
  const { devices, slots, experts } = plan.placements[0]!;
  const heat: HeatCell[] = [];
  const devicesBefore: DeviceLoad[] = [];
  const parRows: { layer: number; when: 'before' | 'after'; par: number }[] = [];
  let rounds = 0;
  let busiest = 0;
  for (let layer = 0; layer < loads.layers; layer++) {
    const total = loads.total(layer);
    for (const [column, load] of overMean(total).entries()) heat.push({ layer, column, load });
    for (const [when, placement] of [
      ['before', from[layer]!],
      ['after', plan.placements[layer]!],
    ] as const) {
      for (const [device, load] of overMean(deviceLoads(placement, total)).entries())
        devicesBefore.push({ layer, device, when, load });
      parRows.push({ layer, when, par: plan.par[when].layers[layer]! });
    }
    const sends = new Map<number, number>();
    for (const { round, from: sender } of transferSchedule(from[layer]!, plan.placements[layer]!)) {
      rounds = Math.max(rounds, round + 1);
      sends.set(sender, (sends.get(sender) ?? 0) + 1);
      busiest = Math.max(busiest, sends.get(sender)!);
    }
  }
  const series = [
    { name: 'before', placements: from },
    ...[plan, ...others].map(({ policy, placements }) => ({ name: policy, placements })),
  ];
  const change = (figures: { before: { mean: number }; after: { mean: number } }): string =>
    `${figures.before.mean.toFixed(4)} → ${figures.after.mean.toFixed(4)}`;
  return {
    title: `Expert placement plan: ${title}`,
    lead: 'PAR is peak over average device load: 1 is perfect balance, and a step waits for its fullest device.',
    summary: [
      ['policy', plan.policy],
      [
        'shape',
        `${counted(loads.layers, 'layer')}, ${experts} experts on ${counted(devices, 'device')} × ` +
          `${counted(slots, 'slot')}; ${counted(loads.steps, 'step')} of load`,
      ],
      ...given.map(([label, value]) => [label, value] as [string, string]),
      ['PAR of the window, mean over layers', change(plan.par)],
      [
        'PAR of the window, worst layer',
        `${plan.par.before.max.toFixed(4)} → ${plan.par.after.max.toFixed(4)}`,
      ],
      ['PAR of the steps, mean', change(plan.parStep)],
      [
        'experts moved',
        `${plan.moves} in ${counted(plan.layersTouched, 'layer')}, of ${loads.layers * devices * slots} slots`,
      ],
      [
        'transfers',
        rounds === 0
          ? 'none'
          : `at most ${busiest} sent by a device and ${counted(rounds, 'round')} in a layer`,
      ],
      ['planning time', `${plan.ms.toFixed(1)} ms`],
    ],
    pictures: [
      {
        heading: 'Heat of experts by layer',
        caption:
          'Load of every expert over the mean of its layer. Red experts are hot; a red column means the same id is hot in many layers.',
        spec: heatPicture(heat, 'expert', loads.layers, loads.experts),
      },
      {
        heading: 'Device load, before and after',
        caption:
          'Load of every device over the mean of the layer, tokens split evenly over replicas. White is balanced.',
        spec: deviceLoadPicture(devicesBefore, loads.layers, devices),
      },
      {
        heading: 'Peak over average by layer',
        caption: 'PAR of the whole window.',
        spec: parByLayerPicture(parRows),
      },
      policiesPicture(loads, series, plan.policy),
      {
        heading: 'Moves by layer',
        caption: 'Expert weights that devices must receive.',
        spec: movesPicture(Array.from(plan.movesPerLayer)),
      },
    ],
    table: {
      caption:
        'PAR of the window of each layer, mean PAR of its steps, and the expert weights that devices receive.',
      rows: [
        ['layer', 'PAR before', 'PAR after', 'steps before', 'steps after', 'moves'],
        ...Array.from({ length: loads.layers }, (_, layer) => [
          String(layer),
          plan.par.before.layers[layer]!.toFixed(4),
          plan.par.after.layers[layer]!.toFixed(4),
          plan.parStep.before.layers[layer]!.toFixed(4),
          plan.parStep.after.layers[layer]!.toFixed(4),
          String(plan.movesPerLayer[layer]),
        ]),
      ],
    },
  };
}

/** What each policy makes of these loads: over time, or where there is one step only as one figure. */
function policiesPicture(
  loads: Loads,
  series: readonly { name: string; placements: readonly Placement[] }[],
  chosen: string,
): ReportPicture {
  const names = series.map(({ name }) => name);
  const rows = series.flatMap(({ name, placements }) =>
    grouped(parByStep(loads, placements)).map(({ step, value }) => ({ policy: name, step, par: value })),
  );
  if (loads.steps === 1)
    return {
      heading: 'PAR by policy',
      caption: 'Mean PAR over layers: as it was, and under what each policy plans for these loads.',
      spec: parByPolicyPicture(rows, names),
    };
  const groups = loads.steps > mostPoints ? ', averaged in groups' : '';
  return {
    heading: 'PAR over time',
    caption: `Mean PAR over layers of every step${groups}: as it was, and under what each policy plans for these very steps (${chosen} is the plan); how plans serve the steps after them is for simulate to show. Where one line dwarfs the rest, the best follow below on a scale of their own.`,
    spec: parOverTimePicture(rows, names, 'step', chosen),
  };
}
