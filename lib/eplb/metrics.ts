// What a placement costs under a load. The load of a device is the sum over its slots of load / replicas (even split),
// the peak-to-average ratio (PAR) is the highest device load over the mean one: 1 is perfect, and an expert-parallel
// step takes as long as its peak. A step or window without any token has PAR 1.
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { countMoves } from '../placement/align.js';
import { Placement } from '../placement/placement.js';
import { Loads } from './loads.js';

const check = new Arguments('metrics');

/** f64[devices]: tokens per device, every expert split evenly over its replicas. counts: [experts]. */
export function deviceLoads(placement: Placement, counts: ArrayLike<number>): Float64Array {
  check.instance('placement', placement, Placement);
  if (check.numbers('counts', counts).length !== placement.experts)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected loads of ${placement.experts} experts but received ${counts.length}`,
      { op: 'metrics', arg: 'counts' },
    );
  const loads = new Float64Array(placement.devices);
  for (let device = 0; device < placement.devices; device++)
    for (const expert of placement.expertsOn(device))
      loads[device]! += counts[expert]! / placement.replicaCount(expert);
  return loads;
}

/** Peak over average of device loads; 1 when there is no load. */
export function peakToAverage(loads: ArrayLike<number>): number {
  check.numbers('loads', loads);
  let peak = 0;
  let sum = 0;
  for (let device = 0; device < loads.length; device++) {
    peak = Math.max(peak, loads[device]!);
    sum += loads[device]!;
  }
  return sum > 0 ? (peak * loads.length) / sum : 1;
}

export interface Par {
  /** Mean over layers. */
  mean: number;
  /** The worst layer. */
  max: number;
  /** f64[layers]. */
  layers: Float64Array;
}

const overall = (layers: Float64Array): Par => ({
  mean: layers.reduce((sum, value) => sum + value, 0) / layers.length,
  max: layers.reduce((most, value) => Math.max(most, value), 0),
  layers,
});

const sameShape = (loads: Loads, placements: readonly Placement[]): void => {
  check.instance('loads', loads, Loads);
  if (loads.layers !== check.instances('placements', placements, Placement).length)
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected a placement for each of ${loads.layers} layers but received ${placements.length}`,
      { op: 'metrics', arg: 'placements' },
    );
  for (const [layer, { experts }] of placements.entries())
    if (experts !== loads.experts)
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `layer ${layer}: expected a placement of ${loads.experts} experts but received ${experts}`,
        { op: 'metrics', arg: `placements[${layer}]` },
      );
};

/** PAR of the window: of all steps summed. */
export function windowPar(loads: Loads, placements: readonly Placement[]): Par {
  sameShape(loads, placements);
  return overall(
    Float64Array.from(placements, (placement, layer) =>
      peakToAverage(deviceLoads(placement, loads.total(layer))),
    ),
  );
}

/** Mean over the steps of the PAR of each step: what the steps really wait for. */
export function stepPar(loads: Loads, placements: readonly Placement[]): Par {
  sameShape(loads, placements);
  return overall(
    Float64Array.from(placements, (placement, layer) => {
      const factor = Float64Array.from(
        placement.physicalToLogical,
        (expert) => 1 / placement.replicaCount(expert),
      );
      const { physicalToLogical, slotOffsets, devices } = placement;
      let sum = 0;
      for (let step = 0; step < loads.steps; step++) {
        const counts = loads.at(step, layer);
        let peak = 0;
        let total = 0;
        for (let device = 0; device < devices; device++) {
          let load = 0;
          for (let slot = slotOffsets[device]!; slot < slotOffsets[device + 1]!; slot++)
            load += counts[physicalToLogical[slot]!]! * factor[slot]!;
          total += load;
          if (load > peak) peak = load;
        }
        sum += total > 0 ? (peak * devices) / total : 1;
      }
      return sum / loads.steps;
    }),
  );
}

/** f64[steps]: the PAR of each step, mean over layers. */
export function parByStep(loads: Loads, placements: readonly Placement[]): Float64Array {
  sameShape(loads, placements);
  const par = new Float64Array(loads.steps);
  for (const [layer, placement] of placements.entries())
    for (let step = 0; step < loads.steps; step++)
      par[step]! += peakToAverage(deviceLoads(placement, loads.at(step, layer))) / loads.layers;
  return par;
}

/** Moves of every layer: expert weights that devices must receive. */
export function movesPerLayer(from: readonly Placement[], to: readonly Placement[]): Int32Array {
  if (check.list('from', from).length !== check.list('to', to).length)
    throw new MoeError('ERR_MOE_INVALID_ARG', `expected ${from.length} layers but received ${to.length}`, {
      op: 'metrics',
      arg: 'to',
    });
  return Int32Array.from(from, (placement, layer) => countMoves(placement, to[layer]!));
}

/** Bytes that devices must receive in all: moves x bytes of one expert's weights, scales included. */
export function bytesToMove(moves: ArrayLike<number>, bytesPerExpert: number): number {
  check.numbers('moves', moves);
  check.number('bytesPerExpert', bytesPerExpert, 0);
  return Array.from(moves).reduce((sum, count) => sum + count, 0) * bytesPerExpert;
}
