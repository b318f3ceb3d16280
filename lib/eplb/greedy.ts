// vllm-ascend's default policy, from its described behaviour: one extra copy at a time to the heaviest expert, extra
// copies handed to devices in turn, the rest heaviest first to the least loaded device. Two refusals of the original
// are gone: more extra copies than devices, and an expert that finds no device (it went to the last one, doubled).
import { Placement } from '../placement/placement.js';
import type { Policy } from './policy.js';
import { separateDoubles } from './separate.js';

/** rows[device][slot] for one layer. loads: [experts]. Ties as in the original: the later entry first. */
export function greedyRows(loads: ArrayLike<number>, devices: number, slots: number): number[][] {
  const experts = loads.length;
  const extra = devices * slots - experts;
  const copies = new Int32Array(experts).fill(1);
  let list = Array.from({ length: experts }, (_, expert) => expert);
  const share = Float64Array.from(loads);
  for (let round = 0; round < extra; round++) {
    list = list
      .map((expert, index) => ({ expert, index }))
      .sort((left, right) => share[right.expert]! - share[left.expert]! || right.index - left.index)
      .map(({ expert }) => expert);
    const chosen = list.find((expert) => copies[expert]! < devices)!;
    share[chosen] = (share[chosen]! * copies[chosen]!) / (copies[chosen]! + 1);
    copies[chosen]!++;
  }

  // Extra copies in turn
  const rows: number[][] = Array.from({ length: devices }, () => []);
  const load = new Float64Array(devices);
  let turn = 0;
  for (let expert = 0; expert < experts; expert++)
    for (let copy = 1; copy < copies[expert]!; copy++, turn++) {
      rows[turn % devices]!.push(expert);
      load[turn % devices]! += share[expert]!;
    }

  // One of each, heaviest first
  const order = list
    .map((expert, index) => ({ expert, index }))
    .sort((left, right) => share[right.expert]! - share[left.expert]! || right.index - left.index);
  for (const { expert } of order) {
    let best = -1;
    let anyRoom = -1;
    for (let device = 0; device < devices; device++) {
      if (rows[device]!.length >= slots) continue;
      if (anyRoom < 0 || load[device]! < load[anyRoom]!) anyRoom = device;
      if (!rows[device]!.includes(expert) && (best < 0 || load[device]! < load[best]!)) best = device;
    }
    const device = best < 0 ? anyRoom : best;
    rows[device]!.push(expert);
    load[device]! += share[expert]!;
  }
  separateDoubles(rows, share);
  return rows;
}

export const greedy: Policy = {
  name: 'greedy',
  summary: "vllm-ascend's default policy: greedy copies, longest load first; replans from scratch",
  keepsBudget: false,
  plan({ loads, devices, slots }, layerDone) {
    const placements = Array.from({ length: loads.layers }, (_, layer) => {
      const rows = greedyRows(loads.total(layer), devices, slots);
      layerDone();
      return Placement.fromRows(rows, { experts: loads.experts });
    });
    return { placements };
  },
};
