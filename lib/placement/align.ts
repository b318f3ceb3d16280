// Fits a new assignment of experts to devices onto the slots in use: an expert that stays on a device keeps its slot,
// so nothing is copied inside a device and vllm-ascend's check_expert_placement accepts the table.
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { Placement } from './placement.js';

const check = new Arguments('placement');

const sameShape = (from: Placement, to: Placement): void => {
  check.instance('from', from, Placement);
  check.instance('to', to, Placement);
  if (from.devices !== to.devices || from.experts !== to.experts || from.slots !== to.slots)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected a placement of ${from.experts} experts on ${from.devices} devices x ${from.slots} slots but received ` +
        `${to.experts} experts on ${to.devices} devices x ${to.slots} slots`,
      { op: 'placement', arg: 'to' },
    );
};

/** The assignment of `to` with every expert that stays on a device in the slot it has in `from`. */
export function keepSlots(from: Placement, to: Placement): Placement {
  sameShape(from, to);
  const rows = to.toRows().map((wanted, device) => {
    const old = from.expertsOn(device);
    const row = new Array<number>(wanted.length).fill(-1);
    const arriving = new Map<number, number>();
    for (const expert of wanted) arriving.set(expert, (arriving.get(expert) ?? 0) + 1);
    for (const [slot, expert] of old.entries()) {
      const left = arriving.get(expert) ?? 0;
      if (left === 0) continue;
      row[slot] = expert;
      arriving.set(expert, left - 1);
    }
    const incoming = wanted.filter((expert) => {
      const left = arriving.get(expert) ?? 0;
      if (left > 0) arriving.set(expert, left - 1);
      return left > 0;
    });
    let next = 0;
    return row.map((expert) => (expert >= 0 ? expert : incoming[next++]!));
  });
  return Placement.fromRows(rows, { experts: to.experts, duplicates: 'allow' });
}

/** Expert weights that devices must receive to get from one placement to the other: experts new on a device. */
export function countMoves(from: Placement, to: Placement): number {
  sameShape(from, to);
  const on = new Int32Array(from.experts).fill(-1);
  const counted = new Int32Array(from.experts).fill(-1);
  let moves = 0;
  for (let device = 0; device < to.devices; device++) {
    for (const expert of from.expertsOn(device)) on[expert] = device;
    for (const expert of to.expertsOn(device))
      if (on[expert] !== device && counted[expert] !== device) {
        counted[expert] = device;
        moves++;
      }
  }
  return moves;
}
