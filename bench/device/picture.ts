// Pictures of a run on a device: the package's times over tokens, with floors, controls and recorded peers around them.
import type { PictureSpec, Report, ReportPicture } from '../../lib/report/report.js';
import type { DeviceResult } from './case.js';
import type { DeviceReport } from './run.js';

interface Point {
  readonly series: string;
  readonly tokens: number;
  readonly microseconds: number;
}

type Kind = 'package' | 'control' | 'recorded' | 'floor';

/** Solid and warm for the package, dashed for what ran beside it, thin and cold for what was recorded, grey floors. */
const looks: Readonly<Record<Kind, { dash: number[]; width: number; colours: readonly string[] }>> = {
  package: { dash: [1, 0], width: 3, colours: ['#f58518', '#e45756', '#b279a2'] },
  control: { dash: [6, 3], width: 2, colours: ['#54a24b', '#88b04b'] },
  recorded: {
    dash: [1, 0],
    width: 1.2,
    colours: ['#4c78a8', '#72b7b2', '#1f3b5c', '#9ecae9', '#7f6d9f', '#3c9aa3', '#6baed6'],
  },
  floor: { dash: [2, 3], width: 1.2, colours: ['#999999', '#bbbbbb'] },
};

class Lines {
  readonly #kinds = new Map<string, Kind>();
  readonly #points = new Map<string, Point>();

  add(kind: Kind, series: string, tokens: number, microseconds: number): void {
    this.#kinds.set(series, kind);
    this.#points.set(`${series} ${tokens}`, { series, tokens, microseconds });
  }

  /** A result under `label`, with those of its neighbours that `wanted` names. */
  addResult(label: string, result: DeviceResult, wanted: (peer: string) => boolean): void {
    const { tokens, recorded, controls } = result;
    this.add('package', `moe-kernels${label}`, tokens, result.microseconds);
    this.add('floor', `floor${label}`, tokens, result.floorMicroseconds);
    for (const [name, figure] of Object.entries(recorded)) {
      if (wanted(name)) this.add('recorded', `${name} (recorded)`, tokens, figure);
    }
    for (const [name, figure] of Object.entries(controls)) {
      this.add('control', `${name} (this run)`, tokens, figure);
    }
  }

  get empty(): boolean {
    return this.#points.size === 0;
  }

  spec(): PictureSpec {
    const order = (Object.keys(looks) as Kind[]).flatMap((kind) =>
      [...this.#kinds]
        .filter(([, of]) => of === kind)
        .map(([series], i) => {
          const { dash, width, colours } = looks[kind];
          return { series, dash, width, colour: colours[i % colours.length] };
        }),
    );
    const domain = order.map(({ series }) => series);
    return {
      $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
      width: 640,
      height: 360,
      autosize: { type: 'pad' },
      config: {
        view: { stroke: null },
        axis: { gridOpacity: 0.4 },
        font: 'sans-serif',
        aria: false,
        legend: { labelLimit: 300, symbolType: 'stroke' },
      },
      data: { values: [...this.#points.values()] },
      mark: { type: 'line', point: { size: 18 } },
      encoding: {
        x: { field: 'tokens', type: 'quantitative', title: 'tokens', scale: { type: 'log', nice: false } },
        y: { field: 'microseconds', type: 'quantitative', title: 'us per launch', scale: { type: 'log' } },
        color: {
          field: 'series',
          type: 'nominal',
          title: null,
          sort: domain,
          scale: { domain, range: order.map(({ colour }) => colour) },
        },
        strokeDash: {
          field: 'series',
          type: 'nominal',
          scale: { domain, range: order.map(({ dash }) => dash) },
        },
        strokeWidth: {
          field: 'series',
          type: 'ordinal',
          sort: domain,
          scale: { domain, range: order.map(({ width }) => width) },
        },
      },
    };
  }
}

/** A picture of every table that the run has and that has peers. */
export function deviceReport({ date, device, recorded, tables }: DeviceReport): Report {
  const results = Object.values(tables).flatMap((table) => table.results);
  const pictures: ReportPicture[] = [];
  const picture = (heading: string, lines: Lines) => {
    if (!lines.empty) pictures.push({ heading, caption: '', spec: lines.spec() });
  };

  const gates = new Lines();
  for (const dtype of ['bf16', 'f32']) {
    const of = results.filter((result) => result.case === `256/8/4/8 sigmoid ${dtype}`);
    const shown = /^(cake bf16|sgl bf16|sgl f32|vllm f32)$/; // the others lie on these
    for (const result of of) gates.addResult(` ${dtype}`, result, (peer) => shown.test(peer));
  }
  picture(`Gate: 256 experts, 8 groups of which 4 stay, top 8 (${device}, ${date})`, gates);

  const dispatches = new Lines();
  const aligned = results.filter((result) => result.case === '257 experts, 9 columns, blocks of 128');
  for (const result of aligned) dispatches.addResult('', result, () => true);
  picture(`Dispatch: 257 experts, 9 columns, blocks of 128 (${device}, ${date})`, dispatches);

  const layers = results.filter(({ op }) => op === 'fused_moe');
  for (const name of new Set(layers.map((result) => result.case))) {
    const lines = new Lines();
    const shown = /^(Triton best|DeepGEMM|_grouped_mm, vLLM permute)$/;
    for (const result of layers)
      if (result.case === name) lines.addResult('', result, (peer) => shown.test(peer));
    picture(`Routed experts, ${name} (${device}, ${date})`, lines);
  }
  return { title: `moe-kernels on ${device}, ${date}; recorded figures: ${recorded}`, summary: [], pictures };
}
