// The tables of a run on a device, for people.
import type { Ceilings, DeviceResult, Figures } from './case.js';

export interface MeasuredTable {
  readonly title: string;
  readonly results: readonly DeviceResult[];
  /** Cases that could not be timed, with the reason. */
  readonly failures: readonly { readonly case: string; readonly tokens: number; readonly reason: string }[];
}

const number = (value: number): string => (value >= 1000 ? value.toFixed(0) : value.toFixed(2));

/** Figures from the best on. */
const listed = (figures: Figures): string =>
  Object.entries(figures)
    .sort(([, a], [, b]) => a - b)
    .map(([name, microseconds]) => `${name} ${number(microseconds)}`)
    .join(', ');

const columns = ['case', 'tokens', 'us', 'floor', 'x floor', 'TFLOP/s'] as const;
const widths = [58, 7, 9, 8, 8, 8];
const row = (cells: readonly string[], rest: string): string =>
  `${cells.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))).join(' ')}  ${rest}`.trimEnd();

function line(result: DeviceResult): string {
  const { tflops, floor, controls, recorded, path } = result;
  const cells = [
    result.case,
    String(result.tokens),
    number(result.microseconds),
    number(result.floorMicroseconds),
    result.timesFloor.toFixed(2),
    tflops === null ? '-' : tflops.toFixed(0),
  ];
  const beside = [
    Object.keys(controls).length === 0 ? '' : `this run: ${listed(controls)}`,
    Object.keys(recorded).length === 0 ? '' : `recorded: ${listed(recorded)}`,
  ].filter((part) => part !== '');
  return row(
    cells,
    [`[${path}${floor === 'matrix product' ? '; floor by matrix product' : ''}]`, ...beside].join(' | '),
  );
}

/** A table as text; launches that overlap by programmatic dependent launch stand apart. */
export function tableText({ title, results, failures }: MeasuredTable): string {
  const header = row(columns, '[kernels] | controls of this run | recorded figures of others, us');
  const part = (heading: string, part: readonly DeviceResult[]) =>
    part.length === 0 ? [] : ['', heading, header, ...part.map(line)];
  return [
    ...part(
      title,
      results.filter(({ programmaticLaunch }) => !programmaticLaunch),
    ),
    ...part(
      `${title}, kernels that overlap by programmatic dependent launch`,
      results.filter(({ programmaticLaunch }) => programmaticLaunch),
    ),
    ...failures.map((failure) => `${failure.case}, ${failure.tokens} tokens: ${failure.reason}`),
  ].join('\n');
}

const terabytes = (speed: number): string => `${(speed / 1e12).toFixed(2)} TB/s`;

export function ceilingsText(when: string, ceilings: Ceilings): string {
  const { copyBytesPerSecond, readBytesPerSecond, emptyNodeMicroseconds, matmulFlopsPerSecond } = ceilings;
  const product =
    matmulFlopsPerSecond === undefined
      ? 'no matrix product timed, so that floors are of bytes alone'
      : `bf16 8192^3 ${(matmulFlopsPerSecond / 1e12).toFixed(0)} TFLOP/s`;
  return (
    `Ceilings ${when}: copy ${terabytes(copyBytesPerSecond)} (read + written), read ${terabytes(readBytesPerSecond)}, ` +
    `empty node of a graph ${emptyNodeMicroseconds.toFixed(2)} us, ${product}`
  );
}
