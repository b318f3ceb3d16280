// Counts from the dumps of SGLang's expert distribution recorder. Mode `stat` keeps counts per logical expert
// (`logical_count`, summed over ranks); modes `per_pass` and `per_token` keep one record per forward pass of one rank,
// with counts or top-k ids of physical experts, and the map that tells which expert each of them held.
import { MoeError } from '../errors.js';
import { TorchTensor } from './torch_file.js';

export interface RecordedCounts {
  /** [layers, experts] or [steps, layers, experts]. */
  shape: number[];
  data: ArrayLike<number>;
}

/** The counts of a dump, as torch_file.ts reads it. Passes without a token are no steps. */
export function recordedCounts(root: unknown, file: string): RecordedCounts {
  const bad = (message: string): MoeError =>
    new MoeError('ERR_MOE_CHECKPOINT', `${file}: ${message}`, { op: 'loads', arg: 'file' });
  const fields = (value: unknown): string =>
    value instanceof Map ? [...value.keys()].join(', ') : Array.isArray(value) ? 'a list' : typeof value;
  if (!(root instanceof Map) || !(root.has('logical_count') || root.has('records')))
    throw bad(`expected a recorder dump with logical_count or records but received ${fields(root)}`);
  const logical = root.get('logical_count');
  if (logical instanceof TorchTensor) return withoutEmptySteps(logical);
  if (logical !== undefined)
    throw bad(`expected logical_count to be a tensor but received ${fields(logical)}`);

  const map = root.get('last_physical_to_logical_map');
  if (!(map instanceof TorchTensor) || map.shape.length !== 2)
    throw bad(
      `expected last_physical_to_logical_map [layers, physical experts] beside records but received ${map instanceof TorchTensor ? `shape [${map.shape}]` : fields(map)}`,
    );
  const [layers, physical] = map.shape as [number, number];
  const expertOf = map.data;
  const experts = expertOf.reduce((most, expert) => Math.max(most, expert), -1) + 1;
  // Every expert has a slot, so there are at most as many
  const wrong = expertOf.findIndex((expert) => !(expert >= 0 && expert < physical));
  if (wrong >= 0)
    throw bad(
      `layer ${Math.floor(wrong / physical)}: expected an expert of 0..${physical - 1} in slot ${wrong % physical} of last_physical_to_logical_map but received ${expertOf[wrong]}`,
    );

  const records = root.get('records');
  if (!Array.isArray(records) || records.length === 0)
    throw bad('expected at least one record of a forward pass but received none');
  const passes = new Map<number, Float64Array>();
  let rank: unknown;
  for (const [index, record] of (records as unknown[]).entries()) {
    const at = `record ${index}`;
    if (!(record instanceof Map)) throw bad(`${at}: expected a dict but received ${fields(record)}`);
    rank ??= record.get('rank');
    if (record.get('rank') !== rank)
      throw bad(
        `${at}: expected records of rank ${rank} (as record 0) but received rank ${record.get('rank')}`,
      );
    const pass = record.get('forward_pass_id');
    if (typeof pass !== 'number') throw bad(`${at}: expected a forward_pass_id but received ${fields(pass)}`);
    const counts = passes.get(pass) ?? new Float64Array(layers * experts);
    passes.set(pass, counts);
    const count = record.get('global_physical_count');
    const ids = record.get('topk_ids_of_layer');
    if (count instanceof TorchTensor) {
      if (count.shape.length !== 2 || count.shape[0] !== layers || count.shape[1] !== physical)
        throw bad(
          `${at}: expected global_physical_count [${layers}, ${physical}], as the map, but received [${count.shape}]`,
        );
      for (const [slot, value] of count.data.entries())
        counts[Math.floor(slot / physical) * experts + expertOf[slot]!]! += value;
    } else if (ids instanceof TorchTensor) {
      if (ids.shape.length !== 3 || ids.shape[0] !== layers)
        throw bad(
          `${at}: expected topk_ids_of_layer [${layers}, tokens, topK], layers as the map, but received [${ids.shape}]`,
        );
      const ofLayer = ids.shape[1]! * ids.shape[2]!;
      for (const [place, id] of ids.data.entries()) {
        if (id === -1) continue;
        const layer = Math.floor(place / ofLayer);
        if (!(id >= 0 && id < physical))
          throw bad(
            `${at}: layer ${layer}: expected physical expert ids in 0..${physical - 1} or -1 but received ${id}`,
          );
        counts[layer * experts + expertOf[layer * physical + id]!]!++;
      }
    } else
      throw bad(`${at}: expected global_physical_count or topk_ids_of_layer but received ${fields(record)}`);
  }
  const steps = [...passes]
    .sort(([one], [two]) => one - two)
    .map(([, counts]) => counts)
    .filter((counts) => counts.some((count) => count > 0));
  if (steps.length === 0)
    throw bad(`expected a forward pass with tokens but received ${passes.size} passes without any`);
  const data = new Float64Array(steps.length * layers * experts);
  for (const [step, counts] of steps.entries()) data.set(counts, step * layers * experts);
  return { shape: [steps.length, layers, experts], data };
}

/** Rows of a recorder's buffer that no pass has filled yet, and passes without a token, are no steps. */
function withoutEmptySteps({ shape, data }: RecordedCounts): RecordedCounts {
  if (shape.length !== 3) return { shape, data };
  const [steps, layers, experts] = shape as [number, number, number];
  const all = Float64Array.from(data);
  const rows = Array.from({ length: steps }, (_, step) =>
    all.subarray(step * layers * experts, (step + 1) * layers * experts),
  );
  const used = rows.filter((row) => row.some((count) => count !== 0));
  const kept = new Float64Array(used.length * layers * experts);
  for (const [step, row] of used.entries()) kept.set(row, step * layers * experts);
  return used.length > 0 ? { shape: [used.length, layers, experts], data: kept } : { shape, data };
}
