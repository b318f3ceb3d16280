// Replica counts by repeated division: each further replica goes to the expert with the highest load per replica.
// This minimises the highest load per replica (exchange argument), which is why every planner starts from it.
// Invariant: at least one replica each, never more than `cap` (a device holds an expert at most once).

/**
 * i32[experts]: replicas that sum to `physical`. Ties: the lowest expert id. Zero loads get theirs last, in order of
 * fewest replicas, so that an idle layer still gets a spread layout.
 */
export function minMaxReplicas(loads: ArrayLike<number>, physical: number, cap: number): Int32Array {
  const experts = loads.length;
  const replicas = new Int32Array(experts).fill(1);
  const share = Float64Array.from(loads);
  for (let extra = physical - experts; extra > 0; extra--) {
    let best = -1;
    for (let expert = 0; expert < experts; expert++) {
      if (replicas[expert]! >= cap) continue;
      if (
        best < 0 ||
        share[expert]! > share[best]! ||
        (share[expert] === share[best] && share[expert] === 0 && replicas[expert]! < replicas[best]!)
      )
        best = expert;
    }
    replicas[best]!++;
    share[best] = loads[best]! / replicas[best]!;
  }
  return replicas;
}
