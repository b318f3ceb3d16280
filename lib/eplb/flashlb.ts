// FlashLB, from the description of vllm-ascend's policy_flashlb and the paper text around it: replica counts and
// placement are searched together. Experts are cut into blocks by risk (mean + z sd of their load over episodes); for
// one block after the other the number of extra replicas is varied around the min-max value, every trial is placed by
// risk and scored over all episodes. Only layers whose placement fell behind are planned, only improving ones taken.
// Defects of the original that are gone: replicas are capped at the devices, a replica always finds a device,
// variances are clamped at 0, layers that are not selected keep their placement.
import { Placement } from '../placement/placement.js';
import { matchRows } from './assignment.js';
import type { Loads } from './loads.js';
import type { Policy } from './policy.js';
import { separateDoubles } from './separate.js';

export interface FlashlbOptions {
  /** Blocks of the search; default 4. */
  depth?: number;
  /** Extra replicas tried to either side of the min-max value; default 8. */
  width?: number;
}

const z = 0.6744897501960817; // quantile 0.75 of the normal distribution
const mostEpisodes = 64;

interface Episodes {
  blocks: number;
  experts: number;
  /** f64[blocks, experts], each count plus 1. */
  counts: Float64Array;
  mean: Float64Array;
  /** f64[experts, experts]. */
  covariance: Float64Array;
}

function statistics(counts: Float64Array, blocks: number, experts: number): Episodes {
  const mean = new Float64Array(experts);
  for (let block = 0; block < blocks; block++)
    for (let expert = 0; expert < experts; expert++)
      mean[expert]! += counts[block * experts + expert]! / blocks;
  const covariance = new Float64Array(experts * experts);
  if (blocks > 1) {
    const centred = new Float64Array(experts);
    for (let block = 0; block < blocks; block++) {
      for (let expert = 0; expert < experts; expert++)
        centred[expert] = counts[block * experts + expert]! - mean[expert]!;
      for (let one = 0; one < experts; one++) {
        const scaled = centred[one]! / (blocks - 1);
        const row = one * experts;
        for (let two = 0; two < experts; two++) covariance[row + two]! += scaled * centred[two]!;
      }
    }
  }
  return { blocks, experts, counts, mean, covariance };
}

/** Mean over rows of counts of (peak * devices + 0.01) / (sum + 0.01): the planner's own score, lower is better. */
function score(
  counts: Float64Array,
  blocks: number,
  rows: readonly ArrayLike<number>[],
  replicas: ArrayLike<number>,
): number {
  const experts = replicas.length;
  let sum = 0;
  for (let block = 0; block < blocks; block++) {
    let peak = 0;
    let total = 0;
    for (const row of rows) {
      let load = 0;
      for (let slot = 0; slot < row.length; slot++)
        load += counts[block * experts + row[slot]!]! / replicas[row[slot]!]!;
      total += load;
      if (load > peak) peak = load;
    }
    sum += (peak * rows.length + 0.01) / (total + 0.01);
  }
  return sum / blocks;
}

/** history[m]: i32[members] replica counts with m extra ones, each to the highest risk per replica. */
function allocations(
  risk: Float64Array,
  members: readonly number[],
  extra: number,
  cap: number,
): Int32Array[] {
  const replicas = new Int32Array(members.length).fill(1);
  const history = [replicas.slice()];
  for (let added = 0; added < extra; added++) {
    let best = -1;
    for (let index = 0; index < members.length; index++)
      if (
        replicas[index]! < cap &&
        (best < 0 || risk[members[index]!]! / replicas[index]! > risk[members[best]!]! / replicas[best]!)
      )
        best = index;
    if (best < 0) break;
    replicas[best]!++;
    history.push(replicas.slice());
  }
  return history;
}

function place(episodes: Episodes, replicas: Int32Array, devices: number, slots: number): number[][] {
  const { experts, mean, covariance } = episodes;
  const share = mean.map((value, expert) => value / replicas[expert]!);
  const order = Array.from({ length: experts }, (_, expert) => expert).sort(
    (left, right) => share[right]! - share[left]! || left - right,
  );
  const rows: number[][] = Array.from({ length: devices }, () => []);
  const load = new Float64Array(devices);
  const variance = new Float64Array(devices);
  let doubled = false;
  for (const expert of order) {
    const row = expert * experts;
    const own = covariance[row + expert]! / replicas[expert]! ** 2;
    for (let copy = 0; copy < replicas[expert]!; copy++) {
      let best = -1;
      let least = Number.POSITIVE_INFINITY;
      let bestVariance = 0;
      let room = -1;
      for (let device = 0; device < devices; device++) {
        const held = rows[device]!;
        if (held.length >= slots) continue;
        room = device;
        let joint = 0;
        let has = false;
        for (let slot = 0; slot < held.length; slot++) {
          const other = held[slot]!;
          if (other === expert) has = true;
          joint += covariance[row + other]! / replicas[other]!;
        }
        if (has) continue;
        const next = variance[device]! + own + (2 * joint) / replicas[expert]!;
        const risk = load[device]! + share[expert]! + z * Math.sqrt(Math.max(0, next));
        if (risk < least) {
          least = risk;
          best = device;
          bestVariance = next;
        }
      }
      if (best < 0) {
        doubled = true;
        best = room;
        bestVariance = variance[best]! + own;
      }
      rows[best]!.push(expert);
      load[best]! += share[expert]!;
      variance[best] = bestVariance;
    }
  }
  if (doubled) separateDoubles(rows, share);
  return rows;
}

/** Joint search of replicas and rows for one layer. counts: f64[blocks, experts], used as they are. */
export function flashlbRows(
  counts: Float64Array,
  blocks: number,
  devices: number,
  slots: number,
  { depth = 4, width = 8 }: FlashlbOptions = {},
): { rows: number[][]; score: number } {
  const experts = counts.length / blocks;
  const episodes = statistics(counts, blocks, experts);
  const risk = episodes.mean.map(
    (value, expert) => value + z * Math.sqrt(Math.max(0, episodes.covariance[expert * experts + expert]!)),
  );
  const order = Array.from({ length: experts }, (_, expert) => expert).sort(
    (left, right) => risk[right]! - risk[left]! || left - right,
  );
  const size = Math.ceil(experts / depth);
  const replicas = new Int32Array(experts).fill(1);
  let remaining = devices * slots - experts;
  let best: { rows: number[][]; score: number } | undefined;
  let start = 0;
  for (; start + size < experts; start += size) {
    const block = order.slice(start, start + size);
    const later = order.slice(start + size);
    const joint = allocations(risk, [...block, ...later], remaining, devices)[remaining];
    const usual =
      joint === undefined
        ? remaining
        : joint.subarray(0, block.length).reduce((sum, value) => sum + value - 1, 0);
    const ofBlock = allocations(risk, block, remaining, devices);
    const ofLater = allocations(risk, later, remaining, devices);
    let chosen = -1;
    let lowest = Number.POSITIVE_INFINITY;
    const trials = [usual];
    for (let distance = 1; distance <= width; distance++) trials.push(usual - distance, usual + distance);
    for (const extra of trials) {
      const first = ofBlock[extra];
      const second = ofLater[remaining - extra];
      if (extra < 0 || extra > remaining || first === undefined || second === undefined) continue;
      for (const [index, expert] of block.entries()) replicas[expert] = first[index]!;
      for (const [index, expert] of later.entries()) replicas[expert] = second[index]!;
      const rows = place(episodes, replicas, devices, slots);
      const value = score(counts, blocks, rows, replicas);
      if (value < lowest) {
        lowest = value;
        chosen = extra;
      }
      if (best === undefined || value < best.score) best = { rows, score: value };
    }
    for (const [index, expert] of block.entries()) replicas[expert] = ofBlock[chosen]![index]!;
    for (const [index, expert] of later.entries()) replicas[expert] = ofLater[remaining - chosen]![index]!;
    remaining -= chosen;
  }
  if (best !== undefined) return best;
  const all = allocations(risk, order, remaining, devices).at(-1)!;
  for (const [index, expert] of order.entries()) replicas[expert] = all[index]!;
  const rows = place(episodes, replicas, devices, slots);
  return { rows, score: score(counts, blocks, rows, replicas) };
}

function smoothed(loads: Loads, layer: number, most: number): { blocks: number; counts: Float64Array } {
  const { blocks, counts } = loads.episodes(layer, most);
  return { blocks, counts: counts.map((value) => value + 1) };
}

export const flashlb: Policy = {
  name: 'flashlb',
  summary:
    "vllm-ascend's FlashLB: joint search of replicas and placement over episodes, layer by layer where needed",
  keepsBudget: false,
  plan({ loads, devices, slots, current, depth, memory }, layerDone) {
    const past =
      (memory as { past: (number | null)[] } | undefined)?.past ??
      new Array<number | null>(loads.layers).fill(null);
    const [ratio, value] = devices < 32 ? [0.95, 0.9] : [0.9, 0.85];
    const next = past.slice();
    const placements = current.map((placement, layer) => {
      const steps = smoothed(loads, layer, loads.steps);
      const replicas = Int32Array.from({ length: loads.experts }, (_, expert) =>
        placement.replicaCount(expert),
      );
      const now = 1 / score(steps.counts, steps.blocks, placement.toRows(), replicas);
      const before = past[layer] ?? null;
      layerDone();
      if (before !== null && !(now < before * ratio || now < value)) return placement;
      const { blocks, counts } = smoothed(loads, layer, mostEpisodes);
      const found = flashlbRows(counts, blocks, devices, slots, { depth });
      const rows = matchRows(found.rows, current[layer]!.toRows());
      const copies = new Int32Array(loads.experts);
      for (const row of rows) for (const expert of row) copies[expert]!++;
      const planned = 1 / score(steps.counts, steps.blocks, rows, copies);
      if (planned <= now) return placement;
      next[layer] = planned;
      return Placement.fromRows(rows, { experts: loads.experts });
    });
    return { placements, memory: { past: next } };
  },
};
