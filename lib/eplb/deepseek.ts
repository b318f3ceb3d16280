// DeepSeek's EPLB, described in the EPLB repository's README and semantics of its three steps: pack expert groups to
// nodes, replicate inside each node, pack replicas to the node's GPUs. With groups that do not divide by nodes it is
// the same with one node ("global"). Sorting is stable here (the original's is not), and replicas are capped at the
// devices of a node. Where packing puts an expert twice on a device, the policy separates the two.
import { MoeError } from '../errors.js';
import { Placement } from '../placement/placement.js';
import type { Policy } from './policy.js';
import { separateDoubles } from './separate.js';

export interface DeepseekOptions {
  physical: number;
  devices: number;
  groups: number;
  nodes: number;
}

/** Items to packs of equal size, heaviest first, each into the least loaded pack with room (ties: lowest pack). */
function balancedPacking(weights: Float64Array, packs: number): { pack: Int32Array; place: Int32Array } {
  const size = weights.length / packs;
  const pack = new Int32Array(weights.length);
  const place = new Int32Array(weights.length);
  if (size === 1) return { pack: pack.map((_, item) => item), place };
  const order = Array.from(weights.keys()).sort(
    (left, right) => weights[right]! - weights[left]! || left - right,
  );
  const load = new Float64Array(packs);
  const filled = new Int32Array(packs);
  for (const item of order) {
    let best = -1;
    for (let candidate = 0; candidate < packs; candidate++)
      if (filled[candidate]! < size && (best < 0 || load[candidate]! < load[best]!)) best = candidate;
    pack[item] = best;
    place[item] = filled[best]!++;
    load[best]! += weights[item]!;
  }
  return { pack, place };
}

/** i32[physical]: the logical id of every slot, device after device, as DeepSeek's EPLB gives it. loads: [experts]. */
export function deepseekPlacement(
  loads: ArrayLike<number>,
  { physical, devices, groups, nodes }: DeepseekOptions,
): Int32Array {
  const split = groups % nodes === 0 && devices % nodes === 0 && loads.length % groups === 0;
  if (nodes > 1 && (!split || physical / devices > loads.length / nodes))
    return deepseekPlacement(loads, { physical, devices, groups: 1, nodes: 1 });
  if (physical % devices !== 0 || physical < loads.length || physical / devices > loads.length)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected ${devices} devices to share at least ${loads.length} slots, at most one per expert each, but received ${physical}`,
      { op: 'deepseek', arg: 'physical' },
    );
  const experts = loads.length;
  const groupSize = experts / groups;
  const perNode = experts / nodes;
  const devicesPerNode = devices / nodes;
  const slots = physical / devices;

  // Groups to nodes
  const groupLoad = new Float64Array(groups);
  for (let expert = 0; expert < experts; expert++)
    groupLoad[Math.floor(expert / groupSize)]! += loads[expert]!;
  const { pack, place } = balancedPacking(groupLoad, nodes);
  const nodeOrder = new Int32Array(experts); // position inside the nodes -> logical
  for (let expert = 0; expert < experts; expert++) {
    const group = Math.floor(expert / groupSize);
    nodeOrder[(pack[group]! * (groups / nodes) + place[group]!) * groupSize + (expert % groupSize)] = expert;
  }

  // Replicas inside each node, then to its devices
  const result = new Int32Array(physical);
  for (let node = 0; node < nodes; node++) {
    const local = nodeOrder.subarray(node * perNode, (node + 1) * perNode);
    const weight = Float64Array.from(local, (expert) => loads[expert]!);
    const { order, replicas } = replicaOrder(weight, physical / nodes, devicesPerNode);
    const packed = balancedPacking(
      Float64Array.from(order, (item) => weight[item]! / replicas[item]!),
      devicesPerNode,
    );
    for (const [index, item] of order.entries())
      result[(node * devicesPerNode + packed.pack[index]!) * slots + packed.place[index]!] = local[item]!;
  }
  return result;
}

/** The replicas in the order they are made: one of each, then copies as they are added. */
function replicaOrder(
  weight: Float64Array,
  physical: number,
  cap: number,
): { order: number[]; replicas: Int32Array } {
  const order = Array.from(weight.keys());
  const replicas = new Int32Array(weight.length).fill(1);
  while (order.length < physical) {
    let best = -1;
    for (let item = 0; item < weight.length; item++)
      if (
        replicas[item]! < cap &&
        (best < 0 || weight[item]! / replicas[item]! > weight[best]! / replicas[best]!)
      )
        best = item;
    replicas[best]!++;
    order.push(best);
  }
  return { order, replicas };
}

export const deepseek: Policy = {
  name: 'deepseek',
  summary: "DeepSeek's EPLB, global or (with --groups and --nodes) hierarchical; replans from scratch",
  keepsBudget: false,
  ordersSlots: true,
  plan({ loads, devices, slots, groups, nodes, shared }, layerDone) {
    const placements = Array.from({ length: loads.layers }, (_, layer) => {
      const total = loads.total(layer);
      const hierarchical = shared === 0 && nodes > 1;
      const flat = deepseekPlacement(total, {
        physical: devices * slots,
        devices,
        groups: hierarchical ? groups : 1,
        nodes: hierarchical ? nodes : 1,
      });
      const replicas = new Int32Array(loads.experts);
      for (const expert of flat) replicas[expert]!++;
      const rows = Array.from({ length: devices }, (_, device) =>
        Array.from(flat.subarray(device * slots, (device + 1) * slots)),
      );
      const perNode = devices / nodes;
      separateDoubles(
        rows,
        total.map((load, expert) => load / replicas[expert]!),
        (a, b) => !hierarchical || Math.floor(a / perNode) === Math.floor(b / perNode),
      );
      layerDone();
      return Placement.fromRows(rows, { experts: loads.experts });
    });
    return { placements };
  },
};
