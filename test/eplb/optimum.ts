// An exact solver for small layers, for tests only and independent of lib/eplb/exact.ts: it never looks at replica
// vectors. Experts in turn (heaviest first) choose any set of devices, the size of the set is the replica count.

/** Lowest peak of any legal placement that is below `below`, or `below` if there is none. */
export function lowestPeak(loads: readonly number[], devices: number, slots: number, below: number): number {
  const sorted = [...loads].sort((left, right) => right - left);
  const total = sorted.reduce((sum, value) => sum + value, 0);
  const masks = Array.from({ length: (1 << devices) - 1 }, (_, index) => index + 1);
  const size = (mask: number) => masks.length && mask.toString(2).replaceAll('0', '').length;
  const sizes = new Map(masks.map((mask) => [mask, size(mask)]));
  const load = new Array<number>(devices).fill(0);
  const room = new Array<number>(devices).fill(slots);
  const epsilon = total * 1e-10;
  let best = below;
  const assign = (index: number, left: number): void => {
    const rest = sorted.length - index;
    if (rest === 0) {
      if (left === 0) best = Math.min(best, Math.max(...load));
      return;
    }
    // What the other devices cannot take under `best` must fit here
    const least = total - (devices - 1) * best;
    for (let device = 0; device < devices; device++)
      if (load[device]! + room[device]! * sorted[index]! < least) return;
    const most = left - (rest - 1);
    for (const mask of masks) {
      const count = sizes.get(mask)!;
      if (count > most) continue;
      if (left - count > (rest - 1) * devices) continue;
      const share = sorted[index]! / count;
      let fits = true;
      for (let device = 0; device < devices && fits; device++) {
        if (mask & (1 << device)) fits = room[device]! > 0 && load[device]! + share < best - epsilon;
        // Of devices in the same state the lower ones are taken first
        else
          for (let other = device + 1; other < devices && fits; other++)
            fits = !(mask & (1 << other) && room[other] === room[device] && load[other] === load[device]);
      }
      if (!fits) continue;
      for (let device = 0; device < devices; device++)
        if (mask & (1 << device)) {
          load[device]! += share;
          room[device]!--;
        }
      assign(index + 1, left - count);
      for (let device = 0; device < devices; device++)
        if (mask & (1 << device)) {
          load[device]! -= share;
          room[device]!++;
        }
    }
  };
  assign(0, devices * slots);
  return best;
}
