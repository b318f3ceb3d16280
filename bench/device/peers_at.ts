// Recorded figures of one number of tokens.
import type { PeerTable } from '../peers.js';
import type { Figures } from './case.js';

export function peersAt(
  { columns, rows }: PeerTable,
  tokens: number,
  wanted: (column: string) => boolean = () => true,
): Figures {
  const row = rows[tokens] ?? [];
  const known = columns.flatMap((column, i): [string, number][] => {
    const figure = row[i] ?? null;
    return figure === null || !wanted(column) ? [] : [[column, figure]];
  });
  return Object.fromEntries(known);
}
