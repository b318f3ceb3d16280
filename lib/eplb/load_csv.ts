// Loads as comma-separated values, as spreadsheets and pandas write them: one line for each count under a header with
// the columns layer, expert, count and, for traces, step; or without a header one line for each layer. Cells may be
// quoted, and separated by semicolons or tabs.
import { Loads } from './loads.js';

interface Line {
  /** In the file, from 1: blank lines count. */
  number: number;
  cells: string[];
}

/** Loads of a CSV text; `bad` makes the error of a message. */
export function parseCsv(text: string, bad: (message: string) => Error): Loads {
  const lines = linesOf(text);
  if (lines.length === 0) throw bad('expected lines of counts but received an empty file');
  const header = lines[0]!.cells.map((cell) => cell.toLowerCase());
  const numbers = ({ number, cells }: Line, layer: string, names: readonly string[]): number[] =>
    cells.map((cell, column) => {
      const value = cell === '' ? Number.NaN : Number(cell);
      const name = names[column] ?? column + 1;
      if (Number.isNaN(value))
        throw bad(
          `line ${number}: ${/^\d+$/.test(layer) ? `layer ${layer}: ` : ''}expected a number in column ${name} but received '${cell}'`,
        );
      return value;
    });
  if (!header.includes('expert'))
    return Loads.fromArrays(lines.map((line, layer) => numbers(line, `${layer}`, [])));

  const column = (name: string): number => header.indexOf(name);
  for (const name of ['layer', 'expert', 'count'])
    if (column(name) < 0)
      throw bad(`expected a column ${name} in the header but received ${header.join(',')}`);
  const rows = lines.slice(1).map((line) => {
    if (line.cells.length !== header.length)
      throw bad(`line ${line.number}: expected ${header.length} cells but received ${line.cells.length}`);
    const values = numbers(line, line.cells[column('layer')]!, header);
    const place = {
      step: column('step') < 0 ? 0 : values[column('step')]!,
      layer: values[column('layer')]!,
      expert: values[column('expert')]!,
    };
    for (const [name, value] of Object.entries(place))
      if (!Number.isInteger(value) || value < 0)
        throw bad(`line ${line.number}: expected ${name} to be an integer >= 0 but received ${value}`);
    return { ...place, count: values[column('count')]! };
  });
  if (rows.length === 0) throw bad('expected lines of counts after the header but received none');
  return fromRows(rows, bad);
}

function linesOf(text: string): Line[] {
  const lines = text
    .split(/\r?\n/)
    .map((line, index) => ({ number: index + 1, line }))
    .filter(({ line }) => line.trim() !== '');
  const first = lines[0]?.line ?? '';
  const separator = [',', ';', '\t'].find((each) => first.includes(each)) ?? ',';
  return lines.map(({ number, line }) => ({
    number,
    cells: line.split(separator).map((cell) => cell.trim().replace(/^"(.*)"$/, '$1')),
  }));
}

function fromRows(
  rows: readonly { step: number; layer: number; expert: number; count: number }[],
  bad: (message: string) => Error,
): Loads {
  const size = (name: 'step' | 'layer' | 'expert'): number =>
    rows.reduce((most, row) => Math.max(most, row[name]), 0) + 1;
  const [steps, layers, experts] = [size('step'), size('layer'), size('expert')];
  const wanted = `one line for each of ${steps} steps x ${layers} layers x ${experts} experts`;
  const places = steps * layers * experts;
  // Ids far beyond the number of lines would ask for more memory than there is
  if (places > 2 * rows.length + 1024) throw bad(`expected ${wanted} but received ${rows.length}`);
  const counts = new Float64Array(places).fill(Number.NaN);
  for (const { step, layer, expert, count } of rows) {
    const index = (step * layers + layer) * experts + expert;
    if (!Number.isNaN(counts[index]!))
      throw bad(`layer ${layer}: expected one line for expert ${expert} in step ${step} but received two`);
    counts[index] = count;
  }
  const missing = counts.findIndex(Number.isNaN);
  if (missing >= 0)
    throw bad(
      `layer ${Math.floor(missing / experts) % layers}: expected ${wanted} but received none for expert ` +
        `${missing % experts} in step ${Math.floor(missing / (layers * experts))}`,
    );
  return new Loads({ steps, layers, experts }, counts);
}
