// Makes rows of a planner legal: no expert twice on a device. A doubled replica is exchanged with the replica of the
// nearest load on another device that lacks it; where no single exchange works, the layer falls back to handing the
// replicas out in turn, which never doubles as long as no expert has more replicas than there are devices.

/** Changes rows[device][slot] in place. `share` is the load of one replica of every expert. */
export function separateDoubles(
  rows: number[][],
  share: ArrayLike<number>,
  sameNode: (a: number, b: number) => boolean = () => true,
): void {
  const holds = rows.map((row) => {
    const counts = new Map<number, number>();
    for (const expert of row) counts.set(expert, (counts.get(expert) ?? 0) + 1);
    return counts;
  });
  const change = (device: number, slot: number, expert: number): void => {
    const old = rows[device]![slot]!;
    const left = holds[device]!.get(old)! - 1;
    if (left === 0) holds[device]!.delete(old);
    else holds[device]!.set(old, left);
    holds[device]!.set(expert, (holds[device]!.get(expert) ?? 0) + 1);
    rows[device]![slot] = expert;
  };
  for (let device = 0; device < rows.length; device++)
    for (let slot = 0; slot < rows[device]!.length; slot++) {
      const doubled = rows[device]![slot]!;
      if (holds[device]!.get(doubled) === 1) continue;
      let best: [number, number] | undefined;
      let nearest = Number.POSITIVE_INFINITY;
      for (const near of [true, false]) {
        if (best !== undefined) break;
        for (let other = 0; other < rows.length; other++) {
          if (other === device || holds[other]!.has(doubled) || sameNode(device, other) !== near) continue;
          for (const [place, candidate] of rows[other]!.entries()) {
            const distance = Math.abs(share[candidate]! - share[doubled]!);
            if (!holds[device]!.has(candidate) && distance < nearest) {
              nearest = distance;
              best = [other, place];
            }
          }
        }
      }
      if (best === undefined) {
        handOut(rows);
        return;
      }
      const candidate = rows[best[0]]![best[1]]!;
      change(best[0], best[1], doubled);
      change(device, slot, candidate);
    }
}

/** Refills the rows with the same replicas, expert by expert, device after device. */
export function handOut(rows: number[][]): void {
  const replicas = rows.flat().sort((left, right) => left - right);
  for (const [index, expert] of replicas.entries())
    rows[index % rows.length]![Math.floor(index / rows.length)] = expert;
}
