// Minimum-cost assignment of rows to columns (Hungarian method with potentials, O(n^3)): which new device row goes to
// which device so that the fewest experts have to move.

/** i32[n]: the column of every row; cost is f64[n * n], row-major. Deterministic: the lowest column wins ties. */
export function assignRows(cost: Float64Array, n: number): Int32Array {
  const rowPotential = new Float64Array(n + 1);
  const columnPotential = new Float64Array(n + 1);
  const rowOf = new Int32Array(n + 1); // row matched to column (1-based; 0 = none)
  const least = new Float64Array(n + 1);
  const via = new Int32Array(n + 1);
  const visited = new Uint8Array(n + 1);
  for (let row = 1; row <= n; row++) {
    rowOf[0] = row;
    least.fill(Number.POSITIVE_INFINITY);
    visited.fill(0);
    let column = 0;
    do {
      visited[column] = 1;
      const at = rowOf[column]!;
      let step = Number.POSITIVE_INFINITY;
      let next = 0;
      for (let to = 1; to <= n; to++) {
        if (visited[to]) continue;
        const reduced = cost[(at - 1) * n + to - 1]! - rowPotential[at]! - columnPotential[to]!;
        if (reduced < least[to]!) {
          least[to] = reduced;
          via[to] = column;
        }
        if (least[to]! < step) {
          step = least[to]!;
          next = to;
        }
      }
      for (let to = 0; to <= n; to++) {
        if (visited[to]) {
          rowPotential[rowOf[to]!]! += step;
          columnPotential[to]! -= step;
        } else least[to]! -= step;
      }
      column = next;
    } while (rowOf[column] !== 0);
    while (column !== 0) {
      const previous = via[column]!;
      rowOf[column] = rowOf[previous]!;
      column = previous;
    }
  }
  const result = new Int32Array(n);
  for (let column = 1; column <= n; column++) result[rowOf[column]! - 1] = column - 1;
  return result;
}

/** Reorders rows[device] so that as many experts as possible stay on the device that has them in `current`. */
export function matchRows(rows: readonly number[][], current: readonly ArrayLike<number>[]): number[][] {
  const n = rows.length;
  const cost = new Float64Array(n * n);
  const held = current.map((row) => new Set(Array.from(row)));
  for (const [index, row] of rows.entries())
    for (let device = 0; device < n; device++)
      for (const expert of row) if (held[device]!.has(expert)) cost[index * n + device]! -= 1;
  const result: number[][] = new Array(n);
  for (const [row, device] of assignRows(cost, n).entries()) result[device] = rows[row]!;
  return result;
}
