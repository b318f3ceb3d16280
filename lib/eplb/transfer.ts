// Who sends which expert to whom, so that a new placement becomes real. Two invariants: the most loaded sender sends
// as few experts as any choice of sources allows (an optimal semi-matching), and the transfers are split in as few
// rounds as possible in which every device sends at most one expert and receives at most one (edge colouring of a
// bipartite graph: Koenig's theorem gives as many rounds as the busiest device has transfers).
import { Arguments } from '../arguments.js';
import { countMoves } from '../placement/align.js';
import type { Placement } from '../placement/placement.js';

export interface Transfer {
  expert: number;
  /** Sending device, the slot it sends from in the old placement. */
  from: number;
  fromSlot: number;
  /** Receiving device, the slot it fills in the new placement. */
  to: number;
  toSlot: number;
  /** Transfers of one round share no sender and no receiver. */
  round: number;
}

export interface TransferOptions {
  /** Devices per node: a holder on the receiver's node is preferred among equally loaded senders. */
  devicesPerNode?: number;
}

const check = new Arguments('transfer_schedule');

/**
 * The transfers of one layer, by round. Bytes to move are transfers.length x bytes of one expert. Throws
 * ERR_MOE_INVALID_ARG for placements of different shapes.
 */
export function transferSchedule(from: Placement, to: Placement, options: TransferOptions = {}): Transfer[] {
  const { devicesPerNode } = check.object('options', options, ['devicesPerNode']);
  if (devicesPerNode !== undefined) check.integer('devicesPerNode', devicesPerNode, 1);
  countMoves(from, to); // refuses placements of different shapes
  const needs: { expert: number; to: number; toSlot: number; holders: number[] }[] = [];
  for (let device = 0; device < to.devices; device++) {
    const seen = new Set<number>();
    for (const [slot, expert] of to.expertsOn(device).entries()) {
      if (seen.has(expert) || from.has(device, expert)) continue;
      seen.add(expert);
      const holders = [
        ...new Set(Array.from(from.replicasOf(expert), (physical) => from.deviceOfPhysical(physical))),
      ];
      needs.push({ expert, to: device, toSlot: slot, holders });
    }
  }
  const node = (device: number): number =>
    devicesPerNode === undefined ? 0 : Math.floor(device / devicesPerNode);
  const sends: Set<number>[] = Array.from({ length: from.devices }, () => new Set());
  const sender = new Int32Array(needs.length).fill(-1);

  // Fewest sources first, then relieve
  const order = needs
    .map((_, need) => need)
    .sort((left, right) => needs[left]!.holders.length - needs[right]!.holders.length || left - right);
  for (const need of order) {
    const { holders, to: receiver } = needs[need]!;
    const better = (left: number, right: number): number =>
      sends[left]!.size - sends[right]!.size ||
      Number(node(left) !== node(receiver)) - Number(node(right) !== node(receiver)) ||
      left - right;
    const best = holders.reduce((chosen, device) => (better(device, chosen) < 0 ? device : chosen));
    sender[need] = best;
    sends[best]!.add(need);
  }
  while (relieve(needs, sender, sends));

  const rounds = colour(needs, sender, from.devices);
  return needs
    .map((need, index) => ({
      expert: need.expert,
      from: sender[index]!,
      fromSlot: from.slotOf(need.expert, sender[index]!),
      to: need.to,
      toSlot: need.toSlot,
      round: rounds[index]!,
    }))
    .sort((left, right) => left.round - right.round || left.to - right.to);
}

/** Shifts sends along a path from a device to one with at least two fewer; false when no such path is left. */
function relieve(needs: readonly { holders: number[] }[], sender: Int32Array, sends: Set<number>[]): boolean {
  const starts = sends
    .map((_, device) => device)
    .sort((left, right) => sends[right]!.size - sends[left]!.size || left - right);
  for (const start of starts) {
    if (sends[start]!.size < 2) return false;
    const via = new Map<number, number>([[start, -1]]); // device -> need that led to it
    const queue = [start];
    for (let head = 0; head < queue.length; head++) {
      const device = queue[head]!;
      if (sends[device]!.size <= sends[start]!.size - 2) {
        let at = device;
        while (at !== start) {
          const need = via.get(at)!;
          const previous = sender[need]!;
          sends[previous]!.delete(need);
          sends[at]!.add(need);
          sender[need] = at;
          at = previous;
        }
        return true;
      }
      for (const need of sends[device]!)
        for (const holder of needs[need]!.holders)
          if (!via.has(holder)) {
            via.set(holder, need);
            queue.push(holder);
          }
    }
  }
  return false;
}

/** Rounds of the transfers: edge colouring with as many colours as the highest degree. */
function colour(needs: readonly { to: number }[], sender: Int32Array, devices: number): Int32Array {
  const degree = new Int32Array(2 * devices);
  for (const [index, need] of needs.entries()) {
    degree[sender[index]!]!++;
    degree[devices + need.to]!++;
  }
  const colours = degree.reduce((most, value) => Math.max(most, value), 0);
  const used = Array.from({ length: 2 * devices }, () => new Int32Array(colours).fill(-1)); // vertex, colour -> edge
  const ends = (edge: number): [number, number] => [sender[edge]!, devices + needs[edge]!.to];
  const result = new Int32Array(needs.length);
  const paint = (edge: number, tint: number): void => {
    result[edge] = tint;
    for (const vertex of ends(edge)) used[vertex]![tint] = edge;
  };
  for (let edge = 0; edge < needs.length; edge++) {
    const [left, right] = ends(edge);
    const a = used[left]!.indexOf(-1);
    const b = used[right]!.indexOf(-1);
    if (used[right]![a] !== -1) {
      // Free colour a at the right end: exchange a and b along the path that starts there
      const path: number[] = [];
      for (let vertex = right, tint = a; used[vertex]![tint] !== -1; tint = tint === a ? b : a) {
        const next = used[vertex]![tint]!;
        path.push(next);
        const [one, two] = ends(next);
        vertex = vertex === one ? two : one;
      }
      for (const painted of path) for (const vertex of ends(painted)) used[vertex]![result[painted]!] = -1;
      for (const painted of path) paint(painted, result[painted] === a ? b : a);
    }
    paint(edge, a);
  }
  return result;
}
