// Minimum-cost assignment of rows to columns (Hungarian method with potentials, O(n^3)): which new device row goes to
// which device so that the fewest experts have to move.

/** i32[n]: the column of every row; cost is f64[n * n], row-major. Deterministic: the lowest column wins ties. */
function assignRows(cost: Float64Array, n: number): Int32Array {
  const rowPotential = new Float64Array(n + 1);
  const columnPotential = new Float64Array(n + 1);
  const rowOf = new Int32Array(n + 1); // row matched to column (1-based; 0 = none)
  const least = new Float64Array(n + 1);
  const via = new Int32Array(n + 1);
  const visited = new Uint8Array(n + 1);
  const matched = tightMatches(cost, n, rowPotential, columnPotential, rowOf);
  for (let row = 1; row <= n; row++) {
    if (matched[row]) continue;
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

/** Potentials from the least costs of rows and columns, and the rows that they match at once (1-based). */
function tightMatches(
  cost: Float64Array,
  n: number,
  rowPotential: Float64Array,
  columnPotential: Float64Array,
  rowOf: Int32Array,
): Uint8Array {
  for (let row = 1; row <= n; row++) {
    let least = Number.POSITIVE_INFINITY;
    for (let column = 0; column < n; column++) least = Math.min(least, cost[(row - 1) * n + column]!);
    rowPotential[row] = least;
  }
  for (let column = 1; column <= n; column++) {
    let least = Number.POSITIVE_INFINITY;
    for (let row = 1; row <= n; row++)
      least = Math.min(least, cost[(row - 1) * n + column - 1]! - rowPotential[row]!);
    columnPotential[column] = least;
  }
  const matched = new Uint8Array(n + 1);
  for (let row = 1; row <= n; row++)
    for (let column = 1; column <= n && !matched[row]; column++)
      if (
        rowOf[column] === 0 &&
        cost[(row - 1) * n + column - 1]! - rowPotential[row]! - columnPotential[column]! === 0
      ) {
        rowOf[column] = row;
        matched[row] = 1;
      }
  return matched;
}

/** Reorders rows[device] so that as many experts as possible stay on the device that has them in `current`. */
export function matchRows(
  rows: readonly ArrayLike<number>[],
  current: readonly ArrayLike<number>[],
): number[][] {
  const n = rows.length;
  let experts = 0;
  for (const row of current)
    for (let slot = 0; slot < row.length; slot++) experts = Math.max(experts, row[slot]! + 1);
  const held = new Uint8Array(n * experts);
  for (const [device, row] of current.entries())
    for (let slot = 0; slot < row.length; slot++) held[device * experts + row[slot]!] = 1;
  const cost = new Float64Array(n * n);
  for (const [index, row] of rows.entries())
    for (let slot = 0; slot < row.length; slot++)
      for (let device = 0; device < n; device++)
        if (row[slot]! < experts && held[device * experts + row[slot]!]) cost[index * n + device]! -= 1;
  const result: number[][] = new Array(n);
  for (const [row, device] of assignRows(cost, n).entries()) result[device] = Array.from(rows[row]!);
  return result;
}
