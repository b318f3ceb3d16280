// defineOp(spec): the one dispatcher. A spec is data; a call validates against it, takes the backend from the
// tensors, allocates the outputs and enqueues. No op, and no backend, repeats any of this.
import type { Context } from './context.js';
import { MoeError } from './errors.js';
import { ExpertWeights } from './experts.js';
import { describeValue, listOf, type OptionKinds, type OptionScope, resolveOptions } from './options.js';
import { describeArgument, OwnedMemory } from './owned_memory.js';
import { evaluateDim, formatDim, parseSignature, type Signature, solveDim } from './signature.js';
import { type DType, describeTensor, elementsOf, type Handle, Tensor } from './tensor.js';

/** What rules, computed dimensions and output conditions may look at. */
export interface CallScope extends OptionScope {
  input(name: string): Tensor | ExpertWeights | undefined;
}

/** The argument a rule is about, and the rule: true, or the sentence of the error. */
export type Rule = readonly [arg: string, check: (scope: CallScope) => true | string];

export interface OutputSpec {
  readonly type: string;
  readonly when: (scope: CallScope) => boolean;
}

/** How the oracle computes an op: values in, values written into `outputs`. Narrow floats arrive widened to f32. */
// biome-ignore lint/suspicious/noExplicitAny: each oracle declares the arguments it takes; the contract test runs them all
export type Oracle = (inputs: any, options: any, outputs: any) => void;

export interface OpSpec {
  /** snake_case, the name of the op in every folder. */
  readonly name: string;
  readonly inputs: Readonly<Record<string, string>>;
  readonly options?: OptionKinds;
  /** Dimensions computed from bound ones and options. */
  readonly computed?: Readonly<Record<string, (scope: CallScope) => number>>;
  readonly outputs: Readonly<Record<string, string | OutputSpec>>;
  /** 'tensor': the one output of the call; 'record': all of them by name; 'nothing': the op changes its inputs. */
  readonly returns: 'tensor' | 'record' | 'nothing';
  readonly rules?: readonly Rule[];
  readonly oracle: Oracle;
}

/** One argument of a call, as a backend gets it. */
export interface CallInput {
  readonly name: string;
  readonly signature: Signature;
  readonly value: Tensor | ExpertWeights | undefined;
  /** The host number of a `count`, when no tensor is given. */
  readonly count?: number;
}

/** One result: memory first, a tensor once the call is enqueued, so that the work begins before the objects exist. */
export interface CallOutput {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly handle: Handle;
}

/** A validated call on its way to a backend. */
export interface Call {
  readonly op: CompiledOp;
  readonly dims: ReadonlyMap<string, number>;
  readonly inputs: readonly CallInput[];
  /** In the order of the spec; undefined where a call does not have that output. */
  readonly outputs: readonly (CallOutput | undefined)[];
  readonly options: Readonly<Record<string, unknown>>;
}

/** A spec with its signatures parsed, and the list of fields that native calls carry in this order. */
export interface CompiledOp {
  readonly spec: OpSpec;
  readonly name: string;
  readonly inputs: readonly { readonly name: string; readonly signature: Signature }[];
  readonly outputs: readonly {
    readonly name: string;
    readonly signature: Signature;
    readonly when?: (scope: CallScope) => boolean;
  }[];
  readonly dims: readonly string[];
  readonly computed: readonly (readonly [name: string, compute: (scope: CallScope) => number])[];
  readonly rules: readonly Rule[];
  readonly options: OptionKinds;
  /** One line per field; `describe()` of a native backend must give the same lines. */
  readonly fields: readonly string[];
}

export type OpArguments<I, O> =
  Record<never, never> extends O ? [inputs: I, options?: O] : [inputs: I, options: O];

/**
 * What every op throws: MoeError ERR_MOE_INVALID_ARG for an argument of a wrong type, dtype, shape or value,
 * ERR_MOE_DISPOSED for a disposed tensor or a closed context, ERR_MOE_WRONG_CONTEXT for tensors of different contexts,
 * ERR_MOE_OOM without memory for its outputs, ERR_MOE_DEVICE_LOST after a fault of the device.
 */
export interface Op<I, O, R> {
  (...args: OpArguments<I, O>): R;
  readonly op: CompiledOp;
}

/** Every op of this process, by name. */
export const definedOps: ReadonlyMap<string, CompiledOp> = new Map();

export function defineOp<I extends object, O extends object, R>(spec: OpSpec): Op<I, O, R> {
  const op = compile(spec);
  (definedOps as Map<string, CompiledOp>).set(op.name, op);
  const call = (inputs: I, options?: O): R => run(op, inputs, options) as R;
  return Object.assign(call, { op });
}

/** Whether a value is an op, for listing the ops among the exports of the package. */
export function isOp(value: unknown): value is Op<object, object, unknown> {
  return typeof value === 'function' && 'op' in value;
}

function compile(spec: OpSpec): CompiledOp {
  const options = spec.options ?? {};
  const inputs = Object.entries(spec.inputs).map(([name, text]) => ({
    name,
    signature: parseSignature(text),
  }));
  const outputs = Object.entries(spec.outputs).map(([name, output]) =>
    typeof output === 'string'
      ? { name, signature: parseSignature(output) }
      : { name, signature: parseSignature(output.type), when: output.when },
  );
  const dims: string[] = [];
  for (const { signature } of inputs) {
    if (signature.kind === 'count') continue;
    for (const [{ name }] of signature.dims.filter((dim) => dim.length === 1)) {
      if (name !== undefined && !(name in options) && !dims.includes(name)) dims.push(name);
    }
  }
  const computed = Object.entries(spec.computed ?? {});
  dims.push(...computed.map(([name]) => name));
  const dtype = ({ dtypeOf, dtypes }: Signature) =>
    dtypeOf === undefined ? dtypes.join('|') : `=${dtypeOf}`;
  const fields = [
    ...dims.map((name) => `dim ${name}`),
    ...inputs.map(({ name, signature: s }) => {
      const optional = s.optional ? '?' : '';
      if (s.kind === 'tensor') return `${s.inout ? 'inout' : 'in'}${optional} ${name} ${dtype(s)}`;
      return s.kind === 'experts' ? `${s.inout ? 'inout ' : ''}experts ${name}` : `count ${name}`;
    }),
    ...outputs.map(
      ({ name, signature: s, when }) => `out${when === undefined ? '' : '?'} ${name} ${dtype(s)}`,
    ),
    ...listOf(options).map(([name, kind]) => `${name}: ${kind.native}`),
  ];
  const rules = spec.rules ?? [];
  return { spec, name: spec.name, inputs, outputs, dims, computed, rules, options, fields };
}

const A_COUNT = 'a number or a tensor i32[1]';

function run(op: CompiledOp, given: object, givenOptions: unknown): unknown {
  const { name: opName, spec } = op;
  const inputs = readInputs(op, given);
  const context = contextOf(opName, inputs);
  const bound = new Map<string, number>();
  const boundBy = new Map<string, CallInput>();
  for (const input of inputs) bind(op, input, bound, boundBy);
  const scope: CallScope = {
    options: {},
    given: {
      has: (name) =>
        inputs.some(
          (input) => input.name === name && (input.value !== undefined || input.count !== undefined),
        ),
    },
    dim: (name) => bound.get(name) ?? 0,
    input: (name) => inputs.find((input) => input.name === name)?.value,
  };
  const options = resolveOptions(opName, op.options, givenOptions, scope);
  (scope as { options: unknown }).options = options;
  context.assertUsable(opName); // now that no getter of the caller's is left that could close it
  for (const [name] of listOf(op.options)) {
    const value = options[name];
    if (typeof value === 'number') bound.set(name, value);
  }

  checkDtypes(opName, inputs);
  for (const input of inputs) checkShape(opName, input, bound, boundBy);
  for (const [arg, check] of op.rules) {
    const verdict = check(scope);
    if (verdict !== true) throw new MoeError('ERR_MOE_INVALID_ARG', verdict, { op: opName, arg });
  }
  for (const [name, compute] of op.computed) bound.set(name, compute(scope));

  const outputs: (CallOutput | undefined)[] = [];
  try {
    for (const { name, signature, when } of op.outputs) {
      if (when !== undefined && !when(scope)) {
        outputs.push(undefined);
        continue;
      }
      const shape = signature.dims.map((dim) => evaluateDim(dim, bound) ?? 0);
      const source = scope.input(signature.dtypeOf ?? '') as Tensor | undefined;
      const dtype = source?.dtype ?? signature.dtypes[0];
      outputs.push({ name, dtype, shape, handle: context.reserve(opName, name, dtype, shape) });
    }
    if (hasWork(inputs, outputs)) context.run({ op, dims: bound, inputs, outputs, options });
  } catch (error) {
    for (const output of outputs) if (output !== undefined) context.unreserve(output.handle);
    throw error;
  }
  if (spec.returns === 'nothing') return undefined;
  const results: Record<string, Tensor> = {};
  for (const output of outputs) {
    if (output === undefined) continue;
    const tensor = context.own(output);
    if (spec.returns === 'tensor') return tensor;
    results[output.name] = tensor;
  }
  return results;
}

/**
 * Whether a call has anything to write. Where it has not, its dimensions may be any numbers, such as 2^50 tokens of no
 * columns, and no backend is to loop over them.
 */
function hasWork(inputs: readonly CallInput[], outputs: Call['outputs']): boolean {
  const written = (shape: readonly number[] | undefined) => shape !== undefined && elementsOf(shape) > 0;
  return (
    outputs.some((output) => written(output?.shape)) ||
    inputs.some(({ signature, value }) => signature.inout && written(value && shapeOf(value)))
  );
}

/** Reads every property once, so that a getter cannot answer differently later, and checks what kind of thing it is. */
function readInputs(op: CompiledOp, given: object): CallInput[] {
  if (typeof given !== 'object' || given === null || given instanceof OwnedMemory) {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected inputs: an object of ${op.inputs.map((input) => input.name).join(', ')} but received ` +
        describeArgument(given),
      {
        op: op.name,
        arg: 'inputs',
      },
    );
  }
  for (const name of Object.keys(given)) {
    if (!op.inputs.some((input) => input.name === name)) {
      const known = op.inputs.map((input) => input.name).join(', ');
      throw new MoeError('ERR_MOE_INVALID_ARG', `unknown input '${name}'; the inputs are: ${known}`, {
        op: op.name,
        arg: name,
      });
    }
  }
  return op.inputs.map(({ name, signature }) => {
    const value = (given as Record<string, unknown>)[name];
    if (value === undefined && signature.optional) return { name, signature, value: undefined };
    if (signature.kind === 'experts' ? value instanceof ExpertWeights : value instanceof Tensor) {
      return { name, signature, value: value as Tensor | ExpertWeights };
    }
    if (signature.kind === 'count' && typeof value === 'number') {
      return { name, signature, value: undefined, count: value };
    }
    const expected =
      signature.kind === 'experts'
        ? 'ExpertWeights (from packExperts)'
        : signature.kind === 'count'
          ? A_COUNT
          : `a tensor ${signature.text}`;
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected ${name}: ${expected} but received ${describeArgument(value)}${stranger(value)}`,
      {
        op: op.name,
        arg: name,
      },
    );
  });
}

/** A tensor of a second copy of the package, or a proxy of one, looks right and is not. */
const stranger = (value: unknown): string =>
  describeArgument(value) === 'an object' ? ' that this copy of moe-kernels did not make' : '';

function contextOf(op: string, inputs: readonly CallInput[]): Context {
  let first: CallInput | undefined;
  for (const input of inputs) {
    if (input.value === undefined) continue;
    first ??= input;
    if (input.value.context !== first.value!.context) {
      throw new MoeError(
        'ERR_MOE_WRONG_CONTEXT',
        `expected ${input.name} in the context of ${first.name} (${first.value!.context}) but it is in another ` +
          `(${input.value.context}); copy it with tensor.to(context)`,
        { op, arg: input.name },
      );
    }
  }
  return first!.value!.context; // every op has a required input
}

const shapeOf = (value: Tensor | ExpertWeights): readonly number[] =>
  value instanceof Tensor ? value.shape : [value.slots, value.hidden, value.intermediate];

function bind(
  op: CompiledOp,
  input: CallInput,
  bound: Map<string, number>,
  boundBy: Map<string, CallInput>,
): void {
  const { value, signature } = input;
  if (value === undefined || signature.kind === 'count') return;
  const shape = shapeOf(value);
  if (shape.length !== signature.dims.length) throw shapeError(op.name, input, bound, boundBy);
  signature.dims.forEach((dim, axis) => {
    const solved = solveDim(dim, shape[axis]);
    if (solved === undefined || solved.name in op.options || bound.has(solved.name)) return;
    bound.set(solved.name, solved.value);
    boundBy.set(solved.name, input);
  });
}

function checkDtypes(op: string, inputs: readonly CallInput[]): void {
  for (const input of inputs) {
    const { value, signature, name } = input;
    if (!(value instanceof Tensor)) continue;
    let allowed: readonly DType[] = signature.kind === 'count' ? ['i32'] : signature.dtypes;
    let because = '';
    if (signature.dtypeOf !== undefined) {
      const source = inputs.find((other) => other.name === signature.dtypeOf)?.value;
      if (!(source instanceof Tensor)) continue; // a rule of the op says what an input without its source means
      allowed = [source.dtype];
      because = ` (the dtype of ${signature.dtypeOf}: ${describeTensor(source)})`;
    }
    if (!allowed.includes(value.dtype)) {
      const shape = signature.dims.map(formatDim).join(', ');
      const expected = signature.kind === 'count' ? A_COUNT : `${allowed.join('|')}[${shape}]${because}`;
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${name}: ${expected} but received ${describeTensor(value)}`,
        { op, arg: name },
      );
    }
  }
}

function checkShape(
  op: string,
  input: CallInput,
  bound: Map<string, number>,
  boundBy: ReadonlyMap<string, CallInput>,
): void {
  const { value, signature, name, count } = input;
  if (signature.kind === 'count') {
    const [limit] = signature.dims;
    const most = evaluateDim(limit, bound) ?? 0;
    if (count !== undefined && !(Number.isInteger(count) && count >= 0 && count <= most)) {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${name}: an integer from 0 to ${most} (${formatDim(limit)}) but received ${describeValue(count)}`,
        { op, arg: name },
      );
    }
    if (value !== undefined && elementsOf(shapeOf(value)) !== 1) {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${name}: ${A_COUNT} but received ${describeTensor(value as Tensor)}`,
        { op, arg: name },
      );
    }
    return;
  }
  if (value === undefined) return;
  const shape = shapeOf(value);
  signature.dims.forEach((dim, axis) => {
    const expected = evaluateDim(dim, bound);
    if (expected !== shape[axis]) throw shapeError(op, input, bound, boundBy);
  });
}

/** `expected bias: f32[256] (experts = 256 from logits: bf16[8, 256]) but received f16[255]` */
function shapeError(
  op: string,
  { name, signature, value }: CallInput,
  bound: ReadonlyMap<string, number>,
  boundBy: ReadonlyMap<string, CallInput>,
): MoeError {
  const dims = signature.dims.map((dim) => evaluateDim(dim, bound) ?? formatDim(dim));
  const names = new Set(signature.dims.flatMap((dim) => dim.map((term) => term.name)));
  const reasons: string[] = [];
  for (const dim of names) {
    if (dim === undefined || !bound.has(dim)) continue;
    const source = boundBy.get(dim);
    if (source?.name === name) continue;
    const from = source === undefined ? 'options' : `${source.name}: ${source.value}`;
    reasons.push(`${dim} = ${bound.get(dim)} from ${from}`);
  }
  const dtypes = value instanceof Tensor && signature.dtypes.length > 0 ? signature.dtypes.join('|') : '';
  const expected = signature.kind === 'experts' ? 'experts' : dtypes || (value as Tensor).dtype;
  const because = reasons.length > 0 ? ` (${reasons.join(', ')})` : '';
  return new MoeError(
    'ERR_MOE_INVALID_ARG',
    `expected ${name}: ${expected}[${dims.join(', ')}]${because} but received ${value}`,
    { op, arg: name },
  );
}
