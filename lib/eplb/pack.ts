// A first placement from nothing: heaviest replica first, each to the device where it meets the least load of the
// scenarios in which it is heavy itself (smallest inner product), so that experts that peak together are kept apart.
import type { Scenarios } from './scenario.js';
import { handOut } from './separate.js';

/** i32[devices * slots] for given replica counts (sum devices * slots, each at most devices). */
export function packReplicas(
  scenarios: Scenarios,
  replicas: Int32Array,
  devices: number,
  slots: number,
): Int32Array {
  const { experts, blocks, loads, weights, mean } = scenarios;
  const share = mean.map((value, expert) => value / replicas[expert]!);
  const order = Array.from({ length: experts }, (_, expert) => expert).sort(
    (left, right) => share[right]! - share[left]! || left - right,
  );
  const load = new Float64Array(devices * blocks);
  const filled = new Int32Array(devices);
  const rows = new Int32Array(devices * slots).fill(-1);
  const met = new Float64Array(devices);
  const weighted = new Float64Array(blocks);
  for (const expert of order) {
    const from = expert * blocks;
    for (let block = 0; block < blocks; block++) weighted[block] = weights[block]! * loads[from + block]!;
    const factor = 1 / replicas[expert]!;
    for (let device = 0; device < devices; device++) {
      let sum = 0;
      if (filled[device]! < slots)
        for (let block = 0; block < blocks; block++) sum += weighted[block]! * load[device * blocks + block]!;
      met[device] = filled[device]! < slots ? sum : Number.POSITIVE_INFINITY;
    }
    for (let copy = replicas[expert]!; copy > 0; copy--) {
      let best = -1;
      for (let device = 0; device < devices; device++)
        if (met[device]! < Number.POSITIVE_INFINITY && (best < 0 || met[device]! < met[best]!)) best = device;
      if (best < 0) return inTurn(replicas, devices, slots);
      rows[best * slots + filled[best]!++] = expert;
      for (let block = 0; block < blocks; block++)
        load[best * blocks + block]! += loads[from + block]! * factor;
      met[best] = Number.POSITIVE_INFINITY;
    }
  }
  return rows;
}

/** The replicas handed out device after device: always legal, whatever the loads. */
function inTurn(replicas: Int32Array, devices: number, slots: number): Int32Array {
  const all: number[] = [];
  for (const [expert, count] of replicas.entries()) for (let copy = 0; copy < count; copy++) all.push(expert);
  const rows = Array.from({ length: devices }, (_, device) =>
    all.slice(device * slots, (device + 1) * slots),
  );
  handOut(rows);
  return Int32Array.from(rows.flat());
}
