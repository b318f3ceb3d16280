// The project's own traces: seeded expert loads with the properties that separate planners. Popularity is Zipf with
// experts of a group correlated; on it sits one of four courses of time. Counts are Poisson around tokens * topK *
// share, so a trace has the sampling noise of a real one of its batch size.
import { Arguments } from '../arguments.js';
import { Loads } from './loads.js';
import { normal, poisson, uniform } from './random.js';

/**
 * 'steady': one popularity for ever, only sampling noise. 'drifting': popularity wanders (an Ornstein-Uhlenbeck walk
 * of the logits). 'bursty': topics switch on and off, each lifting some experts of some groups together.
 * 'mixed': prefill and decode phases with popularities and batch sizes of their own.
 */
export type TraceKind = 'steady' | 'drifting' | 'bursty' | 'mixed';

export interface TraceOptions {
  kind: TraceKind;
  steps: number;
  layers: number;
  /** Routed experts. */
  experts: number;
  seed: number;
  /** Expert groups whose members are correlated; default experts / 32, at least 1. */
  groups?: number;
  /** Tokens per step, all ranks together; default 4096. */
  tokens?: number;
  topK?: number;
  /** Zipf exponent of popularity; default 0.6. 0 is uniform. */
  skew?: number;
  /** Share of the variance of log popularity that is common to a group, 0..1; default 0.3. */
  groupCorrelation?: number;
  /** Steps after which a drifting popularity has forgotten half of itself; default 200. */
  driftSteps?: number;
  /** Mean steps a burst or a phase lasts; default 20. */
  burstSteps?: number;
}

const check = new Arguments('generate_trace');

export const traceKinds: readonly TraceKind[] = ['steady', 'drifting', 'bursty', 'mixed'];

const popularity = (
  experts: number,
  groups: number,
  skew: number,
  correlation: number,
  random: () => number,
): Float64Array => {
  const group = Array.from({ length: groups }, () => normal(random));
  const score = Array.from({ length: experts }, (_, expert) => {
    const common = group[Math.floor((expert * groups) / experts)]!;
    return Math.sqrt(correlation) * common + Math.sqrt(1 - correlation) * normal(random);
  });
  const order = score
    .map((_, expert) => expert)
    .sort((left, right) => score[right]! - score[left]! || left - right);
  const logits = new Float64Array(experts);
  for (const [rank, expert] of order.entries()) logits[expert] = -skew * Math.log(rank + 1);
  return logits;
};

const optionNames: readonly string[] = [
  'kind',
  'steps',
  'layers',
  'experts',
  'seed',
  'groups',
  'tokens',
  'topK',
  'skew',
  'groupCorrelation',
  'driftSteps',
  'burstSteps',
] satisfies (keyof TraceOptions)[];

/**
 * A seeded trace [steps, layers, experts]; the same options give the same counts everywhere. Throws
 * ERR_MOE_INVALID_ARG naming the option.
 */
export function generateTrace(options: TraceOptions): Loads {
  check.object('options', options, optionNames);
  const {
    kind,
    steps,
    layers,
    experts,
    seed,
    tokens = 4096,
    topK = 8,
    skew = 0.6,
    groupCorrelation = 0.3,
    driftSteps = 200,
    burstSteps = 20,
  } = options;
  check.oneOf('kind', kind, traceKinds);
  for (const [name, value] of Object.entries({
    steps,
    layers,
    experts,
    tokens,
    topK,
    driftSteps,
    burstSteps,
  }))
    check.integer(name, value, 1);
  check.integer('seed', seed, 0);
  check.number('skew', skew, 0);
  check.number('groupCorrelation', groupCorrelation, 0, 1);
  const groups = check.integer(
    'groups',
    options.groups === undefined ? Math.max(1, Math.floor(experts / 32)) : options.groups,
    1,
    experts,
  );
  const counts = new Float64Array(steps * layers * experts);
  for (let layer = 0; layer < layers; layer++) {
    const random = uniform(seed * 8191 + layer * 127 + 1);
    const base = popularity(experts, groups, skew, groupCorrelation, random);
    const other = popularity(experts, groups, skew, groupCorrelation, random);
    const walk = base.slice();
    const bursts: { until: number; lifted: Map<number, number> }[] = [];
    let decode = false;
    let phaseEnds = 0;
    const keep = 0.5 ** (1 / driftSteps);
    let sd = 0;
    for (const value of base) sd += value * value;
    const mean = base.reduce((sum, value) => sum + value, 0) / experts;
    sd = Math.sqrt(Math.max(0, sd / experts - mean * mean));
    const share = new Float64Array(experts);
    for (let step = 0; step < steps; step++) {
      let logits = base;
      let batch = tokens;
      if (kind === 'drifting') {
        logits = walk;
        if (step > 0)
          for (let expert = 0; expert < experts; expert++)
            walk[expert] =
              mean + keep * (walk[expert]! - mean) + Math.sqrt(1 - keep * keep) * sd * normal(random);
      } else if (kind === 'mixed') {
        if (step >= phaseEnds) {
          decode = step > 0 && !decode;
          phaseEnds = step + 1 + poisson(burstSteps - 1, random);
        }
        logits = decode ? other : base;
        batch = decode ? Math.ceil(tokens / 4) : tokens;
      } else if (kind === 'bursty' && random() < 1 / burstSteps) {
        const group = Math.floor(random() * groups);
        const lifted = new Map<number, number>();
        for (let expert = 0; expert < experts; expert++)
          if (random() < (Math.floor((expert * groups) / experts) === group ? 0.5 : 0.05))
            lifted.set(expert, 0.5 + random());
        bursts.push({ until: step + 1 + poisson(burstSteps, random), lifted });
      }
      let sum = 0;
      for (let expert = 0; expert < experts; expert++) {
        let logit = logits[expert]!;
        for (const burst of bursts) if (step < burst.until) logit += burst.lifted.get(expert) ?? 0;
        share[expert] = Math.exp(logit);
        sum += share[expert]!;
      }
      for (let expert = 0; expert < experts; expert++)
        counts[(step * layers + layer) * experts + expert] = poisson(
          (batch * topK * share[expert]!) / sum,
          random,
        );
    }
  }
  return new Loads({ steps, layers, experts }, counts);
}
