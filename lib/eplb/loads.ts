// How many tokens every expert got: counts per step, layer and logical expert (shared experts after the routed
// ones). Every planner, metric and simulator reads this one form. Invariant: counts are finite and >= 0, checked
// once on the way in; steps x layers x experts is complete, there is no missing entry.
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import { Placement } from '../placement/placement.js';

export interface LoadShape {
  steps: number;
  layers: number;
  experts: number;
}

const refuse = (message: string, arg: string, where?: string): never => {
  throw new MoeError('ERR_MOE_INVALID_ARG', where === undefined ? message : `${where}: ${message}`, {
    op: 'loads',
    arg,
  });
};

const check = new Arguments('loads');

const room = (counts: number, where: string | undefined): Float64Array => {
  try {
    return new Float64Array(counts);
  } catch {
    return refuse(
      `expected counts that fit in memory but there would be ${counts} of them`,
      'experts',
      where,
    );
  }
};

const topkOptions: readonly string[] = ['experts', 'stepTokens', 'validTokens', 'where'];

/** Loads of a trace: f64[steps, layers, experts] of (token, choice) pairs. */
export class Loads {
  readonly steps: number;
  readonly layers: number;
  readonly experts: number;
  /** f64[steps * layers * experts], step-major. Do not write to it. */
  readonly counts: Float64Array;

  /**
   * Takes the counts as they are (no copy of a Float64Array); a BigInt64Array is what `load` of `moeFusedGate` reads
   * as. Throws ERR_MOE_INVALID_ARG for a wrong length, and for NaN, negative entries and those from 2^53 on, naming
   * step, layer and expert. `where` is put in front of messages.
   */
  constructor(shape: LoadShape, counts: ArrayLike<number> | BigInt64Array, where?: string) {
    check.object('shape', shape);
    check.numbers('counts', counts);
    for (const name of ['steps', 'layers', 'experts'] as const)
      if (!Number.isInteger(shape[name]) || shape[name] < 1)
        refuse(
          `expected ${name} to be a positive integer but received ${describeValue(shape[name])}`,
          name,
          where,
        );
    const { steps, layers, experts } = shape;
    if (counts.length !== steps * layers * experts)
      refuse(
        `expected ${steps} steps x ${layers} layers x ${experts} experts = ${steps * layers * experts} counts but received ${counts.length}`,
        'counts',
        where,
      );
    // Sums and squares of counts that integers stand for exactly stay finite
    const most = 2 ** 53;
    for (let index = 0; index < counts.length; index++) {
      const value = counts[index]!;
      const isNumber = typeof value === 'number' || typeof value === 'bigint';
      if (!(isNumber && value >= 0 && value < most)) {
        const layer = Math.floor(index / experts) % layers;
        const wanted =
          isNumber && value >= most && value < Number.POSITIVE_INFINITY
            ? 'count below 2^53'
            : 'finite count >= 0';
        refuse(
          `layer ${layer}: expected a ${wanted} for expert ${index % experts} ` +
            `in step ${Math.floor(index / (experts * layers))} but received ${describeValue(value)}`,
          'counts',
          where,
        );
      }
    }
    this.steps = steps;
    this.layers = layers;
    this.experts = experts;
    this.counts =
      counts instanceof Float64Array ? counts : Float64Array.from(counts as ArrayLike<number>, Number);
  }

  /** From nested arrays, [layers][experts] or [steps][layers][experts]. Ragged arrays are refused by place. */
  static fromArrays(nested: readonly unknown[], where?: string): Loads {
    const first = check.list('nested', nested)[0];
    const isTrace = Array.isArray(first) && Array.isArray(first[0]);
    const trace = (isTrace ? nested : [nested]) as unknown[];
    const layers = Array.isArray(trace[0]) ? trace[0].length : 0;
    const experts =
      layers > 0 && Array.isArray((trace[0] as unknown[])[0]) ? (trace[0] as unknown[][])[0]!.length : 0;
    if (layers === 0 || experts === 0)
      refuse(
        'expected [layers][experts] or [steps][layers][experts] of counts but received an empty or flat list',
        'counts',
        where,
      );
    const counts = new Float64Array(trace.length * layers * experts);
    for (const [step, rows] of trace.entries()) {
      if (!Array.isArray(rows) || rows.length !== layers)
        refuse(
          `step ${step}: expected ${layers} layers (as in step 0) but received ${Array.isArray(rows) ? rows.length : String(rows)}`,
          'counts',
          where,
        );
      for (const [layer, row] of (rows as unknown[]).entries()) {
        if (!Array.isArray(row) || row.length !== experts)
          refuse(
            `layer ${layer}: expected ${experts} experts (as in layer 0) in step ${step} but received ${Array.isArray(row) ? row.length : String(row)}`,
            'counts',
            where,
          );
        for (const [expert, value] of (row as unknown[]).entries()) {
          if (typeof value !== 'number')
            refuse(
              `layer ${layer}: expected a count for expert ${expert} in step ${step} but received ${describeValue(value)}`,
              'counts',
              where,
            );
          counts[(step * layers + layer) * experts + expert] = value as number;
        }
      }
    }
    return new Loads({ steps: trace.length, layers, experts }, counts, where);
  }

  /**
   * Counts the router's choices. ids[layers * tokens * topK] in layer, token, column order; tokens are cut into
   * steps of `stepTokens` (a last incomplete step is left out). Rows at and beyond `validTokens` and ids of -1
   * (padding) are counted nowhere; any other id outside 0..experts-1 is refused.
   */
  static fromTopk(
    ids: ArrayLike<number>,
    shape: { layers: number; tokens: number; topK: number },
    options: { experts: number; stepTokens: number; validTokens?: number; where?: string },
  ): Loads {
    const { layers, tokens, topK } = check.object('shape', shape, ['layers', 'tokens', 'topK']);
    const { experts, stepTokens, where } = check.object('options', options, topkOptions);
    const valid = Math.min(tokens, check.integer('validTokens', options.validTokens ?? tokens, 0));
    for (const [name, value] of Object.entries({ layers, tokens, topK, stepTokens, experts }))
      if (!Number.isSafeInteger(value) || value < 1)
        refuse(`expected ${name} to be a positive integer but received ${describeValue(value)}`, name, where);
    if (check.numbers('ids', ids).length !== layers * tokens * topK)
      refuse(
        `expected ${layers} layers x ${tokens} tokens x ${topK} ids but received ${ids.length}`,
        'ids',
        where,
      );
    const steps = Math.floor(valid / stepTokens);
    if (steps < 1)
      refuse(
        `expected at least one step of ${stepTokens} tokens but received ${valid} tokens`,
        'stepTokens',
        where,
      );
    const counts = room(steps * layers * experts, where);
    for (let layer = 0; layer < layers; layer++)
      for (let token = 0; token < steps * stepTokens; token++)
        for (let column = 0; column < topK; column++) {
          const id = ids[(layer * tokens + token) * topK + column]!;
          if (id === -1) continue;
          if (!Number.isInteger(id) || id < 0 || id >= experts)
            refuse(
              `layer ${layer}: expected expert ids in 0..${experts - 1} or -1 ` +
                `but received ${describeValue(id)} for token ${token}`,
              'ids',
              where,
            );
          counts[(Math.floor(token / stepTokens) * layers + layer) * experts + id]!++;
        }
    return new Loads({ steps, layers, experts }, counts, where);
  }

  /**
   * Logical loads from counts per physical slot, [steps * layers * physical], under the placement (one per layer)
   * in force while they were counted.
   */
  static fromPhysical(physical: Loads, placements: readonly Placement[], where?: string): Loads {
    check.instance('physical', physical, Loads);
    if (check.instances('placements', placements, Placement).length !== physical.layers)
      refuse(
        `expected a placement for each of ${physical.layers} layers but received ${placements.length}`,
        'placements',
        where,
      );
    const experts = placements[0]!.experts;
    const counts = new Float64Array(physical.steps * physical.layers * experts);
    for (const [layer, placement] of placements.entries())
      if (placement.physicalExperts !== physical.experts)
        refuse(
          `layer ${layer}: expected counts of ${placement.physicalExperts} slots but received ${physical.experts}`,
          'counts',
          where,
        );
    for (let step = 0; step < physical.steps; step++)
      for (let layer = 0; layer < physical.layers; layer++) {
        const row = (step * physical.layers + layer) * experts;
        const from = physical.at(step, layer);
        const map = placements[layer]!.physicalToLogical;
        for (let slot = 0; slot < map.length; slot++) counts[row + map[slot]!]! += from[slot]!;
      }
    return new Loads({ steps: physical.steps, layers: physical.layers, experts }, counts, where);
  }

  /** f64[experts] of one step and layer. A view. */
  at(step: number, layer: number): Float64Array {
    const start = this.#rowOf(step, layer);
    return this.counts.subarray(start, start + this.experts);
  }

  #rowOf(step: number, layer: number): number {
    check.integer('step', step, 0, this.steps - 1);
    check.integer('layer', layer, 0, this.layers - 1);
    return (step * this.layers + layer) * this.experts;
  }

  /** Tokens of one step and layer, each counted for every expert it went to. Throws as `at` does. */
  tokens(step: number, layer: number): number {
    const { experts, counts } = this;
    const row = this.#rowOf(step, layer);
    let sum = 0;
    for (let expert = 0; expert < experts; expert++) sum += counts[row + expert]!;
    return sum;
  }

  /** f64[experts]: all steps of a layer summed. */
  total(layer: number): Float64Array {
    const { experts, layers, steps, counts } = this;
    check.integer('layer', layer, 0, layers - 1);
    const sum = new Float64Array(experts);
    for (let step = 0; step < steps; step++) {
      const row = (step * layers + layer) * experts;
      for (let expert = 0; expert < experts; expert++) sum[expert]! += counts[row + expert]!;
    }
    return sum;
  }

  /** Steps start..start+length-1, as a view of the same counts. */
  window(start: number, length: number): Loads {
    if (
      !Number.isInteger(start) ||
      !Number.isInteger(length) ||
      start < 0 ||
      length < 1 ||
      start + length > this.steps
    )
      refuse(
        `expected a window inside ${this.steps} steps but received start ${describeValue(start)} ` +
          `and length ${describeValue(length)}`,
        'window',
      );
    const row = this.layers * this.experts;
    const view = this.counts.subarray(start * row, (start + length) * row);
    return new Loads({ steps: length, layers: this.layers, experts: this.experts }, view);
  }

  /** The windows of `length` steps, one after the other; a last incomplete one is left out. */
  windows(length: number): Loads[] {
    if (!Number.isInteger(length) || length < 1)
      refuse(
        `expected windows of a positive number of steps but received ${describeValue(length)}`,
        'window',
      );
    return Array.from({ length: Math.floor(this.steps / length) }, (_, index) =>
      this.window(index * length, length),
    );
  }

  /**
   * f64[blocks, experts] of a layer: the steps summed into at most `most` blocks of equal length, newest steps kept
   * (the oldest steps.mod(length) ones are left out), as FlashLB's episodes are.
   */
  episodes(layer: number, most: number): { blocks: number; counts: Float64Array } {
    const length = Math.max(1, Math.ceil(this.steps / check.integer('most', most, 1)));
    const blocks = Math.floor(this.steps / length);
    const counts = new Float64Array(blocks * this.experts);
    const skipped = this.steps - blocks * length;
    for (let step = skipped; step < this.steps; step++) {
      const row = this.at(step, layer);
      const block = Math.floor((step - skipped) / length) * this.experts;
      for (let expert = 0; expert < row.length; expert++) counts[block + expert]! += row[expert]!;
    }
    return { blocks, counts };
  }

  /** The same trace with `shared` further columns that every token of a step chooses: sum of the step / topK each. */
  withShared(shared: number, topK: number): Loads {
    check.integer('shared', shared, 1);
    check.integer('topK', topK, 1);
    const experts = this.experts + shared;
    const counts = new Float64Array(this.steps * this.layers * experts);
    for (let step = 0; step < this.steps; step++)
      for (let layer = 0; layer < this.layers; layer++) {
        const from = this.at(step, layer);
        const row = (step * this.layers + layer) * experts;
        counts.set(from, row);
        let choices = 0;
        for (const value of from) choices += value;
        counts.fill(choices / topK, row + this.experts, row + experts);
      }
    return new Loads({ steps: this.steps, layers: this.layers, experts }, counts);
  }
}

/**
 * Refuses loads that say nothing about how to place experts: a layer without any token, or with all tokens on one
 * expert (a recording of dummy tokens, not of traffic). Throws ERR_MOE_INVALID_ARG naming the layer.
 */
export function checkPlannable(loads: Loads, where?: string): void {
  check.instance('loads', loads, Loads);
  for (let layer = 0; layer < loads.layers; layer++) {
    const total = loads.total(layer);
    const used = total.reduce((sum, value) => sum + (value > 0 ? 1 : 0), 0);
    if (used === 0) refuse(`layer ${layer}: expected some load but received all zero`, 'counts', where);
    if (used === 1 && loads.experts > 1)
      refuse(
        `layer ${layer}: expected load on more than one expert but received all of it on expert ${total.findIndex((value) => value > 0)}`,
        'counts',
        where,
      );
  }
}
