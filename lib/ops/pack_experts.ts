import { Context } from '../context.js';
import { MoeError } from '../errors.js';
import { type ExpertsLayout, ExpertWeights, type SwiGLU } from '../experts.js';
import { type CallScope, defineOp, type Rule } from '../op.js';
import { choice, flag, integer, real, resolveOptions, value } from '../options.js';
import { pack_experts } from '../oracle/pack_experts.js';
import { describeArgument } from '../owned_memory.js';
import { type FloatDType, Tensor } from '../tensor.js';

export interface PackExpertsInputs {
  /** Gate and up projections [experts, 2*intermediate, hidden], or [experts, hidden, 2*intermediate] `transposed`. */
  w13: Tensor<FloatDType>;
  /** Down projections [experts, hidden, intermediate], or [experts, intermediate, hidden] `transposed`. */
  w2: Tensor<FloatDType>;
  /** Biases [experts, 2*intermediate], in the order of w13. */
  b13?: Tensor<FloatDType>;
  /** Biases [experts, hidden]. */
  b2?: Tensor<FloatDType>;
}

export interface PackExpertsOptions {
  /** How w13 stores gate and up: 'halves' (all gate, then all up; default) or 'interleaved' (gpt-oss). */
  gateUp?: 'halves' | 'interleaved';
  /** The matrices are stored [in, out] instead of [out, in]. Default false. */
  transposed?: boolean;
  /** The layer's activation. Default silu(g) * u. */
  swiglu?: SwiGLU;
  /** Dtype to hold the weights in. Default: that of w13. */
  dtype?: FloatDType;
  /** Overwrite slots of these weights instead of making new ones. */
  into?: ExpertWeights;
  /** With `into`: the first slot to overwrite. Default 0. */
  firstSlot?: number;
}

const intermediate = ({ dim }: CallScope): number => dim('intermediate');
const shapeRule = (
  arg: string,
  rows: string,
  columns: string,
  expected: (scope: CallScope) => readonly [number, number],
): Rule => [
  arg,
  (scope) => {
    const [outer, inner] = scope.options.transposed ? [...expected(scope)].reverse() : expected(scope);
    return (
      (scope.dim(rows) === outer && scope.dim(columns) === inner) ||
      `expected ${arg}: [${scope.dim('count')}, ${outer}, ${inner}]${scope.options.transposed ? ' (transposed)' : ''} ` +
        `for experts of hidden ${scope.dim('hidden')} and intermediate ${intermediate(scope)} but received ` +
        `[${scope.dim('count')}, ${scope.dim(rows)}, ${scope.dim(columns)}]`
    );
  },
];

/** The op behind packExperts: copies weights into slots of the backend's own layout, converting the dtype. */
export const writeExperts = defineOp<
  PackExpertsInputs & { experts: ExpertWeights },
  Pick<PackExpertsOptions, 'gateUp' | 'transposed' | 'firstSlot'>,
  void
>({
  name: 'pack_experts',
  inputs: {
    experts: 'inout experts[slots, hidden, intermediate]',
    w13: 'f32|bf16|f16[count, rows13, columns13]',
    w2: 'f32|bf16|f16[count, rows2, columns2]',
    b13: 'f32|bf16|f16[count, 2*intermediate]?',
    b2: 'f32|bf16|f16[count, hidden]?',
  },
  options: {
    gateUp: choice(['halves', 'interleaved'], 'halves'),
    transposed: flag(false),
    firstSlot: integer({ min: 0, max: 65535, default: 0 }),
  },
  outputs: {},
  returns: 'nothing',
  rules: [
    shapeRule('w13', 'rows13', 'columns13', (scope) => [2 * intermediate(scope), scope.dim('hidden')]),
    shapeRule('w2', 'rows2', 'columns2', (scope) => [scope.dim('hidden'), intermediate(scope)]),
    [
      'firstSlot',
      ({ dim }) =>
        dim('firstSlot') + dim('count') <= dim('slots') ||
        `expected slots ${dim('firstSlot')}..${dim('firstSlot') + dim('count') - 1} to be among the ${dim('slots')} ` +
          `slots of experts but received firstSlot ${dim('firstSlot')}`,
    ],
    [
      'b13',
      ({ given, input }) =>
        (input('experts') as ExpertWeights).biases ||
        !(given.has('b13') || given.has('b2')) ||
        'expected no b13 and no b2: experts hold no biases',
    ],
  ],
  oracle: pack_experts,
});

/**
 * Room for `slots` experts, all weights 0, to be filled slot by slot with `packExperts(..., { into, firstSlot })`:
 * how a layer is loaded without ever holding it twice, and how a replica moves in.
 * @throws MoeError ERR_MOE_INVALID_ARG, ERR_MOE_OOM.
 */
export function allocateExperts(
  context: Context,
  layout: Omit<ExpertsLayout, 'swiglu' | 'biases'> & { biases?: boolean; swiglu?: SwiGLU },
): ExpertWeights {
  return allocate('allocate_experts', context, layout);
}

function allocate(op: string, context: Context, layout: unknown): ExpertWeights {
  if (!(context instanceof Context)) throw invalid(op, 'context', 'a context from createContext', context);
  const { swiglu, ...rest } = resolveOptions(
    op,
    {
      slots: integer({ min: 1, max: 65536 }),
      hidden: integer({ min: 1, max: 2 ** 31 - 1 }),
      intermediate: integer({ min: 1, max: 2 ** 30 - 1 }),
      dtype: choice(floatDTypes, undefined),
      biases: flag(false),
      swiglu: value('an object of alpha, beta and limit', isPlainObject, {}),
    },
    layout,
    noScope,
  ) as unknown as Omit<ExpertsLayout, 'swiglu'> & { swiglu: SwiGLU };
  return context.allocateExperts(op, { ...rest, swiglu: resolveSwiGLU(op, swiglu) });
}

/**
 * Packs expert weights into the backend's own layout. The tensors given are read on the queue and never changed; they
 * may be disposed right after the call.
 *
 * Shared experts to be fused are ordinary experts after the routed ones: pack them as the last slots.
 * @throws MoeError What every `Op` throws.
 */
export function packExperts(given: PackExpertsInputs, options: PackExpertsOptions = {}): ExpertWeights {
  const op = 'pack_experts';
  if (!isPlainObject(given)) throw invalid(op, 'inputs', 'an object', given);
  const inputs = { ...given }; // a getter answers once
  const { into, swiglu, dtype, ...layout } = resolveOptions(
    op,
    {
      ...writeExperts.op.options,
      into: value('ExpertWeights', (given) => given instanceof ExpertWeights, undefined, 'optional'),
      dtype: value(floatDTypes.map((name) => `'${name}'`).join(', '), isFloatDType, undefined, 'optional'),
      swiglu: value('an object of alpha, beta and limit', isPlainObject, undefined, 'optional'),
    },
    options,
    noScope,
  ) as PackExpertsOptions;
  if (into !== undefined) {
    const fixed = swiglu !== undefined ? 'swiglu' : dtype !== undefined ? 'dtype' : undefined;
    if (fixed !== undefined)
      throw invalid(op, fixed, 'nothing with into: those weights have theirs', options[fixed]);
    into.handle(op, 'into'); // refused by the name that it has here
    writeExperts({ experts: into, ...inputs }, layout);
    return into;
  }
  const { w13, w2 } = inputs;
  for (const [arg, tensor] of Object.entries({ w13, w2 })) {
    if (!(tensor instanceof Tensor) || tensor.shape.length !== 3 || !isFloatDType(tensor.dtype)) {
      throw invalid(op, arg, 'a tensor f32|bf16|f16[experts, rows, columns]', tensor);
    }
  }
  const [slots, rows2, columns2] = w2.shape;
  const experts = allocate(op, w13.context, {
    slots,
    hidden: layout.transposed ? columns2 : rows2,
    intermediate: layout.transposed ? rows2 : columns2,
    dtype: dtype ?? w13.dtype,
    biases: inputs.b13 !== undefined || inputs.b2 !== undefined,
    ...(swiglu === undefined ? {} : { swiglu }),
  });
  try {
    writeExperts({ experts, ...inputs }, layout);
  } catch (error) {
    experts.dispose();
    throw error;
  }
  return experts;
}

const floatDTypes = ['f32', 'bf16', 'f16'] as const;
const isFloatDType = (given: unknown): boolean => floatDTypes.includes(given as FloatDType);
const isPlainObject = (given: unknown): boolean =>
  typeof given === 'object' && given !== null && !Array.isArray(given) && !(given instanceof Date);
const noScope = { given: new Set<string>(), dim: () => 0 };

const invalid = (op: string, arg: string, expected: string, received: unknown): MoeError =>
  new MoeError(
    'ERR_MOE_INVALID_ARG',
    `expected ${arg}: ${expected} but received ${describeArgument(received)}`,
    { op, arg },
  );

function resolveSwiGLU(op: string, given: SwiGLU): Required<SwiGLU> {
  const kinds = { alpha: real({ default: 1 }), beta: real({ default: 0 }), limit: real({ default: 0 }) };
  const swiglu = resolveOptions(op, kinds, given, noScope) as unknown as Required<SwiGLU>;
  if (swiglu.limit < 0) throw invalid(op, 'limit', 'a number >= 0 (0: no clamping)', swiglu.limit);
  return swiglu;
}
