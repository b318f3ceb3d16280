// The vega-lite pictures of the reports. Each takes plain rows and returns a specification with its data inside;
// colours follow one rule: blue for how it was or is, orange for what the plan makes of it.
import type { PictureSpec } from './report.js';

const schema = 'https://vega.github.io/schema/vega-lite/v6.json';
const before = '#4c78a8';
const after = '#f58518';

const base = (width: number, height: number) =>
  ({
    $schema: schema,
    width,
    height,
    autosize: { type: 'pad' as const },
    config: {
      view: { stroke: null },
      font: 'sans-serif',
      aria: false,
      axis: { labelFontSize: 11, titleFontSize: 12 },
    },
  }) as const;

export interface HeatCell {
  layer: number;
  /** Expert or device, by the picture. */
  column: number;
  /** Load over the layer's mean. */
  load: number;
}

/** Layers down, columns across, load over the mean as colour: white is the mean whatever the largest load. */
const heatEncoding = (column: string, title: string, limit: number) => ({
  x: { field: column, type: 'ordinal', title, axis: { labelOverlap: true, labelAngle: 0, ticks: false } },
  y: { field: 'layer', type: 'ordinal', title: 'layer', axis: { labelOverlap: true, ticks: false } },
  color: {
    field: 'load',
    type: 'quantitative',
    title: 'load / mean',
    scale: { domain: [0, 1, limit], range: ['#2166ac', '#f7f7f7', '#b2182b'], type: 'linear', clamp: true },
  },
});

/** Load over the layer's mean, one cell per layer and expert (or device). */
export function heatPicture(
  cells: readonly HeatCell[],
  columnTitle: string,
  layers: number,
  columns: number,
  limit: number,
): PictureSpec {
  return {
    ...base(Math.max(240, Math.min(900, columns * 14)), Math.max(80, Math.min(600, layers * 10))),
    data: { values: cells.map(({ layer, column, load }) => ({ layer, column, load })) },
    mark: { type: 'rect' },
    encoding: heatEncoding('column', columnTitle, limit),
  };
}

export interface DeviceLoad {
  layer: number;
  device: number;
  when: 'before' | 'after';
  load: number;
}

/** Device load over the mean by layer, before and after, side by side on one colour scale. */
export function deviceLoadPicture(
  loads: readonly DeviceLoad[],
  layers: number,
  devices: number,
): PictureSpec {
  const limit = Math.max(1.2, ...loads.map(({ load }) => load));
  const { width, height, ...rest } = base(
    Math.max(140, Math.min(430, devices * 12)),
    Math.max(80, Math.min(600, layers * 10)),
  );
  return {
    ...rest,
    data: { values: loads.map((row) => ({ ...row })) },
    facet: {
      column: {
        field: 'when',
        type: 'nominal',
        sort: ['before', 'after'],
        title: null,
        header: { labelFontSize: 13 },
      },
    },
    spec: {
      width,
      height,
      mark: { type: 'rect' },
      encoding: heatEncoding('device', 'device', limit),
    },
  };
}

/** An axis of whole numbers that ends where they end. */
const counted = {
  type: 'quantitative',
  axis: { tickMinStep: 1, format: 'd' },
  scale: { zero: false, nice: false },
} as const;

/** PAR of every layer, before and after. */
export function parByLayerPicture(
  rows: readonly { layer: number; when: 'before' | 'after'; par: number }[],
): PictureSpec {
  return {
    ...base(760, 220),
    data: { values: rows.map((row) => ({ ...row })) },
    // A single layer has no line: its points are all there is to see
    mark: { type: 'line', point: { size: rows.length <= 2 ? 90 : 22 }, interpolate: 'linear' },
    encoding: {
      x: { ...counted, field: 'layer', title: 'layer' },
      y: { field: 'par', type: 'quantitative', title: 'peak / average', scale: { zero: false } },
      color: {
        field: 'when',
        type: 'nominal',
        title: null,
        scale: { domain: ['before', 'after'], range: [before, after] },
      },
    },
  };
}

/** Experts moved, by layer. */
export function movesPicture(moves: readonly number[]): PictureSpec {
  return {
    ...base(760, 160),
    data: { values: moves.map((count, layer) => ({ layer, count })) },
    mark: { type: 'bar', color: after },
    encoding: {
      x: { field: 'layer', type: 'ordinal', title: 'layer', axis: { labelOverlap: true, labelAngle: 0 } },
      y: { field: 'count', type: 'quantitative', title: 'experts moved', axis: { tickMinStep: 1 } },
    },
  };
}

/** Policies whose excess over 1 is within this multiple of the best one's are drawn once more, larger. */
const near = 3;

/** The policies near the best, which a bad placement in the same picture would press into one place. */
function nearBest(rows: readonly { policy: string; par: number }[]): Set<string> {
  const excess = new Map<string, number>();
  for (const { policy, par } of rows) excess.set(policy, (excess.get(policy) ?? 0) + par - 1);
  const best = Math.min(...excess.values());
  return new Set([...excess.keys()].filter((policy) => excess.get(policy)! <= near * best));
}

/** `panel` of all rows; where some policies dwarf the others, also one of the others, on a scale of its own. */
function withNearBest<T extends { policy: string; par: number }>(
  rows: readonly T[],
  title: string,
  size: ReturnType<typeof base>,
  panel: (rows: readonly T[], title: string) => object,
): PictureSpec {
  const { width, height, ...rest } = size;
  const best = nearBest(rows);
  const good = rows.filter(({ policy }) => best.has(policy));
  const sized = (part: readonly T[], name: string): object => ({ width, height, ...panel(part, name) });
  return good.length === 0 || good.length === rows.length
    ? { ...rest, ...sized(rows, title) }
    : { ...rest, vconcat: [sized(rows, title), sized(good, `${title}, the best`)] };
}

/** PAR over windows or steps, one line for each policy, that of `chosen` on top and thicker. */
export function parOverTimePicture(
  rows: readonly { policy: string; window: number; par: number }[],
  order: readonly string[],
  unit: 'window' | 'step',
  chosen?: string,
): PictureSpec {
  const thick = rows.length > 150 ? 1.5 : 2;
  // Lines are drawn in the order of their data
  const drawn = [...rows].sort((one, two) => Number(one.policy === chosen) - Number(two.policy === chosen));
  return withNearBest(drawn, 'peak / average', base(760, 300), (values, title) => ({
    data: { values: values.map((row) => ({ ...row })) },
    mark: { type: 'line', ...(rows.length > 150 ? {} : { point: { size: 30 } }) },
    encoding: {
      x: { ...counted, field: 'window', title: unit },
      y: { field: 'par', type: 'quantitative', title, scale: { zero: false } },
      color: { field: 'policy', type: 'nominal', title: null, scale: { domain: [...order] } },
      strokeWidth: {
        condition: { test: `datum.policy === ${JSON.stringify(chosen ?? '')}`, value: 2 * thick },
        value: thick,
      },
    },
  }));
}

/** PAR of each policy, for loads without steps; the bars start at 1, which is perfect. */
export function parByPolicyPicture(
  rows: readonly { policy: string; par: number }[],
  order: readonly string[],
): PictureSpec {
  return {
    ...base(760, 26 * rows.length),
    data: { values: rows.map((row) => ({ ...row, label: row.par.toFixed(4) })) },
    encoding: {
      x: { field: 'par', type: 'quantitative', title: 'peak / average', scale: { domainMin: 1 } },
      y: { field: 'policy', type: 'nominal', title: null, sort: [...order] },
    },
    layer: [
      {
        mark: { type: 'bar' },
        encoding: {
          x2: { datum: 1 },
          color: { field: 'policy', type: 'nominal', scale: { domain: [...order] }, legend: null },
        },
      },
      {
        mark: { type: 'text', align: 'left', dx: 4, fontSize: 11 },
        encoding: { text: { field: 'label', type: 'nominal' } },
      },
    ],
  };
}

/** Ticks from 0 in steps of 1, 2 or 5 times a power of ten, at most eight. */
const ticks = (most: number): number[] => {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, most)));
  const step = [0.2, 0.5, 1].map((part) => part * power).find((size) => most / size <= 8) ?? 2 * power;
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, index) => index * step);
};

/** Quality against cost: moves per plan and PAR of the next window's steps, one point per policy. */
export function costPicture(
  rows: readonly { policy: string; moves: number; par: number }[],
  order: readonly string[],
): PictureSpec {
  const most = Math.max(1, ...rows.map(({ moves }) => moves));
  const byMoves = [...rows].sort((one, two) => one.moves - two.moves);
  return withNearBest(byMoves, 'PAR of next steps', base(760, 300), (values, title) => ({
    data: { values: values.map((row, index) => ({ ...row, above: index % 2 === 0 })) },
    layer: [
      { mark: { type: 'point', size: 80, filled: true } },
      ...[true, false].map((above) => ({
        // Neighbours are named on opposite sides
        transform: [{ filter: `datum.above === ${above}` }],
        mark: { type: 'text', dy: above ? -12 : 14, fontSize: 12 },
        encoding: { text: { field: 'policy', type: 'nominal' } },
      })),
    ],
    encoding: {
      x: {
        field: 'moves',
        type: 'quantitative',
        title: 'experts moved per plan',
        scale: { domain: [-0.05 * most, 1.05 * most], nice: false },
        axis: { values: ticks(most) },
      },
      y: { field: 'par', type: 'quantitative', title, scale: { zero: false, padding: 24 } },
      color: { field: 'policy', type: 'nominal', scale: { domain: [...order] }, legend: null },
    },
  }));
}
