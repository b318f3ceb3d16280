// What one layer's load looks like to the planner: a few scenarios (blocks of steps of this window, and earlier
// windows) and the noise of a single step around them. Every scenario is scaled so that the mean device load is 1,
// because a step waits for its own peak, whatever its batch size. Deviations of blocks from the window's mean are
// shrunk by the share that sampling noise explains, so that the planner does not fit what will not come again.
import type { Loads } from './loads.js';
import type { EarlierLoads, Past } from './memory.js';

export interface Scenarios {
  experts: number;
  /** Number of scenarios, and how many of them, the last ones, are of earlier windows. */
  blocks: number;
  earlier: number;
  /** f64[experts, blocks]: load of an expert, in units of the mean device load. */
  loads: Float64Array;
  /** f64[blocks], sums to 1. */
  weights: Float64Array;
  /** f64[experts]: weighted mean over the scenarios. */
  mean: Float64Array;
  /** f64[experts]: the window alone, its steps summed. */
  window: Float64Array;
  /** f64[experts]: variance of one step around its scenario by sampling. */
  noise: Float64Array;
  /** f64[experts]: that, and what the next window differs by from all scenarios. */
  variance: Float64Array;
  /** The part of `noise` that is fresh in every step, 0..1: the rest lasts for some steps, as bursts do. */
  fresh: number;
  /** True where single steps are so uneven that the scenarios had to be cut finer than sampling noise would allow. */
  fine: boolean;
  /** True where, besides, a step has so few tokens that balancing the window's own sum would fit its sampling error. */
  rough: boolean;
  /** The part of the blocks' spread that sampling noise does not explain, 0..1. */
  structure: number;
  /** Variance of this window's weighted mean in units of `noise`: about 1 / steps. */
  uncertainty: number;
  /** The same of all scenarios' weighted mean, earlier steps included. */
  pooledUncertainty: number;
  /** Steps of the window that had any load. */
  steps: number;
}

const mostBlocks = 8;
/** Blocks where the steps of a block differ by more than sampling: there is structure to see inside them. */
export const fineBlocks = 16;
/** The same where steps have so few tokens that the window's own sum says little: every step alone, if possible. */
export const roughBlocks = 64;
/**
 * Variance of a device's load by sampling alone, in a step or in the whole window, from which on the window's own sum
 * is not worth balancing exactly.
 */
const roughStep = 0.02;
const roughWindow = 5e-4;
const structured = 1.2;
/** Variance of a device's load from step to step, in units of the mean load squared, that tells steps apart. */
const uneven = 0.02;
/** Scenarios of single steps from which on they show part of their own noise. */
const shownBy = 8;
const nothing: Past = { windows: [], runs: [], keep: 1, error: 0 };

/** How the steps of a window are cut at first: enough blocks to see bursts, at least two steps each to see noise. */
const coarseBlocks = (steps: number): number => (steps < 4 ? steps : Math.min(mostBlocks, steps >> 1));

/** The scenarios of one layer. A layer without load gives equal loads. */
export function scenariosOf(loads: Loads, layer: number, devices: number, past: Past = nothing): Scenarios {
  const sampling = samplingOf(loads, layer, devices);
  const rough = isRough(sampling, loads.steps);
  if (isUneven(loads, layer, sampling)) {
    const recent = Math.min(rough ? roughBlocks : fineBlocks, loads.steps);
    const scenarios = cut(loads, layer, devices, recent, past.runs.length, true);
    joinEarlier(scenarios, past.runs, layer, devices);
    thinNoise(scenarios);
    scenarios.rough = rough;
    return scenarios;
  }
  const scenarios = cut(loads, layer, devices, coarseBlocks(loads.steps), past.windows.length, false);
  joinEarlier(scenarios, past.windows, layer, devices);
  foresee(scenarios, past, devices);
  return scenarios;
}

/** Variance of a device's load in a step if tokens were drawn one by one, mean over the steps; 0 without load. */
export function samplingOf(loads: Loads, layer: number, devices: number): number {
  let sum = 0;
  let used = 0;
  for (let step = 0; step < loads.steps; step++) {
    const tokens = loads.tokens(step, layer);
    if (tokens === 0) continue;
    sum += devices / tokens;
    used++;
  }
  return used > 0 ? sum / used : 0;
}

/** Whether a step or the window has too few tokens for the window's own sum to be worth balancing exactly. */
export const isRough = (sampling: number, steps: number): boolean =>
  sampling >= roughStep || sampling / steps >= roughWindow;

/**
 * The scenarios as a forecast: experts return towards the mean load as windows did before, and where the next window
 * will be off by more than the scenarios differ, the rest is noise of every expert in proportion to its load. Only for
 * blocks: single steps show all that themselves.
 */
function foresee(scenarios: Scenarios, { keep, error }: Past, devices: number): void {
  const { experts, blocks, loads, weights, mean, noise, variance } = scenarios;
  if (error === 0) return;
  let spread = 0;
  let square = 0;
  for (let expert = 0; expert < experts; expert++) {
    const load = mean[expert]!;
    square += load ** 2;
    for (let block = 0; block < blocks; block++)
      spread += weights[block]! * (loads[expert * blocks + block]! - load) ** 2;
  }
  const unseen = Math.max(0, error - spread / square);
  for (let expert = 0; expert < experts; expert++) {
    const load = mean[expert]!;
    const factor = load > 0 ? keep + ((1 - keep) * devices) / (experts * load) : 1;
    for (let at = expert * blocks; at < (expert + 1) * blocks; at++) loads[at]! *= factor;
    mean[expert] = load * factor;
    variance[expert] = noise[expert]! + unseen * mean[expert]! ** 2;
  }
}

/**
 * Whether single steps are scenarios of their own: they differ by more than sampling, and by enough to matter. Few
 * steps are told apart over the whole window; of many, only what differs inside a block is lost in the block.
 */
function isUneven(loads: Loads, layer: number, sampling: number): boolean {
  if (loads.steps < 2) return false;
  const rough = isRough(sampling, loads.steps);
  const few = loads.steps <= (rough ? roughBlocks : fineBlocks);
  const dispersion = dispersionOf(loads, layer, few ? 1 : coarseBlocks(loads.steps));
  return dispersion >= structured && (rough || sampling * dispersion >= uneven);
}

/**
 * Steps that are scenarios of their own bring their noise along, the better the more there are; what is added on top
 * stands for what they have not shown yet.
 */
function thinNoise({ blocks, noise, variance }: Scenarios): void {
  for (const [expert, value] of noise.entries()) variance[expert] = value * Math.min(1, shownBy / blocks);
}

/** Variance of the steps' shares around their block's, over that of Poisson counts. */
function dispersionOf(loads: Loads, layer: number, blocks: number): number {
  const { experts, steps, layers, counts } = loads;
  let observed = 0;
  let poisson = 0;
  const sum = new Float64Array(experts);
  const square = new Float64Array(experts);
  for (let block = 0; block < blocks; block++) {
    sum.fill(0);
    square.fill(0);
    let used = 0;
    let inverse = 0;
    const end = Math.ceil(((block + 1) * steps) / blocks);
    for (let step = Math.ceil((block * steps) / blocks); step < end; step++) {
      const row = (step * layers + layer) * experts;
      const tokens = loads.tokens(step, layer);
      if (tokens === 0) continue;
      used++;
      inverse += 1 / tokens;
      for (let expert = 0; expert < experts; expert++) {
        const share = counts[row + expert]! / tokens;
        sum[expert]! += share;
        square[expert]! += share * share;
      }
    }
    if (used < 2) continue;
    for (let expert = 0; expert < experts; expert++) {
      observed += square[expert]! - (sum[expert]! * sum[expert]!) / used;
      poisson += (sum[expert]! * inverse * (used - 1)) / used ** 2;
    }
  }
  return poisson > 0 ? observed / poisson : 1;
}

function cut(
  loads: Loads,
  layer: number,
  devices: number,
  recent: number,
  earlier: number,
  fine: boolean,
): Scenarios {
  const { experts, steps, layers, counts } = loads;
  const blocks = recent + earlier;
  const x = new Float64Array(experts * blocks);
  const window = new Float64Array(experts);
  const noise = new Float64Array(experts);
  const used = new Float64Array(recent);
  let poissonRate = 0;
  let squares = 0;
  let poissonSum = 0;
  let degrees = 0;
  const square = new Float64Array(experts);
  const last = new Float64Array(experts);
  let changes = 0;
  let whole = true;

  // Shares of every step, summed by block
  let total = 0;
  for (let step = 0; step < steps; step++) {
    const start = (step * layers + layer) * experts;
    const sum = loads.tokens(step, layer);
    if (sum === 0) continue;
    const block = Math.floor((step * recent) / steps);
    const scale = devices / sum;
    used[block]!++;
    total += sum;
    poissonRate += scale;
    for (let expert = 0; expert < experts; expert++) {
      const count = counts[start + expert]!;
      const share = count * scale;
      window[expert]! += count;
      x[expert * blocks + block]! += share;
      square[expert]! += share * share;
      const change = share - last[expert]!;
      if (total > sum) changes += change * change;
      last[expert] = share;
      // Sums of what replicas got may miss the whole number by rounding
      if (Math.abs(count - Math.round(count)) > 1e-6 * (1 + count)) whole = false;
    }
  }
  const stepsUsed = used.reduce((sum, value) => sum + value, 0);
  if (stepsUsed === 0) {
    x.fill(devices / experts);
    window.fill(devices / experts);
    const even = new Float64Array(blocks).fill(1 / blocks);
    return {
      experts,
      blocks,
      earlier,
      loads: x,
      weights: even,
      mean: window.slice(),
      window,
      noise,
      variance: noise.slice(),
      fresh: 1,
      fine: false,
      rough: false,
      structure: 0,
      uncertainty: 1,
      pooledUncertainty: 1,
      steps: 0,
    };
  }
  poissonRate /= stepsUsed;

  // Noise inside blocks, and how much of the blocks' spread it explains
  const weights = new Float64Array(blocks);
  let blocksUsed = 0;
  for (let block = 0; block < recent; block++) {
    if (used[block] === 0) continue;
    blocksUsed++;
    degrees += used[block]! - 1;
    weights[block] = used[block]! / stepsUsed;
  }
  let between = 0;
  for (let expert = 0; expert < experts; expert++) {
    const row = expert * blocks;
    let within = square[expert]!;
    let mean = 0;
    for (let block = 0; block < recent; block++) {
      if (used[block] === 0) continue;
      const sum = x[row + block]!;
      within -= (sum * sum) / used[block]!;
      x[row + block] = sum / used[block]!;
      mean += sum / stepsUsed;
    }
    window[expert] = (window[expert]! * devices) / total;
    squares += within;
    poissonSum += mean;
    for (let block = 0; block < recent; block++)
      if (used[block]! > 0) between += weights[block]! * (x[row + block]! - mean) ** 2;
  }
  // Counts vary at least like whole tokens do; what else the loads may be, shares or means, varies as it shows
  const least = whole ? 0.25 : 0;
  const poissonVariance = poissonSum * poissonRate;
  const dispersion = degrees > 0 ? Math.max(least, squares / degrees / poissonVariance) : whole ? 1 : 0;
  const freshDispersion = stepsUsed > 1 ? changes / (2 * (stepsUsed - 1)) / poissonVariance : dispersion;
  const fresh =
    dispersion > 0 ? Math.max(Math.min(1, least / dispersion), Math.min(1, freshDispersion / dispersion)) : 1;
  const expected =
    blocksUsed > 1 ? (poissonSum * poissonRate * dispersion * (blocksUsed - 1)) / stepsUsed : 0;
  const explained = blocksUsed > 1 && between > 0 ? Math.max(0, 1 - expected / between) : 0;
  const kept = fine ? 1 : explained;
  if (explained > 0 && blocksUsed === recent) {
    const decays = fine ? decaysOfSteps : decaysOfBlocks;
    recencyWeights(x, experts, blocks, recent, decays, weights);
  }
  const mean = new Float64Array(experts);
  for (let expert = 0; expert < experts; expert++) {
    const row = expert * blocks;
    let centre = 0;
    for (let block = 0; block < recent; block++) centre += weights[block]! * x[row + block]!;
    for (let block = 0; block < recent; block++) x[row + block] = centre + kept * (x[row + block]! - centre);
    noise[expert] = centre * poissonRate * dispersion;
    mean[expert] = centre;
  }

  let uncertainty = 0;
  for (let block = 0; block < recent; block++)
    if (used[block]! > 0) uncertainty += weights[block]! ** 2 / used[block]!;

  return {
    experts,
    blocks,
    earlier,
    loads: x,
    weights,
    mean,
    window,
    noise,
    variance: noise.slice(),
    fresh,
    fine,
    rough: false,
    structure: explained,
    uncertainty,
    pooledUncertainty: uncertainty,
    steps: stepsUsed,
  };
}

/** Earlier windows as scenarios after the recent ones; all are shrunk towards their mean by what noise explains. */
function joinEarlier(
  scenarios: Scenarios,
  past: readonly EarlierLoads[],
  layer: number,
  devices: number,
): void {
  const { experts, blocks, earlier, loads: x, weights, mean, noise, steps, fine, uncertainty } = scenarios;
  if (earlier === 0 || steps === 0) return;
  const recent = blocks - earlier;
  let pastWeight = 0;
  for (let block = recent; block < blocks; block++) {
    const { counts, weight } = past[block - recent]!;
    let sum = 0;
    for (let expert = 0; expert < experts; expert++) sum += counts[layer * experts + expert]!;
    weights[block] = sum > 0 ? weight : 0;
    pastWeight += weights[block]!;
    for (let expert = 0; expert < experts; expert++)
      x[expert * blocks + block] =
        sum > 0 ? (counts[layer * experts + expert]! * devices) / sum : mean[expert]!;
  }
  if (pastWeight === 0) return;
  for (let block = 0; block < blocks; block++) weights[block]! /= 1 + pastWeight;
  if (fine) {
    scenarios.pooledUncertainty = uncertainty / (1 + pastWeight) ** 2;
    for (let block = recent; block < blocks; block++) scenarios.pooledUncertainty += weights[block]! ** 2;
  }
  let apart = 0;
  let byNoise = 0;
  const pooled = new Float64Array(experts);
  for (let expert = 0; expert < experts; expert++) {
    const row = expert * blocks;
    for (let block = recent; block < blocks; block++) {
      pooled[expert]! += weights[block]! * x[row + block]!;
      apart += weights[block]! * (x[row + block]! - mean[expert]!) ** 2;
      byNoise += (weights[block]! * 2 * noise[expert]!) / steps;
    }
    pooled[expert]! += mean[expert]! / (1 + pastWeight);
  }
  const real = fine ? 1 : apart > 0 ? Math.max(0, 1 - byNoise / apart) : 0;
  for (let expert = 0; expert < experts; expert++) {
    const row = expert * blocks;
    const shift = (1 - real) * (pooled[expert]! - mean[expert]!);
    for (let block = 0; block < recent; block++) x[row + block]! += shift;
    for (let block = recent; block < blocks; block++)
      x[row + block] = pooled[expert]! + real * (x[row + block]! - pooled[expert]!);
    mean[expert] = pooled[expert]!;
  }
}

/** A decay is taken only if its error is this part of the next slower one's: bursts that end look like drift. */
const recencyMargin = 0.85;

/** Decays that are tried, per block and per step: from 'all alike' to 'mostly the last few'. */
const decaysOfBlocks = [1, 0.8, 0.6];
const decaysOfSteps = [1, 0.9];

/**
 * Weights of the recent blocks: the exponential decay whose weighted mean of the blocks so far best predicts the mean
 * of the rest, over all cuts of this window. Without trend that is the plain mean.
 */
function recencyWeights(
  x: Float64Array,
  experts: number,
  blocks: number,
  recent: number,
  decays: readonly number[],
  weights: Float64Array,
): void {
  let best = 1;
  let least = Number.POSITIVE_INFINITY;
  for (const decay of decays) {
    let error = 0;
    for (let expert = 0; expert < experts; expert++) {
      const row = expert * blocks;
      let rest = 0;
      for (let block = 0; block < recent; block++) rest += x[row + block]!;
      let seen = 0;
      let norm = 0;
      for (let block = 0; block + 1 < recent; block++) {
        const value = x[row + block]!;
        seen = seen * decay + value;
        norm = norm * decay + 1;
        rest -= value;
        if (block >= 1) error += (seen / norm - rest / (recent - 1 - block)) ** 2;
      }
    }
    if (error < least * recencyMargin) {
      least = error;
      best = decay;
    }
  }
  let sum = 0;
  for (let block = 0; block < recent; block++) {
    weights[block] = best ** (recent - 1 - block);
    sum += weights[block]!;
  }
  for (let block = 0; block < recent; block++) weights[block]! /= sum;
}
