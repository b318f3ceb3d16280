// The report of a simulation: PAR over time and quality against moves of every policy.
import { Arguments } from '../arguments.js';
import type { PolicyFigures } from '../eplb/simulate.js';
import { costPicture, parByPolicyPicture, parOverTimePicture } from './pictures.js';
import type { Report, ReportPicture } from './report.js';

export interface SimulationReportInput {
  figures: readonly PolicyFigures[];
  title: string;
  /** Label and value of what was asked for, such as the window and a budget of moves. */
  given?: readonly (readonly [label: string, value: string])[];
}

const check = new Arguments('simulation_report');

/** Builds the report. Throws ERR_MOE_INVALID_ARG where there are no figures. */
export function simulationReport(input: SimulationReportInput): Report {
  const { figures, title, given = [] } = check.object('input', input, ['figures', 'title', 'given']);
  check.text('title', title);
  if (check.list('figures', figures).length === 0)
    check.refuse('figures', 'those of at least one policy', figures);
  const names = figures.map(({ name }) => name);
  const best = figures.reduce((chosen, row) => (row.parStepNext < chosen.parStepNext ? row : chosen));
  return {
    title: `Expert placement planners: ${title}`,
    lead: 'PAR is peak over average device load: 1 is perfect balance, and a step waits for its fullest device.',
    summary: [
      ['policies', names.join(', ')],
      ...given.map(([label, value]) => [label, value] as [string, string]),
      ['plans of each', String(figures[0]!.plans)],
      ['lowest PAR of next steps', `${best.name}, ${best.parStepNext.toFixed(4)}`],
    ],
    pictures: [
      servedPicture(figures, names),
      {
        heading: 'Quality against moves',
        caption:
          'PAR of the next steps over experts moved per plan (after the first). Down and left is better. Where one policy is far off, the best follow below on a scale of their own.',
        spec: costPicture(
          figures.map(({ name, moves, parStepNext }) => ({ policy: name, moves, par: parStepNext })),
          names,
        ),
      },
    ],
    table: {
      caption:
        'Same: PAR of the window that was planned on; next: of the one after it; steps: mean PAR of single steps. Moves, layers and ms are of a later plan, in the mean.',
      rows: [
        [
          'policy',
          'same',
          'next',
          'same, steps',
          'next, steps',
          'moves, first plan',
          'moves, later',
          'layers',
          'ms',
        ],
        ...figures.map((row) => [
          row.name,
          row.parSame.toFixed(4),
          row.parNext.toFixed(4),
          row.parStepSame.toFixed(4),
          row.parStepNext.toFixed(4),
          String(row.movesFirst),
          row.moves.toFixed(0),
          row.layersTouched.toFixed(1),
          row.ms.toFixed(1),
        ]),
      ],
    },
  };
}

/** What each policy gave the windows after those it saw: over time, or after a single plan as one figure. */
function servedPicture(figures: readonly PolicyFigures[], names: readonly string[]): ReportPicture {
  const rows = figures.flatMap(({ name, parStepNextByWindow }) =>
    parStepNextByWindow.map((par, index) => ({ policy: name, step: index + 2, par })),
  );
  if (rows.length === figures.length)
    return {
      heading: 'PAR by policy',
      caption: 'Mean PAR of the steps of the second window under the placement planned from the first.',
      spec: parByPolicyPicture(rows, names),
    };
  return {
    heading: 'PAR over time',
    caption:
      'Mean PAR of the steps of each window under the placement planned from the windows before it. Where one line dwarfs the rest, the best follow below on a scale of their own.',
    spec: parOverTimePicture(rows, names, 'window'),
  };
}
