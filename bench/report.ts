// The table that a bench prints.
import type { Measurement } from './harness.js';

const columns = [
  'op',
  'case',
  'us',
  'spread',
  'floor us',
  'x floor',
  'GFLOP/s',
  'TypeScript us',
  'path',
] as const;
const widths = [15, 44, 11, 7, 10, 8, 8, 14, 12];

const number = (value: number | null): string =>
  value === null ? '-' : value >= 100 ? value.toFixed(0) : value.toPrecision(3);

const row = (cells: readonly string[]): string =>
  cells.map((cell, i) => (i < 2 ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))).join(' ');

export const header = (): string => row(columns);

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
