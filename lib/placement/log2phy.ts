// From logical to physical ids: the tables that dispatch applies to top-k ids, once, after shared ids are appended.
// They therefore have one entry per expert of the placement, shared ones included; a table of the routed length
// would drop or misroute the shared ids.
import { Arguments } from '../arguments.js';
import { Placement } from './placement.js';

const check = new Arguments('log2phy');

export interface Log2phyOptions {
  /**
   * 'rank' (default): replica (rank mod replicas), replicas in ascending physical order, as vllm-ascend does.
   * 'local': the replica on the rank itself where there is one, else as 'rank'; no transfer for what is at home.
   */
  prefer?: 'rank' | 'local';
}

/** i32[experts]: the one physical id each expert is sent to by source rank `rank`. */
export function log2phy(placement: Placement, rank: number, options: Log2phyOptions = {}): Int32Array {
  check.instance('placement', placement, Placement);
  const { prefer = 'rank' } = check.object('options', options, ['prefer']);
  check.integer('rank', rank, 0, placement.devices - 1);
  check.oneOf('prefer', prefer, ['rank', 'local']);
  return Int32Array.from({ length: placement.experts }, (_, expert) => {
    if (prefer === 'local') {
      const slot = placement.slotOf(expert, rank);
      if (slot >= 0) return placement.slotOffsets[rank]! + slot;
    }
    const replicas = placement.replicasOf(expert);
    return replicas[rank % replicas.length]!;
  });
}

/** i32[devices][experts]: `log2phy` of every rank. */
export function log2phyAll(placement: Placement, options: Log2phyOptions = {}): Int32Array[] {
  check.instance('placement', placement, Placement);
  return Array.from({ length: placement.devices }, (_, rank) => log2phy(placement, rank, options));
}

/** i32[experts][width]: all physical ids of each expert, ascending, padded with -1 (DeepSeek's and vLLM's log2phy). */
export function log2phyCandidates(placement: Placement, width?: number): Int32Array[] {
  check.instance('placement', placement, Placement);
  let most = 0;
  for (let expert = 0; expert < placement.experts; expert++)
    most = Math.max(most, placement.replicaCount(expert));
  if (width !== undefined && (!Number.isSafeInteger(width) || width < most))
    check.refuse('width', `an integer >= ${most} (the most replicas an expert has)`, width);
  return Array.from({ length: placement.experts }, (_, expert) => {
    const row = new Int32Array(width ?? most).fill(-1);
    row.set(placement.replicasOf(expert));
    return row;
  });
}

/** i32[experts]: replicas per expert (DeepSeek's logcnt). */
export function replicaCounts(placement: Placement): Int32Array {
  check.instance('placement', placement, Placement);
  return Int32Array.from({ length: placement.experts }, (_, expert) => placement.replicaCount(expert));
}
