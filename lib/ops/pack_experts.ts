import type { Context } from '../context.js';
import { MoeError } from '../errors.js';
import { type ExpertsLayout, ExpertWeights, type SwiGLU } from '../experts.js';
import { type CallScope, defineOp, type Rule } from '../op.js';
import { choice, describeValue, flag, integer, resolveOptions } from '../options.js';
import { pack_experts } from '../oracle/pack_experts.js';
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
          'slots of experts',
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
  const op = 'allocate_experts';
  const { dim } = { dim: () => 0 };
  resolveOptions(
    op,
    {
      slots: integer({ min: 1, max: 65536 }),
      hidden: integer({ min: 1, max: 2 ** 31 - 1 }),
      intermediate: integer({ min: 1, max: 2 ** 30 - 1 }),
      dtype: choice(['f32', 'bf16', 'f16'], 'f32'),
      biases: flag(false),
      swiglu: { native: '', expected: 'an object', default: {}, accepts: isObject, encode: Number },
    },
    layout,
    { given: new Set(), dim },
  );
  return context.allocateExperts({
    ...layout,
    biases: layout.biases ?? false,
    swiglu: resolveSwiGLU(op, layout.swiglu),
  });
}

/**
 * Packs expert weights into the backend's own layout. The tensors given are read on the queue and never changed; they
 * may be disposed right after the call.
 *
 * Shared experts to be fused are ordinary experts after the routed ones: pack them as the last slots.
 * @throws MoeError ERR_MOE_INVALID_ARG for a wrong dtype, shape or option; ERR_MOE_OOM.
 */
export function packExperts(inputs: PackExpertsInputs, options: PackExpertsOptions = {}): ExpertWeights {
  const op = 'pack_experts';
  const { into, swiglu, dtype, ...rest } = options;
  if (into !== undefined) {
    if (!(into instanceof ExpertWeights)) {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected into: ExpertWeights but received ${describeValue(into)}`,
        {
          op,
          arg: 'into',
        },
      );
    }
    if (swiglu !== undefined || dtype !== undefined) {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        'expected no swiglu and no dtype with into: those weights have them',
        {
          op,
          arg: swiglu === undefined ? 'dtype' : 'swiglu',
        },
      );
    }
    writeExperts({ experts: into, ...inputs }, rest);
    return into;
  }
  const { w13, w2 } = inputs;
  for (const [arg, tensor] of Object.entries({ w13, w2 })) {
    if (!(tensor instanceof Tensor) || tensor.shape.length !== 3 || !floatDTypes.has(tensor.dtype)) {
      const received = tensor instanceof Tensor ? tensor : describeValue(tensor);
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${arg}: a tensor f32|bf16|f16[experts, rows, columns] but received ${received}`,
        { op, arg },
      );
    }
  }
  const [slots, rows2, columns2] = w2.shape;
  const experts = allocateExperts(w13.context, {
    slots,
    hidden: rest.transposed ? columns2 : rows2,
    intermediate: rest.transposed ? rows2 : columns2,
    dtype: dtype ?? w13.dtype,
    biases: inputs.b13 !== undefined || inputs.b2 !== undefined,
    ...(swiglu === undefined ? {} : { swiglu }),
  });
  try {
    writeExperts({ experts, ...inputs }, rest);
  } catch (error) {
    experts.dispose();
    throw error;
  }
  return experts;
}

const floatDTypes: ReadonlySet<string> = new Set<FloatDType>(['f32', 'bf16', 'f16']);
const isObject = (value: unknown): value is object => typeof value === 'object' && value !== null;

function resolveSwiGLU(op: string, given: SwiGLU = {}): Required<SwiGLU> {
  for (const [name, value] of Object.entries(given)) {
    const known = name === 'alpha' || name === 'beta' || name === 'limit';
    if (!known || !Number.isFinite(value) || (name === 'limit' && value < 0)) {
      const expected = known ? `swiglu.${name}: a finite number` : 'swiglu: { alpha, beta, limit }';
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${expected} but received ${name} = ${describeValue(value)}`,
        {
          op,
          arg: 'swiglu',
        },
      );
    }
  }
  return { alpha: given.alpha ?? 1, beta: given.beta ?? 0, limit: given.limit ?? 0 };
}
