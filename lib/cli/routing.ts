// How a layer's choices spread over its experts: counts, peak-to-average ratio, and a picture for the terminal.

export interface Routing {
  /** Tokens per routed expert. */
  readonly counts: readonly number[];
  /** Largest count over the mean; null without choices. */
  readonly par: number | null;
  /** Choices of zero experts. */
  readonly zeroChoices: number;
}

/** Counts ids below `experts`; ids from `firstZeroExpert` on are zero experts, those between are shared. */
export function countRouting(ids: Int32Array, experts: number, firstZeroExpert: number): Routing {
  const counts = new Array<number>(experts).fill(0);
  let zeroChoices = 0;
  for (const id of ids) {
    if (id >= 0 && id < experts) counts[id]++;
    else if (id >= firstZeroExpert) zeroChoices++;
  }
  const total = counts.reduce((a, b) => a + b, 0);
  return { counts, par: total === 0 ? null : (Math.max(...counts) * experts) / total, zeroChoices };
}

const levels = [...' ▁▂▃▄▅▆▇█'];
const WIDTH = 64;

/** One character an expert, `WIDTH` a line, its height the share of the busiest expert; blank for none at all. */
export function drawRouting(counts: readonly number[]): string[] {
  const peak = Math.max(...counts);
  const label = String(Math.max(0, counts.length - 1)).length;
  const lines: string[] = [];
  for (let first = 0; first < counts.length; first += WIDTH) {
    const bars = counts
      .slice(first, first + WIDTH)
      .map(
        (count) => levels[count === 0 ? 0 : Math.max(1, Math.round((count / peak) * (levels.length - 1)))],
      );
    lines.push(`${String(first).padStart(label)} |${bars.join('')}|`);
  }
  return lines;
}
