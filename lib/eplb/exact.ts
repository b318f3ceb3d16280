// The best placement of a small layer: branch and bound over replica counts and, for each, over the devices of every
// expert's replicas. Proves the optimum on the sizes people use for tests and small models (8 to 12 experts on 4 or 8
// devices); a node limit keeps the time of harder ones bounded, then the best found so far is returned.
// Invariant: what it returns is legal and never worse than the rows it starts from.

const mostVectors = 12_000;
const mostNodes = 400_000;

/** True where the search is small enough to be worth it. */
export function isSmall(experts: number, devices: number, slots: number): boolean {
  return experts <= 16 && devices <= 8 && devices * slots <= 32;
}

/**
 * The rows (i32[devices * slots]) with the lowest peak of device load, even split, no expert twice on a device.
 * `start` is a legal placement to improve on; loads: f64[experts].
 */
export function exactRows(
  loads: ArrayLike<number>,
  devices: number,
  slots: number,
  start: Int32Array,
): Int32Array {
  const experts = loads.length;
  const order = Array.from({ length: experts }, (_, expert) => expert).sort(
    (left, right) => loads[right]! - loads[left]! || left - right,
  );
  const total = order.reduce((sum, expert) => sum + loads[expert]!, 0);
  const average = total / devices;
  const tolerance = total * 1e-12;
  let best = start.slice();
  let peak = peakOf(loads, start, devices, slots);
  const vectors = replicaVectors(
    order.map((expert) => loads[expert]!),
    devices,
    devices * slots - experts,
    peak - tolerance,
  );
  let nodes = 0;

  for (const vector of vectors) {
    if (peak <= average + tolerance || nodes >= mostNodes) break;
    const size = vector.map((count, index) => loads[order[index]!]! / count);
    // Largest replicas first: they decide early
    const turn = Array.from(size.keys()).sort((left, right) => size[right]! - size[left]! || left - right);
    if (size[turn[0]!]! >= peak - tolerance) continue;
    const load = new Float64Array(devices);
    const filled = new Int32Array(devices);
    const rows = new Int32Array(devices * slots);
    const place = (at: number, replicasLeft: number, from: number): void => {
      if (nodes >= mostNodes || peak <= average + tolerance) return;
      nodes++;
      if (replicasLeft === 0) {
        if (at + 1 === experts) {
          let highest = 0;
          for (let device = 0; device < devices; device++) highest = Math.max(highest, load[device]!);
          if (highest < peak - tolerance) {
            peak = highest;
            best = rows.slice();
          }
          return;
        }
        // Every device must still be able to take what the others cannot
        const least = total - (devices - 1) * peak;
        const largest = size[turn[at + 1]!]!;
        for (let device = 0; device < devices; device++)
          if (load[device]! + (slots - filled[device]!) * largest < least) return;
        place(at + 1, vector[turn[at + 1]!]!, 0);
        return;
      }
      const item = turn[at]!;
      const added = size[item]!;
      for (let device = from; device <= devices - replicasLeft; device++) {
        if (filled[device] === slots || load[device]! + added >= peak - tolerance) continue;
        // Devices that are alike give the same tree
        let alike = false;
        for (let other = from; other < device && !alike; other++)
          alike =
            filled[other] === filled[device] &&
            load[other] === load[device] &&
            sameRow(rows, other, device, slots, filled[device]!);
        if (alike) continue;
        rows[device * slots + filled[device]!] = order[item]!;
        filled[device]!++;
        const before = load[device]!;
        load[device] = before + added;
        place(at, replicasLeft - 1, device + 1);
        load[device] = before;
        filled[device]!--;
      }
    };
    place(0, vector[turn[0]!]!, 0);
  }
  return best;
}

const sameRow = (rows: Int32Array, one: number, two: number, slots: number, filled: number): boolean => {
  for (let slot = 0; slot < filled; slot++)
    if (rows[one * slots + slot] !== rows[two * slots + slot]) return false;
  return true;
};

function peakOf(loads: ArrayLike<number>, rows: Int32Array, devices: number, slots: number): number {
  const replicas = new Int32Array(loads.length);
  for (const expert of rows) replicas[expert]!++;
  let peak = 0;
  for (let device = 0; device < devices; device++) {
    let load = 0;
    for (let slot = device * slots; slot < (device + 1) * slots; slot++)
      load += loads[rows[slot]!]! / replicas[rows[slot]!]!;
    peak = Math.max(peak, load);
  }
  return peak;
}

/**
 * Replica vectors with replicas below `below` each, easiest to pack first (least sum of squares of the sizes).
 * loads: descending. At most `mostVectors`; where there are more, the ones made first (most replicas to the heaviest).
 */
function replicaVectors(loads: readonly number[], cap: number, extra: number, below: number): number[][] {
  const vectors: { vector: number[]; squares: number }[] = [];
  const vector = new Array<number>(loads.length).fill(1);
  const extend = (index: number, left: number, squares: number): void => {
    if (vectors.length >= mostVectors) return;
    if (index === loads.length) {
      if (left === 0) vectors.push({ vector: vector.slice(), squares });
      return;
    }
    if (left > (loads.length - index) * (cap - 1)) return;
    for (let count = Math.min(cap, left + 1); count >= 1; count--) {
      if (loads[index]! / count >= below) break;
      vector[index] = count;
      extend(index + 1, left - (count - 1), squares + loads[index]! ** 2 / count);
    }
  };
  extend(0, extra, 0);
  return vectors.sort((left, right) => left.squares - right.squares).map((entry) => entry.vector);
}
