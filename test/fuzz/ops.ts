// Random legal cases of every op as fast-check makes and minimises them: sizes and options are drawn, data comes from
// a seed. What a backend gives is compared with the oracle.
import fc from 'fast-check';
import { expect } from 'vitest';
import {
  type Context,
  type FloatDType,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeRouter,
  packExperts,
  type SwiGLU,
  sharedExperts,
  type Tensor,
} from '../../lib/index.js';
import { clampedSwiGLU } from '../cases/experts.js';
import { floatDTypes } from '../cases/floats.js';
import type { GateCase } from '../cases/gate.js';
import { Random } from '../cases/random.js';
import { checkGate, runGate } from '../ops/gate.js';

const dtype = fc.constantFrom(...floatDTypes);
const size = (most: number) => fc.integer({ min: 0, max: most });
const some = (most: number) => fc.integer({ min: 1, max: most });
const swiglu = fc.constantFrom<SwiGLU>({}, clampedSwiGLU, { alpha: 1.7 });

/** Makes the tensors of a case: the same on every context. */
class Maker {
  readonly #context: Context;
  readonly random: Random;
  readonly #made: Tensor[] = [];
  readonly #special: boolean;

  constructor(context: Context, seed: number, special: boolean) {
    this.#context = context;
    this.random = new Random(seed);
    this.#special = special;
  }

  /** Floats of about 1; with `special`, a NaN or an infinity here and there. */
  floats<D extends FloatDType>(dtype: D, ...shape: number[]): Tensor<D> {
    const values = this.random.normals(shape.reduce((a, b) => a * b));
    if (this.#special) {
      for (let i = 0; i < values.length; i++) {
        if (this.random.chance(0.005)) values[i] = this.random.pick([Number.NaN, Infinity, -Infinity]);
      }
    }
    return this.#own(this.#context.tensor(dtype, shape, values as never));
  }

  /** Weights that keep sums over `width` of about 1, and no special values. */
  weights<D extends FloatDType>(dtype: D, width: number, ...shape: number[]): Tensor<D> {
    const values = this.random.normals(
      shape.reduce((a, b) => a * b),
      1 / Math.sqrt(Math.max(width, 1)),
    );
    return this.#own(this.#context.tensor(dtype, shape, values as never));
  }

  integers(shape: number[], draw: (index: number) => number): Tensor<'i32'> {
    const length = shape.reduce((a, b) => a * b);
    return this.#own(
      this.#context.tensor(
        'i32',
        shape,
        Int32Array.from({ length }, (_, i) => draw(i)),
      ),
    );
  }

  #own<T extends Tensor>(tensor: T): T {
    this.#made.push(tensor);
    return tensor;
  }

  dispose(): void {
    for (const tensor of this.#made) tensor.dispose();
  }
}

interface ExpertsShape {
  slots: number;
  hidden: number;
  intermediate: number;
  held: FloatDType;
  given: FloatDType;
  biases: boolean;
  swiglu: SwiGLU;
  transposed: boolean;
  interleaved: boolean;
  again: boolean;
}
const experts = fc.record<ExpertsShape>({
  slots: some(9),
  hidden: some(70),
  intermediate: some(40),
  held: dtype,
  given: dtype,
  biases: fc.boolean(),
  swiglu,
  transposed: fc.boolean(),
  interleaved: fc.boolean(),
  again: fc.boolean(),
});

function pack(make: Maker, shape: ExpertsShape) {
  const { slots, hidden, intermediate, held, given, transposed } = shape;
  const gateUp = shape.interleaved ? 'interleaved' : 'halves';
  const inputs = (count: number) => ({
    w13: make.weights(
      given,
      hidden,
      count,
      ...(transposed ? [hidden, 2 * intermediate] : [2 * intermediate, hidden]),
    ),
    w2: make.weights(
      given,
      intermediate,
      count,
      ...(transposed ? [intermediate, hidden] : [hidden, intermediate]),
    ),
    ...(shape.biases
      ? { b13: make.weights(given, 4, count, 2 * intermediate), b2: make.weights(given, 4, count, hidden) }
      : {}),
  });
  const packed = packExperts(inputs(slots), { dtype: held, swiglu: shape.swiglu, transposed, gateUp });
  if (shape.again)
    packExperts(inputs(1), { into: packed, firstSlot: make.random.integer(slots), transposed, gateUp });
  return packed;
}

type Outputs = Readonly<Record<string, Tensor | undefined>>;
interface Case<T> {
  readonly arbitrary: fc.Arbitrary<T>;
  readonly run: (make: Maker, given: T) => Outputs;
}
const define = <T>(arbitrary: fc.Arbitrary<T>, run: (make: Maker, given: T) => Outputs): Case<T> => ({
  arbitrary,
  run,
});

// biome-ignore lint/suspicious/noExplicitAny: every op has parameters of its own
const cases: Record<string, Case<any>> = {
  moe_router: define(
    fc.record({
      tokens: size(140),
      hidden: size(90),
      experts: size(40),
      x: dtype,
      w: dtype,
      bias: fc.boolean(),
    }),
    (make, { tokens, hidden, experts, x, w, bias }) => ({
      logits: moeRouter({
        hidden: make.floats(x, tokens, hidden),
        weight: make.weights(w, hidden, experts, hidden),
        ...(bias ? { bias: make.floats('f32', experts) } : {}),
      }),
    }),
  ),
  moe_dispatch: define(
    fc.record({
      tokens: size(300),
      columns: size(12),
      experts: some(70),
      firstExpert: size(40),
      blockSize: fc.constantFrom(0, 0, 1, 2, 7, 16),
      hidden: fc.option(size(20)),
      x: dtype,
    }),
    (make, { tokens, columns, experts, firstExpert, blockSize, hidden, x }) => {
      const ids = make.integers([tokens, columns], () => make.random.integer(firstExpert + experts + 5) - 2);
      const rows = hidden === null ? {} : { hidden: make.floats(x, tokens, hidden) };
      return { ...moeDispatch({ ids, ...rows }, { experts, firstExpert, blockSize }) };
    },
  ),
  moe_experts: define(
    fc.record({
      experts,
      rows: fc.array(size(40), { maxLength: 9 }),
      gap: size(3),
      x: dtype,
      weighted: fc.boolean(),
    }),
    (make, { experts, rows, gap, x, weighted }) => {
      // Buckets one after the other with gaps between them, in which nothing is to be computed
      const counts = Array.from({ length: experts.slots }, (_, e) => rows[e] ?? 0);
      const offsets = [0];
      for (const count of counts) offsets.push(offsets.at(-1)! + count + gap);
      const capacity = offsets.at(-1)!;
      return {
        output: moeExperts({
          rows: make.floats(x, capacity, experts.hidden),
          counts: make.integers([experts.slots], (e) => counts[e]),
          offsets: make.integers([experts.slots + 1], (e) => offsets[e]),
          experts: pack(make, experts),
          ...(weighted
            ? {
                order: make.integers([capacity], () => make.random.integer(8)),
                weights: make.floats('f32', 4, 2),
              }
            : {}),
        }),
      };
    },
  ),
  moe_combine: define(
    fc.record({
      tokens: size(60),
      columns: size(12),
      hidden: size(90),
      capacity: some(80),
      x: dtype,
      scale: fc.constantFrom(1, 2.5, -0.5),
      zero: size(3),
      onInput: fc.boolean(),
    }),
    (make, { tokens, columns, hidden, capacity, x, scale, zero, onInput }) => {
      const shape = [tokens, columns];
      return {
        output: moeCombine(
          {
            rows: make.floats(x, capacity, hidden),
            inverse: make.integers(shape, () => make.random.integer(capacity + 2) - 2),
            weights: make.floats('f32', ...shape),
            ...(zero > 0
              ? {
                  ids: make.integers(shape, () => make.random.integer(12) - 1),
                  hidden: make.floats(x, tokens, hidden),
                }
              : {}),
          },
          { outputScale: scale, zeroExperts: zero, firstZeroExpert: 6, weightsOnInput: onInput },
        ),
      };
    },
  ),
  fused_moe: define(
    fc.record({
      experts,
      tokens: size(140),
      columns: size(9),
      x: dtype,
      firstExpert: size(5),
      scale: fc.constantFrom(1, 2.5, -0.5),
      zero: size(3),
      onInput: fc.boolean(),
    }),
    (make, { experts, tokens, columns, x, firstExpert, scale, zero, onInput }) => {
      const last = firstExpert + experts.slots;
      return {
        output: fusedMoe(
          {
            hidden: make.floats(x, tokens, experts.hidden),
            ids: make.integers([tokens, columns], () => make.random.integer(last + zero + 3) - 1),
            weights: make.weights('f32', columns, tokens, columns),
            experts: pack(make, experts),
          },
          {
            outputScale: scale,
            firstExpert,
            zeroExperts: zero,
            firstZeroExpert: last,
            weightsOnInput: onInput,
          },
        ),
      };
    },
  ),
  shared_experts: define(
    fc.record({
      experts,
      tokens: size(140),
      x: dtype,
      gated: fc.boolean(),
      routed: fc.boolean(),
      parts: fc.boolean(),
    }),
    (make, { experts, tokens, x, gated, routed, parts }) => {
      const { hidden } = experts;
      const dense = pack(make, { ...experts, slots: 1 });
      const input = make.floats(x, tokens, hidden);
      const rest = {
        ...(gated ? { expertGate: make.weights(x, hidden, hidden) } : {}),
        ...(routed ? { routed: make.floats(x, tokens, hidden) } : {}),
      };
      if (!parts) return { output: sharedExperts({ hidden: input, experts: dense, ...rest }) };
      const projected = sharedExperts({ hidden: input, experts: dense }, { part: 'gateUp' });
      return {
        projected,
        output: sharedExperts({ hidden: input, experts: dense, projected, ...rest }, { part: 'down' }),
      };
    },
  ),
};

const tolerances: Record<FloatDType, number> = { f32: 3e-5, bf16: 2e-2, f16: 3e-3 };

/** NaN where the oracle has it, infinities equal, the rest within the tolerance of the narrowest dtype involved. */
function compare(
  name: string,
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  tolerance: number,
): void {
  expect(actual.length).toBe(expected.length);
  let scale = 1;
  for (let i = 0; i < expected.length; i++)
    if (Number.isFinite(expected[i])) scale = Math.max(scale, Math.abs(expected[i]));
  for (let i = 0; i < expected.length; i++) {
    const [a, b] = [actual[i], expected[i]];
    if (Object.is(a, b) || a === b || Math.abs(a - b) <= tolerance * scale) continue;
    throw new Error(`${name}[${i}] is ${a} instead of ${b}`);
  }
}

async function difference(
  given: unknown,
  tested: Context,
  oracle: Context,
  { run }: Case<unknown>,
  seed: number,
  special: boolean,
) {
  const [actual, expected] = await Promise.all(
    [tested, oracle].map(async (context) => {
      const make = new Maker(context, seed, special);
      const outputs = Object.entries(run(make, given)).filter(([, tensor]) => tensor !== undefined) as [
        string,
        Tensor,
      ][];
      make.dispose(); // with the work in flight
      const values = await Promise.all(outputs.map(([, tensor]) => tensor.read()));
      for (const [, tensor] of outputs) tensor.dispose();
      return outputs.map(([name, tensor], i) => ({
        name,
        dtype: tensor.dtype,
        values: values[i] as Float32Array,
      }));
    }),
  );
  // A projection that is rounded in between may round the other way: what follows is as coarse as the narrowest
  const narrowest = Math.max(...actual.map((output) => tolerances[output.dtype as FloatDType] ?? 0));
  for (const [i, { name, dtype, values }] of actual.entries()) {
    compare(name, values, expected[i].values, dtype === 'i32' ? 0 : narrowest);
  }
}

/** Gate cases have a judge of their own, which knows where scores are too close to be called. */
const gateCase = fc
  .record({
    tokens: size(40),
    groups: some(16),
    perGroup: some(24),
    topGroups: size(15),
    topK: size(31),
    scoring: fc.constantFrom('softmax', 'sigmoid', 'sqrtSoftplus'),
    selection: fc.constantFrom('score', 'score', 'logits', 'uniform'),
    groupScore: fc.constantFrom('max', 'top2Sum'),
    bias: fc.constantFrom(undefined, 'normal', 'special'),
    kind: fc.constantFrom('normal', 'coarse', 'mixed', 'nan', 'infinite', 'everything', 'extreme', 'equal'),
    dtype,
    valid: fc.option(size(40)),
    rounds: fc.constantFrom(0, 1, 3),
    slots: fc.option(some(60)),
    renormalize: fc.boolean(),
    scale: fc.constantFrom(1, 2.5, 0.7),
    onOutput: fc.boolean(),
    shared: size(8),
    zero: size(20),
    seed: fc.nat(),
  })
  .map((given): GateCase => {
    const single = given.selection !== 'score';
    const groups = single ? 1 : given.groups;
    const experts = given.groups * given.perGroup;
    const topGroups = 1 + (given.topGroups % groups);
    return {
      tokens: given.tokens,
      experts,
      kind: given.kind as GateCase['kind'],
      dtype: given.dtype,
      seed: given.seed,
      rounds: given.rounds,
      ...(single || given.bias === undefined ? {} : { bias: given.bias as 'normal' | 'special' }),
      ...(given.valid === null ? {} : { validTokens: Math.min(given.valid, given.tokens) }),
      ...(given.slots === null ? {} : { slots: given.slots }),
      options: {
        topK: 1 + (given.topK % Math.min(32, (experts / groups) * topGroups)),
        scoring: given.scoring as 'softmax',
        selection: given.selection as 'score',
        groups,
        topGroups,
        groupScore: given.groupScore as 'max',
        renormalize: given.renormalize,
        routedScalingFactor: given.scale,
        scalePlacement: given.onOutput ? 'onOutput' : 'inWeights',
        sharedExperts: given.shared,
        zeroExperts: given.zero % experts,
        captureLogicalIds: true,
        seed: given.seed,
      },
    };
  });

/** The ops, each with a property that fast-check can try: the op on `tested` does what the oracle does. */
export function properties(
  tested: Context,
  oracle: Context,
): Record<string, fc.IAsyncPropertyWithHooks<unknown[]>> {
  const all: Record<string, fc.IAsyncPropertyWithHooks<unknown[]>> = {
    moe_fused_gate: fc.asyncProperty(gateCase, async (given) => {
      checkGate(given, await runGate(tested, given, given.seed! % 2 === 0 ? 'number' : 'tensor'));
    }) as never,
  };
  for (const [op, each] of Object.entries(cases)) {
    all[op] = fc.asyncProperty(each.arbitrary, fc.nat(), fc.boolean(), (given, seed, special) =>
      difference(given, tested, oracle, each, seed, special),
    ) as never;
  }
  return all;
}
