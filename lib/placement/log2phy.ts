// From logical to physical ids: the tables that dispatch applies to top-k ids, once, after shared ids are appended.
// They therefore have one entry per expert of the placement, shared ones included; a table of the routed length
// would drop or misroute the shared ids.
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import type { Placement } from './placement.js';

export interface Log2phyOptions {
  /**
   * 'rank' (default): replica (rank mod replicas), replicas in ascending physical order, as vllm-ascend does.
   * 'local': the replica on the rank itself where there is one, else as 'rank'; no transfer for what is at home.
   */
  prefer?: 'rank' | 'local';
}

/** i32[experts]: the one physical id each expert is sent to by source rank `rank`. */
export function log2phy(
  placement: Placement,
  rank: number,
  { prefer = 'rank' }: Log2phyOptions = {},
): Int32Array {
  if (!Number.isInteger(rank) || rank < 0 || rank >= placement.devices)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected a rank in 0..${placement.devices - 1} but received ${rank}`,
      { op: 'log2phy', arg: 'rank' },
    );
  if (prefer !== 'rank' && prefer !== 'local')
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected prefer to be rank or local but received ${describeValue(prefer)}`,
      { op: 'log2phy', arg: 'prefer' },
    );
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
  return Array.from({ length: placement.devices }, (_, rank) => log2phy(placement, rank, options));
}

/** i32[experts][width]: all physical ids of each expert, ascending, padded with -1 (DeepSeek's and vLLM's log2phy). */
export function log2phyCandidates(placement: Placement, width?: number): Int32Array[] {
  let most = 0;
  for (let expert = 0; expert < placement.experts; expert++)
    most = Math.max(most, placement.replicaCount(expert));
  if (width !== undefined && (!Number.isInteger(width) || width < most))
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected a width >= ${most} (the most replicas an expert has) but received ${width}`,
      { op: 'log2phy', arg: 'width' },
    );
  return Array.from({ length: placement.experts }, (_, expert) => {
    const row = new Int32Array(width ?? most).fill(-1);
    row.set(placement.replicasOf(expert));
    return row;
  });
}

/** i32[experts]: replicas per expert (DeepSeek's logcnt). */
export function replicaCounts(placement: Placement): Int32Array {
  return Int32Array.from({ length: placement.experts }, (_, expert) => placement.replicaCount(expert));
}
