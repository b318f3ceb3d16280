import { describe, expect, it } from 'vitest';
import { Loads } from '../../lib/eplb/loads.js';
import { pastOf, remember, totalsOf } from '../../lib/eplb/memory.js';

const window = (steps: number, first: number) =>
  new Loads(
    { steps, layers: 2, experts: 3 },
    Float64Array.from({ length: steps * 6 }, (_, index) => first + index),
  );

describe('what the default policy remembers', () => {
  it('keeps a window as runs of its steps that sum to its total', () => {
    const loads = window(5, 1);
    const total = Float64Array.from([...loads.total(0), ...loads.total(1)]);
    for (const runs of [1, 2, 5, 24]) {
      const [seen] = remember([], loads, runs).windows;
      expect(seen!.runs).toBe(Math.min(runs, 5));
      expect(seen!.counts.length).toBe(seen!.runs * 6);
      expect(totalsOf(seen!)).toEqual(total);
    }
    expect(remember([], loads, 5).windows[0]!.counts).toEqual(loads.counts);
  });

  it('forgets the oldest of more than six windows', () => {
    let { windows } = remember([], window(1, 0), 1);
    for (let index = 1; index < 9; index++) ({ windows } = remember(windows, window(1, index), 1));
    expect(windows.map(({ counts }) => counts[0])).toEqual([3, 4, 5, 6, 7, 8]);
  });

  it('weights windows by age, newest first, and shares a weight among the runs of a window', () => {
    let { windows } = remember([], window(4, 0), 4);
    for (let index = 1; index < 4; index++) ({ windows } = remember(windows, window(4, index), 4));
    const past = pastOf(windows, { decay: 0.5, keep: 1, error: 0 }, 32);
    expect(past.windows.map(({ weight }) => weight)).toEqual([0.5, 0.25, 0.125, 0.0625]);
    expect(past.windows[0]!.counts).toEqual(totalsOf(windows[3]!));
    expect(past.runs.map(({ weight }) => weight)).toEqual(
      [0.125, 0.0625, 0.03125, 0.015625].flatMap((weight) => [weight, weight, weight, weight]),
    );
    expect(past.runs[1]!.counts).toEqual(windows[3]!.counts.subarray(6, 12));
  });

  it('takes windows of many runs as totals beyond the first ones', () => {
    const { windows } = remember(remember([], window(24, 0), 24).windows, window(24, 9), 24);
    const past = pastOf(windows, { decay: 0.5, keep: 1, error: 0 }, 32);
    expect(past.runs.length).toBe(25);
    expect(past.runs.at(-1)).toEqual(past.windows[1]);
  });
});
