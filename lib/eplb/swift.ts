// vllm-ascend's swift balancer, from its described behaviour: few transfers, at most one expert between any ordered
// pair of devices and layer. It re-chooses which experts are redundant and where, then exchanges experts between the
// hottest device and others while each exchange gains enough. Two defects of the original are gone: its threshold is
// layer 0's average for every layer, and while every copy finds a place it takes the load of one of c copies for
// 2 / (c + 1) of the expert's, not 1 / c, so that it balances loads that are not there.
import { Placement } from '../placement/placement.js';
import { deviceLoads, peakToAverage } from './metrics.js';
import type { Policy } from './policy.js';

const skipBelow = 1.01;
const gainOfAverage = 0.01;
const mostSwaps = 100;

/** The placement of one layer after one call; `current` itself when nothing better was found. loads: [experts]. */
function swiftPlacement(loads: ArrayLike<number>, current: Placement): Placement {
  const { devices, experts } = current;
  const before = peakToAverage(deviceLoads(current, loads));
  const total = Array.from(loads).reduce((sum, value) => sum + value, 0);
  if (total === 0 || before < skipBelow) return current;
  const average = total / devices;
  const rows = current.toRows();
  const comm = new Set<number>(); // from * devices + to
  const received = rows.map(() => new Set<number>());

  // Redundant slots: later occurrences, slot by slot over the devices
  const seen = new Set<number>();
  const free: number[][] = rows.map(() => []);
  const owner = new Int32Array(experts);
  for (let slot = 0; slot < current.slots; slot++)
    for (const [device, row] of rows.entries()) {
      const expert = row[slot]!;
      if (seen.has(expert)) {
        free[device]!.push(slot);
        row[slot] = -1;
      } else {
        seen.add(expert);
        owner[expert] = device;
      }
    }

  // Hottest experts get the copies, the later one among equals
  const copies = new Int32Array(experts).fill(1);
  const share = (expert: number): number => loads[expert]! / copies[expert]!;
  const chosen: number[] = [];
  for (let count = current.redundant; count > 0; count--) {
    let best = -1;
    for (let expert = 0; expert < experts; expert++)
      if (copies[expert]! < devices && (best < 0 || share(expert) >= share(best))) best = expert;
    copies[best]!++;
    chosen.push(best);
  }
  const load = rows.map((row) => row.reduce((sum, expert) => sum + (expert < 0 ? 0 : share(expert)), 0));
  const put = (device: number, expert: number): void => {
    rows[device]![free[device]!.shift()!] = expert;
    load[device]! += share(expert);
    comm.add(owner[expert]! * devices + device);
    received[device]!.add(expert);
  };
  chosen.sort((left, right) => share(right) - share(left) || left - right);
  const unplaced: number[] = [];
  for (const expert of chosen) {
    let best = -1;
    for (let device = 0; device < devices; device++) {
      if (free[device]!.length === 0 || rows[device]!.includes(expert)) continue;
      if (comm.has(owner[expert]! * devices + device)) continue;
      if (best < 0 || load[device]! < load[best]!) best = device;
    }
    if (best < 0) unplaced.push(expert);
    else put(best, expert);
  }
  for (const expert of unplaced) copies[expert]!--;
  for (let device = 0; device < devices; device++)
    while (free[device]!.length > 0) {
      let best = -1;
      for (let expert = 0; expert < experts; expert++)
        if (!rows[device]!.includes(expert) && (best < 0 || share(expert) >= share(best))) best = expert;
      copies[best]!++;
      put(device, best);
    }
  for (const [device, row] of rows.entries())
    load[device] = row.reduce((sum, expert) => sum + share(expert), 0);

  // Exchanges with the hottest device
  for (let swap = 0; swap < mostSwaps; swap++) if (!exchange()) break;

  function exchange(): boolean {
    const hot = load.lastIndexOf(Math.max(...load));
    const partners = load
      .map((_, device) => device)
      .filter((device) => device !== hot)
      .sort((left, right) => load[left]! - load[right]! || left - right);
    for (const partner of partners) {
      if (comm.has(hot * devices + partner) || comm.has(partner * devices + hot)) continue;
      let best: [number, number] | undefined;
      let least = load[hot]!;
      for (const [slot, a] of rows[hot]!.entries()) {
        if (received[hot]!.has(a) || rows[partner]!.includes(a)) continue;
        for (const [place, b] of rows[partner]!.entries()) {
          if (received[partner]!.has(b) || rows[hot]!.includes(b)) continue;
          const shift = share(a) - share(b);
          const higher = Math.max(load[hot]! - shift, load[partner]! + shift);
          if (higher < least) {
            least = higher;
            best = [slot, place];
          }
        }
      }
      if (best === undefined || load[hot]! - least < gainOfAverage * average) continue;
      const a = rows[hot]![best[0]]!;
      const b = rows[partner]![best[1]]!;
      rows[hot]![best[0]] = b;
      rows[partner]![best[1]] = a;
      load[hot]! += share(b) - share(a);
      load[partner]! += share(a) - share(b);
      comm.add(hot * devices + partner).add(partner * devices + hot);
      received[hot]!.add(b);
      received[partner]!.add(a);
      return true;
    }
    return false;
  }

  const after = Placement.fromRows(rows, { experts });
  return peakToAverage(deviceLoads(after, loads)) < before ? after : current;
}

export const swift: Policy = {
  name: 'swift',
  summary: "vllm-ascend's swift balancer: few transfers, small steps from the current placement",
  keepsBudget: false,
  plan({ loads, current }, layerDone) {
    const placements = current.map((placement, layer) => {
      const next = swiftPlacement(loads.total(layer), placement);
      layerDone();
      return next;
    });
    return { placements };
  },
};
