// Whether weighted dispatch pays: the even split against shares fitted to the window before (causal: what a server
// that refits now and then would get), to the window itself (oracle: the most that dispatch can recover without
// moving an expert) and to each step's own counts (what fitting between gate and dispatch gets).
import { Arguments } from '../arguments.js';
import { Placement } from '../placement/placement.js';
import { dispatchShares, sharedDeviceLoads } from './dispatch_shares.js';
import { Loads } from './loads.js';
import { deviceLoads, peakToAverage } from './metrics.js';

export interface DispatchFigures {
  /** PAR of the served window, mean over layers. */
  even: number;
  causal: number;
  oracle: number;
  /** Mean over layers and steps of the PAR of each step: even split, and shares fitted to the step itself. */
  stepEven: number;
  stepOwn: number;
  /** 'weighted' only where the causal figure beats the even split by more than `margin`. */
  use: 'even' | 'weighted';
}

const check = new Arguments('dispatch_figures');

/** Figures of a placement that serves `served` after `before` was seen. `margin` is in PAR, default 0.002. */
export function dispatchFigures(
  placements: readonly Placement[],
  before: Loads,
  served: Loads,
  margin = 0.002,
): DispatchFigures {
  check.instance('before', before, Loads);
  check.instance('served', served, Loads);
  check.number('margin', margin, 0);
  const layers = check.instances('placements', placements, Placement).length;
  for (const [name, loads] of Object.entries({ before, served }))
    if (loads.layers !== layers)
      check.refuse(name, `of ${layers} layers, one for each placement`, loads.layers);
  let even = 0;
  let causal = 0;
  let oracle = 0;
  let stepEven = 0;
  let stepOwn = 0;
  for (const [layer, placement] of placements.entries()) {
    const total = served.total(layer);
    const past = dispatchShares(placement, before.total(layer)).shares;
    even += peakToAverage(deviceLoads(placement, total)) / layers;
    causal += peakToAverage(sharedDeviceLoads(placement, past, total)) / layers;
    oracle += peakToAverage(dispatchShares(placement, total).deviceLoads) / layers;
    for (let step = 0; step < served.steps; step++) {
      const counts = served.at(step, layer);
      stepEven += peakToAverage(deviceLoads(placement, counts)) / (layers * served.steps);
      stepOwn +=
        peakToAverage(dispatchShares(placement, counts, { tolerance: 1e-3 }).deviceLoads) /
        (layers * served.steps);
    }
  }
  return { even, causal, oracle, stepEven, stepOwn, use: causal < even - margin ? 'weighted' : 'even' };
}
