import { describe, expect, it } from 'vitest';
import { deepseekPlacement } from '../../lib/eplb/deepseek.js';
import { flashlbRows } from '../../lib/eplb/flashlb.js';
import { greedyRows } from '../../lib/eplb/greedy.js';

const example = [600, 560, 120, 120, 20, 10, 10, 10];

const copiesOf = (rows: number[][], experts: number) => {
  const copies = new Array(experts).fill(0);
  for (const expert of rows.flat()) copies[expert]++;
  return copies;
};
const peak = (rows: number[][], loads: number[]) => {
  const copies = copiesOf(rows, loads.length);
  return Math.max(
    ...rows.map((row) => row.reduce((sum, expert) => sum + loads[expert]! / copies[expert], 0)),
  );
};

describe('the worked example on 8 devices x 2 slots', () => {
  it('greedy gives the published deployment, 232', () => {
    const rows = greedyRows(example, 8, 2);
    expect(rows.map((row) => [...row].sort())).toEqual([
      [0, 1],
      [0, 7],
      [0, 6],
      [0, 5],
      [0, 1],
      [1, 3],
      [1, 2],
      [1, 4],
    ]);
    expect(peak(rows, example)).toBe(232);
  });

  it('deepseek gives 232 with the expert doubled on the last device', () => {
    const flat = deepseekPlacement(example, { physical: 16, devices: 8, groups: 1, nodes: 1 });
    const rows = Array.from({ length: 8 }, (_, device) => [...flat.subarray(2 * device, 2 * device + 2)]);
    expect(peak(rows, example)).toBe(232);
    expect(rows[7]).toEqual([1, 1]);
  });

  it('flashlb gives 232, 205, 196.67, 200 and 210 at depth 1, 2, 3, 4 and 8', () => {
    const at = (depth: number) => flashlbRows(Float64Array.from(example), 1, 8, 2, { depth }).rows;
    expect([1, 2, 3, 4, 8].map((depth) => Number(peak(at(depth), example).toFixed(3)))).toEqual([
      232, 205, 196.667, 200, 210,
    ]);
    expect(copiesOf(at(2), 8)).toEqual([3, 3, 1, 1, 3, 2, 2, 1]);
    expect(copiesOf(at(4), 8)).toEqual([4, 4, 2, 2, 1, 1, 1, 1]);
  });
});

describe('deepseek', () => {
  it('reproduces the published hierarchical example', () => {
    const weights = [
      [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
      [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ];
    const map = weights.map((row) => [
      ...deepseekPlacement(row, { physical: 16, devices: 8, groups: 4, nodes: 2 }),
    ]);
    expect(map).toEqual([
      [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
      [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]);
  });
});
