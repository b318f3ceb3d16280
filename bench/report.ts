// The table that a bench prints.
import type { Measurement } from './harness.js';

/** Name and width; words begin on the left, numbers end on the right. */
const columns: readonly (readonly [name: string, width: number, side: 'left' | 'right'])[] = [
  ['op', 15, 'left'],
  ['case', 59, 'left'],
  ['us', 7, 'right'],
  ['spread', 6, 'right'],
  ['floor us', 8, 'right'],
  ['x floor', 7, 'right'],
  ['GFLOP/s', 7, 'right'],
  ['TypeScript us', 13, 'right'],
  ['path', 0, 'left'], // the last one may be as long as it likes
];

const number = (value: number | null): string =>
  value === null ? '-' : value >= 100 ? value.toFixed(0) : value.toPrecision(3);

const row = (cells: readonly string[]): string =>
  columns
    .map(([, width, side], i) => (side === 'left' ? cells[i].padEnd(width) : cells[i].padStart(width)))
    .join(' ');

export const header = (): string => row(columns.map(([name]) => name));

export const line = (m: Measurement): string =>
  row([
    m.op,
    m.case,
    number(m.microseconds),
    m.spread.toFixed(2),
    number(m.floorMicroseconds),
    number(m.timesFloor),
    number(m.gflops),
    number(m.baselineMicroseconds),
    m.path,
  ]);
