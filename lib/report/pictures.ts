// The vega-lite pictures of the reports. Each takes plain rows and returns a specification with its data inside;
// colours follow one rule: blue for how it was or is, orange for what the plan makes of it, and every policy has its own
// colour in all reports.
import { policies } from '../eplb/registry.js';
import { linear } from '../eplb/stay.js';
import type { PictureSpec } from './report.js';

const schema = 'https://vega.github.io/schema/vega-lite/v6.json';
const before = '#4c78a8';
const after = '#f58518';
const others = ['#e45756', '#72b7b2', '#54a24b', '#eeca3b', '#b279a2', '#ff9da6', '#9d755d', '#bab0ac'];

/** Colours of policies by name; what never moves is how it was. */
function policyColours(names: readonly string[]): { domain: string[]; range: string[] } {
  const moving = [...policies.keys()].filter((name) => name !== linear.name);
  const palette = [after, ...others];
  return { domain: [...names], range: names.map((name) => palette[moving.indexOf(name)] ?? before) };
}

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

/** Even steps from 0, `most` with room before it, and 1, which is white. */
const heatTicks = (most: number): number[] => {
  const step = most > 4 ? 2 : most > 2 ? 1 : 0.5;
  const even = Array.from({ length: Math.ceil(most / step) }, (_, index) => index * step);
  return [...new Set([...even.filter((tick) => tick < 0.9 * most), 1, most])].sort((one, two) => one - two);
};

/**
 * Layers down, columns across, load over the mean as colour: white is the mean whatever the largest load. `clamped` says
 * that there are loads beyond the limit.
 */
const heatEncoding = (column: string, title: string, limit: number, clamped: boolean) => ({
  x: { field: column, type: 'ordinal', title, axis: { labelOverlap: true, labelAngle: 0, ticks: false } },
  y: { field: 'layer', type: 'ordinal', title: 'layer', axis: { labelOverlap: true, ticks: false } },
  color: {
    field: 'load',
    type: 'quantitative',
    title: 'load / mean',
    scale: { domain: [0, 1, limit], range: ['#2166ac', '#f7f7f7', '#b2182b'], type: 'linear', clamp: true },
    legend: {
      values: heatTicks(limit),
      gradientLength: 140,
      labelExpr: `${clamped ? `datum.value >= ${limit} ? '≥ ' + datum.label : ` : ''}datum.label`,
      format: '.2~f',
    },
  },
});

/** The largest load that has a colour of its own: one hot expert must not turn all others blue. */
const hottest = 8;

/** Load over the layer's mean, one cell per layer and expert (or device). */
export function heatPicture(
  cells: readonly HeatCell[],
  columnTitle: string,
  layers: number,
  columns: number,
): PictureSpec {
  const most = cells.reduce((highest, { load }) => Math.max(highest, load), 0);
  const limit = Math.max(2, Math.min(hottest, most));
  return {
    ...base(Math.max(240, Math.min(900, columns * 14)), Math.max(80, Math.min(600, layers * 10))),
    data: { values: cells.map(({ layer, column, load }) => ({ layer, column, load })) },
    mark: { type: 'rect' },
    encoding: heatEncoding('column', columnTitle, limit, most > limit),
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
  const limit = loads.reduce((most, { load }) => Math.max(most, load), 1.2);
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
      encoding: heatEncoding('device', 'device', limit, false),
    },
  };
}

/** Above the picture, where a narrow window shows it too. */
const legend = { orient: 'top', labelFontSize: 12 } as const;

/** An axis of whole numbers that ends where they end. */
const counted = {
  type: 'quantitative',
  axis: { tickMinStep: 1, format: 'd' },
  scale: { zero: false, nice: false },
} as const;

/** PAR starts at 1, not at 0, or above it where that is far off; where all are one, there is an axis all the same. */
const parScale = (rows: readonly { par: number }[]): object => {
  const least = rows.reduce((low, { par }) => Math.min(low, par), Number.POSITIVE_INFINITY);
  const most = rows.reduce((high, { par }) => Math.max(high, par), 0);
  if (most - least <= 1e-6) return { domain: [1, Math.max(1.1, 2 * most - 1)] };
  return { zero: false, ...(least - 1 < 0.3 * (most - least) ? { domainMin: 1 } : {}) };
};

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
      y: { field: 'par', type: 'quantitative', title: 'peak / average', scale: parScale(rows) },
      color: {
        field: 'when',
        type: 'nominal',
        title: null,
        legend,
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
      y: {
        field: 'count',
        type: 'quantitative',
        title: 'experts moved',
        axis: { tickMinStep: 1, format: 'd' },
        scale: { domainMax: moves.reduce((most, count) => Math.max(most, count), 1) },
      },
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
  // One policy alone has nothing to be told from
  const good = rows.filter(({ policy }) => best.has(policy));
  const sized = (part: readonly T[], name: string): object => ({ width, height, ...panel(part, name) });
  return best.size < 2 || good.length === rows.length
    ? { ...rest, ...sized(rows, title) }
    : { ...rest, vconcat: [sized(rows, title), sized(good, `${title}, the best`)] };
}

/** PAR over windows or steps, one line for each policy, that of `chosen` on top and thicker. */
export function parOverTimePicture(
  rows: readonly { policy: string; step: number; par: number }[],
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
      x: { ...counted, field: 'step', title: unit },
      y: { field: 'par', type: 'quantitative', title, scale: parScale(values) },
      color: { field: 'policy', type: 'nominal', title: null, legend, scale: policyColours(order) },
      strokeWidth: {
        condition: { test: `datum.policy === ${JSON.stringify(chosen ?? '')}`, value: 2 * thick },
        value: thick,
      },
    },
  }));
}

/** PAR of each policy where there is no time to draw it over; the bars start at 1, which is perfect. */
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
          color: { field: 'policy', type: 'nominal', scale: policyColours(order), legend: null },
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

/** For each point whether its name stands above it: neighbours are named on opposite sides. */
function namedAbove(points: readonly { moves: number; par: number }[]): boolean[] {
  const range = (values: number[]): number => Math.max(...values) - Math.min(...values) || 1;
  const [width, height] = [range(points.map(({ moves }) => moves)), range(points.map(({ par }) => par))];
  return points.map((point, index) => {
    const distance = (other: number): number =>
      Math.hypot((points[other]!.moves - point.moves) / width, (points[other]!.par - point.par) / height);
    const others = [...points.keys()].filter((other) => other !== index);
    const nearest = others.reduce(
      (best, other) => (distance(other) < distance(best) ? other : best),
      others[0] ?? index,
    );
    return point.par > points[nearest]!.par || (point.par === points[nearest]!.par && index < nearest);
  });
}

/** Quality against cost: moves per plan and PAR of the next window's steps, one point per policy. */
export function costPicture(
  rows: readonly { policy: string; moves: number; par: number }[],
  order: readonly string[],
): PictureSpec {
  const most = Math.max(1, ...rows.map(({ moves }) => moves));
  return withNearBest(rows, 'PAR of next steps', base(760, 300), (values, title) => ({
    data: { values: namedAbove(values).map((above, index) => ({ ...values[index], above })) },
    layer: [
      { mark: { type: 'point', size: 80, filled: true } },
      ...[true, false].map((above) => ({
        transform: [{ filter: `datum.above === ${above}` }],
        mark: { type: 'text', dy: above ? -12 : 14, fontSize: 12 },
        encoding: { text: { field: 'policy', type: 'nominal' }, color: { value: '#1b1f24' } },
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
      y: { field: 'par', type: 'quantitative', title, scale: { ...parScale(values), padding: 24 } },
      color: { field: 'policy', type: 'nominal', scale: policyColours(order), legend: null },
    },
  }));
}
