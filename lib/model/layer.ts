// MoeLayer: one MoE layer of a checkpoint, assembled from the ops. Loading moves one expert at a time through one
// host buffer, so a layer is never held twice; whatever goes wrong, everything loaded until then is given back.
import { Context } from '../context.js';
import { MoeError } from '../errors.js';
import type { ExpertWeights, SwiGLU } from '../experts.js';
import { fusedMoe } from '../ops/fused_moe.js';
import { moeFusedGate } from '../ops/moe_fused_gate.js';
import { moeRouter } from '../ops/moe_router.js';
import { allocateExperts, packExperts } from '../ops/pack_experts.js';
import { sharedExperts } from '../ops/shared_experts.js';
import { choice, describeValue } from '../options.js';
import { decode, dtypeRow, type FloatDType, type Raw, type Tensor, type TensorData } from '../tensor.js';
import type { GateRules } from './architectures.js';
import { Checkpoint } from './checkpoint.js';
import { intermediateOf, type LayerPlan, type Matrix, type MlpSource } from './layer_plan.js';
import type { SafetensorsReader, TensorInfo } from './safetensors.js';

const loadOp = 'MoeLayer.load';
/** Shared slices that the gate can append to a row. */
const MAX_SHARED_SLOTS = 8;
/** Rows that an overlapped layer is tried with when it is loaded. */
const VALIDATION_TOKENS = 10;
/** Relative norm by which two orders of the same arithmetic may differ. */
const OVERLAP_TOLERANCE: Record<FloatDType, number> = { f32: 1e-5, f16: 2e-3, bf16: 1.6e-2 };
/** Bytes on their way to the backend before loading waits for them to be packed. */
const MAX_BYTES_IN_FLIGHT = 128 * 2 ** 20;

export type FuseSharedExperts = 'auto' | 'on' | 'off';

export interface LoadProgress {
  readonly done: number;
  readonly total: number;
  readonly unit: 'experts';
}

export interface MoeLayerOptions {
  /** Number of the decoder layer. */
  layer: number;
  context: Context;
  /**
   * Shared experts as expert slots after the routed ones: 'auto' (default) wherever that is exact, 'on' or fail with
   * the reason, 'off' never.
   */
  fuseSharedExperts?: FuseSharedExperts;
  /**
   * Shared experts by themselves, their first product beside the routing and the routed experts (on CUDA on a second
   * stream) instead of after them. They are then not fused. Loading compares the result on random states with the
   * computation in one piece and fails where they differ by more than the dtype explains. Default false.
   */
  overlapSharedExperts?: boolean;
  /** Dtype to hold the experts in. Default: the checkpoint's. The router keeps its own. */
  dtype?: FloatDType;
  /** Cancels the load with ERR_MOE_ABORTED; everything loaded until then is given back. */
  signal?: AbortSignal;
  onProgress?: (progress: LoadProgress) => void;
}

/** What a layer is: plain, frozen and independent of any input. */
export interface MoeLayerDescription extends GateRules {
  readonly architecture: string;
  readonly layer: number;
  /** The name of the block: `model.layers.1.mlp`. */
  readonly block: string;
  readonly hidden: number;
  /** Width of one routed expert. */
  readonly intermediate: number;
  /** Routed experts, zero experts not counted. */
  readonly experts: number;
  readonly zeroExperts: number;
  /** Shared experts as the model counts them. */
  readonly sharedExperts: number;
  /** Width of the shared experts together; 0 without. */
  readonly sharedIntermediate: number;
  readonly sharedGate: boolean;
  /** Whether the shared experts are expert slots. */
  readonly fused: boolean;
  /** Slots that the shared experts take after the routed ones; 0 when not fused. */
  readonly sharedSlots: number;
  /** Whether the shared experts run beside the routed ones. */
  readonly overlapped: boolean;
  /** Why the shared experts are not fused. */
  readonly unfusedReason?: string;
  readonly correctionBias: boolean;
  readonly routerBias: boolean;
  readonly biases: boolean;
  readonly weightsOnInput: boolean;
  readonly swiglu: SwiGLU;
  /** Dtype of the experts as held. */
  readonly dtype: FloatDType;
  readonly routerDtype: FloatDType;
  /** What recordings made by transformers hold of this block. */
  readonly recordedPart: 'all' | 'routed';
}

/** The stages of a forward, in order; 'shared' only where shared experts are not fused. */
export type MoeLayerStage = 'router' | 'gate' | 'experts' | 'shared';

export interface ForwardOptions {
  /** Return the routing beside the output. */
  returnRouting?: boolean;
  /** 'routed': without the shared experts. Default 'all'. */
  part?: 'all' | 'routed';
  /** What the router sees instead of `hidden`: the same states in f32, when `hidden` is narrower. */
  routerInput?: Tensor<FloatDType>;
  /** Rows at and beyond it are padding: not routed, and without meaning in the output. */
  validTokens?: number | Tensor<'i32'>;
  /**
   * Called after each stage has been enqueued; a caller that waits inside it measures the stage. Overlapped shared
   * experts then run after the others, because nothing can be awaited in an overlap.
   */
  onStage?: (stage: MoeLayerStage) => void;
}

/** The caller owns all four tensors. */
export interface RoutedOutput {
  /** [tokens, hidden] in the dtype of the input. */
  readonly output: Tensor<FloatDType>;
  /** i32 [tokens, topK + sharedSlots]. */
  readonly ids: Tensor<'i32'>;
  /** f32 [tokens, topK + sharedSlots]. */
  readonly weights: Tensor<'f32'>;
  /** f32 [tokens, experts + zeroExperts]. */
  readonly logits: Tensor<'f32'>;
}

interface Weights {
  readonly router: Tensor<FloatDType>;
  readonly routerBias?: Tensor<'f32'>;
  readonly correctionBias?: Tensor<'f32'>;
  readonly experts: ExpertWeights;
  readonly shared?: ExpertWeights;
  readonly sharedGate?: Tensor<FloatDType>;
}

export class MoeLayer {
  readonly context: Context;
  readonly description: MoeLayerDescription;
  /** Bytes held on the device. */
  readonly memory: number;
  readonly #weights: Weights;
  #disposed = false;

  private constructor(context: Context, description: MoeLayerDescription, weights: Weights) {
    this.context = context;
    this.description = description;
    this.#weights = weights;
    this.memory = held(weights).reduce((sum, thing) => sum + bytesOf(thing), 0);
  }

  /**
   * Loads one MoE layer from a checkpoint folder (or an open checkpoint, which stays open).
   * @throws MoeError ERR_MOE_CHECKPOINT for a checkpoint that cannot be read or understood; ERR_MOE_UNSUPPORTED for
   * quantised weights and for 'on' where fusing is not exact; ERR_MOE_ABORTED; ERR_MOE_OOM.
   */
  static async load(source: string | Checkpoint, options: MoeLayerOptions): Promise<MoeLayer> {
    const resolved = checkLoadOptions(options);
    throwIfAborted(resolved.signal);
    const checkpoint = source instanceof Checkpoint ? source : await Checkpoint.open(source);
    try {
      const plan = await checkpoint.plan(resolved.layer);
      const description = describe(plan, resolved);
      const weights = await new Loader(checkpoint.tensors, resolved).load(plan, description);
      const layer = new MoeLayer(resolved.context, description, weights);
      try {
        if (description.overlapped) await layer.#validateOverlap();
        throwIfAborted(resolved.signal);
      } catch (error) {
        layer.dispose();
        throw error;
      }
      return layer;
    } finally {
      if (checkpoint !== source) await checkpoint.close();
    }
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  /**
   * Runs the layer on `hidden` [tokens, hidden]: enqueues the ops and returns at once, so it can be captured. The
   * output has the dtype of `hidden`.
   */
  forward(
    hidden: Tensor<FloatDType>,
    options?: ForwardOptions & { returnRouting?: false },
  ): Tensor<FloatDType>;
  forward(hidden: Tensor<FloatDType>, options: ForwardOptions & { returnRouting: true }): RoutedOutput;
  forward(hidden: Tensor<FloatDType>, options?: ForwardOptions): Tensor<FloatDType> | RoutedOutput;
  forward(hidden: Tensor<FloatDType>, options: ForwardOptions = {}): Tensor<FloatDType> | RoutedOutput {
    const op = 'MoeLayer.forward';
    if (this.#disposed)
      throw new MoeError('ERR_MOE_DISPOSED', 'expected a live layer but it was disposed', { op });
    checkKnown(op, options, forwardOptions);
    const { returnRouting = false, part = 'all', onStage } = options;
    if (part !== 'all' && part !== 'routed') {
      throw invalid(op, 'part', "one of 'all', 'routed'", part);
    }
    const { shared, sharedGate: expertGate } = this.#weights;
    const temporary: Tensor[] = [];
    const own = <T extends Tensor>(tensor: T): T => {
      temporary.push(tensor);
      return tensor;
    };
    try {
      let result: RoutedOutput;
      if (shared === undefined || part === 'routed') {
        result = this.#routed(hidden, options, own);
      } else if (this.description.overlapped && onStage === undefined) {
        const [projected, routed] = this.context.overlap(
          () => own(sharedExperts({ hidden, experts: shared }, { part: 'gateUp' })),
          () => this.#routed(hidden, options, own),
        );
        const inputs = { hidden, experts: shared, projected, routed: routed.output, expertGate };
        result = { ...routed, output: own(sharedExperts(inputs, { part: 'down' })) };
      } else {
        const routed = this.#routed(hidden, options, own);
        const inputs = { hidden, experts: shared, routed: routed.output, expertGate };
        result = { ...routed, output: own(sharedExperts(inputs)) };
        onStage?.('shared');
      }
      const { output, ids, weights, logits } = result;
      const kept: Tensor[] = returnRouting ? [output, ids, weights, logits] : [output];
      temporary.splice(0, temporary.length, ...temporary.filter((tensor) => !kept.includes(tensor)));
      return returnRouting ? result : output;
    } finally {
      for (const tensor of temporary) tensor.dispose();
    }
  }

  /** Everything but unfused shared experts. */
  #routed(
    hidden: Tensor<FloatDType>,
    { part = 'all', routerInput = hidden, validTokens, onStage }: ForwardOptions,
    own: <T extends Tensor>(tensor: T) => T,
  ): RoutedOutput {
    const { router, routerBias, correctionBias, experts } = this.#weights;
    const d = this.description;
    const sharedSlots = part === 'all' ? d.sharedSlots : 0;
    const logits = own(moeRouter({ hidden: routerInput, weight: router, bias: routerBias }));
    onStage?.('router');
    const { ids, weights } = moeFusedGate(
      { logits, bias: correctionBias, validTokens },
      {
        topK: d.topK,
        scoring: d.scoring,
        selection: d.selection,
        groups: d.groups,
        topGroups: d.topGroups,
        groupScore: d.groupScore,
        renormalize: d.renormalize,
        routedScalingFactor: d.routedScalingFactor,
        scalePlacement: 'inWeights',
        sharedExperts: sharedSlots,
        zeroExperts: d.zeroExperts,
      },
    );
    own(ids);
    own(weights);
    onStage?.('gate');
    const output = own(
      fusedMoe(
        { hidden, ids, weights, experts },
        {
          zeroExperts: d.zeroExperts,
          firstZeroExpert: d.experts + sharedSlots,
          weightsOnInput: d.weightsOnInput,
        },
      ),
    );
    onStage?.('experts');
    return { output, ids, weights, logits };
  }

  /**
   * Compares overlapped shared experts with the computation in one piece, on a few random states.
   * @throws MoeError ERR_MOE_BACKEND where they differ by more than rounding.
   */
  async #validateOverlap(): Promise<void> {
    const { shared, sharedGate: expertGate } = this.#weights;
    if (shared === undefined) return;
    const { hidden: width, dtype } = this.description;
    const states = randomStates(VALIDATION_TOKENS * width);
    using hidden = this.context.tensor(dtype, [VALIDATION_TOKENS, width], states);
    using routed = this.forward(hidden, { part: 'routed' });
    using whole = sharedExperts({ hidden, experts: shared, routed, expertGate });
    using overlapped = this.forward(hidden);
    const [expected, received] = await Promise.all([whole.read(), overlapped.read()]);
    const difference = relativeDifference(expected as Float32Array, received as Float32Array);
    const limit = OVERLAP_TOLERANCE[dtype];
    if (difference <= limit) return;
    throw new MoeError(
      'ERR_MOE_BACKEND',
      `the shared experts of ${this.description.block} beside the routed ones differ from the same in one piece by ` +
        `${difference.toExponential(1)} of their norm, more than ${limit} that ${dtype} explains; ` +
        'load without overlapSharedExperts',
      { op: loadOp, arg: 'overlapSharedExperts' },
    );
  }

  /** Gives the weights back once the work in flight is done. Disposing twice is harmless. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    for (const thing of held(this.#weights)) thing.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  /** `deepseek_v3 model.layers.1.mlp: 256 experts of 7168 x 2048, top 8, 1 shared (fused)` */
  toString(): string {
    const {
      architecture,
      block,
      experts,
      hidden,
      intermediate,
      topK,
      sharedExperts: shared,
      fused,
    } = this.description;
    const beside = shared === 0 ? '' : `, ${shared} shared${fused ? ' (fused)' : ''}`;
    return `${architecture} ${block}: ${experts} experts of ${hidden} x ${intermediate}, top ${topK}${beside}`;
  }
}

const held = (weights: Weights): (Tensor | ExpertWeights)[] =>
  Object.values(weights).filter((thing) => thing !== undefined);

const bytesOf = (thing: Tensor | ExpertWeights): number =>
  'bytes' in thing ? thing.bytes : thing.size * dtypeRow(thing.dtype).bytes;

/** Why the shared experts of a layer cannot be slots beside its routed ones; undefined where they can. */
export function fusionObstacle({ shared, intermediate, dtype, routed }: LayerPlan): string | undefined {
  if (shared === undefined) return 'the layer has no shared expert';
  if (shared.gate !== undefined) return `the shared expert has a gate of its own ('${shared.gate.name}')`;
  if (shared.dtype !== dtype)
    return `the shared expert is ${shared.dtype} but the routed experts are ${dtype}`;
  if (shared.intermediate % intermediate !== 0) {
    return `the shared width ${shared.intermediate} is not a multiple of the routed experts' ${intermediate}`;
  }
  const slices = shared.intermediate / intermediate;
  if (slices > MAX_SHARED_SLOTS) {
    return `the shared width ${shared.intermediate} is ${slices} times the routed experts' ${intermediate}; at most ${MAX_SHARED_SLOTS} fit`;
  }
  const biased = routed[0].b2 !== undefined;
  if ((shared.mlp.b2 !== undefined) !== biased) {
    return biased ? 'only the routed experts have biases' : 'only the shared expert has biases';
  }
  return undefined;
}

/** Values in [-1, 1), the same every time: a linear congruential generator. */
function randomStates(count: number): Float32Array {
  let state = 1;
  return Float32Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  });
}

/** ||b - a|| / ||a|| of what is a number in either; weights may hold NaN, which both results then have. */
function relativeDifference(a: Float32Array, b: Float32Array): number {
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < a.length; i++) {
    if (Object.is(a[i], b[i]) || (Number.isNaN(a[i]) && Number.isNaN(b[i]))) {
      norm += Number.isFinite(a[i]) ? a[i] ** 2 : 0;
      continue;
    }
    difference += (b[i] - a[i]) ** 2;
    norm += a[i] ** 2;
  }
  return difference === 0 ? 0 : Math.sqrt(difference / norm);
}

type ResolvedOptions = MoeLayerOptions &
  Required<Pick<MoeLayerOptions, 'fuseSharedExperts' | 'overlapSharedExperts'>>;

const loadOptions = [
  'layer',
  'context',
  'fuseSharedExperts',
  'overlapSharedExperts',
  'dtype',
  'signal',
  'onProgress',
];
const forwardOptions = ['returnRouting', 'part', 'routerInput', 'validTokens', 'onStage'];

const invalid = (op: string, arg: string, expected: string, received: unknown): MoeError =>
  new MoeError(
    'ERR_MOE_INVALID_ARG',
    `expected ${arg}: ${expected} but received ${describeValue(received)}`,
    { op, arg },
  );

function checkKnown(op: string, options: unknown, known: readonly string[]): void {
  if (typeof options !== 'object' || options === null) throw invalid(op, 'options', 'an object', options);
  for (const name of Object.keys(options)) {
    if (!known.includes(name)) {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `unknown option '${name}'; the options are: ${known.join(', ')}`,
        {
          op,
          arg: name,
        },
      );
    }
  }
}

function checkLoadOptions(options: MoeLayerOptions): ResolvedOptions {
  checkKnown(loadOp, options, loadOptions);
  const { layer, context, fuseSharedExperts = 'auto', overlapSharedExperts = false } = options;
  const { dtype, signal, onProgress } = options;
  if (!Number.isSafeInteger(layer) || layer < 0) throw invalid(loadOp, 'layer', 'an integer >= 0', layer);
  if (!(context instanceof Context))
    throw invalid(loadOp, 'context', 'a context from createContext', context);
  const fuse = choice(['auto', 'on', 'off'], 'auto');
  if (!fuse.accepts(fuseSharedExperts))
    throw invalid(loadOp, 'fuseSharedExperts', fuse.expected, fuseSharedExperts);
  if (typeof overlapSharedExperts !== 'boolean') {
    throw invalid(loadOp, 'overlapSharedExperts', 'a boolean', overlapSharedExperts);
  }
  if (overlapSharedExperts && fuseSharedExperts === 'on') {
    throw invalid(loadOp, 'overlapSharedExperts', "false where fuseSharedExperts is 'on'", true);
  }
  const float = choice(['f32', 'bf16', 'f16'], 'f32');
  if (dtype !== undefined && !float.accepts(dtype)) throw invalid(loadOp, 'dtype', float.expected, dtype);
  if (signal !== undefined && !(signal instanceof AbortSignal))
    throw invalid(loadOp, 'signal', 'an AbortSignal', signal);
  if (onProgress !== undefined && typeof onProgress !== 'function') {
    throw invalid(loadOp, 'onProgress', 'a function', onProgress);
  }
  context.assertUsable(loadOp);
  return { ...options, fuseSharedExperts, overlapSharedExperts };
}

function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) {
    throw new MoeError('ERR_MOE_ABORTED', 'loading was cancelled', { op: loadOp, cause: signal.reason });
  }
}

function describe(
  plan: LayerPlan,
  { fuseSharedExperts, overlapSharedExperts, dtype }: ResolvedOptions,
): MoeLayerDescription {
  const { architecture, row, shared, routed } = plan;
  const obstacle = fusionObstacle(plan);
  if (fuseSharedExperts === 'on' && obstacle !== undefined) {
    throw new MoeError(
      'ERR_MOE_UNSUPPORTED',
      `the shared experts of ${plan.block} cannot be fused: ${obstacle}; use fuseSharedExperts 'auto' or 'off'`,
      { op: loadOp, arg: 'fuseSharedExperts' },
    );
  }
  const fused = obstacle === undefined && fuseSharedExperts !== 'off' && !overlapSharedExperts;
  const wanted = overlapSharedExperts ? 'overlapSharedExperts is true' : "fuseSharedExperts is 'off'";
  return Object.freeze({
    architecture,
    layer: plan.layer,
    block: plan.block,
    hidden: plan.hidden,
    intermediate: plan.intermediate,
    experts: plan.experts,
    zeroExperts: plan.zeroExperts,
    ...plan.gate,
    sharedExperts: shared?.count ?? 0,
    sharedIntermediate: shared?.intermediate ?? 0,
    sharedGate: shared?.gate !== undefined,
    fused,
    sharedSlots: fused ? shared!.intermediate / plan.intermediate : 0,
    overlapped: overlapSharedExperts && shared !== undefined,
    ...(fused ? {} : { unfusedReason: obstacle ?? wanted }),
    correctionBias: plan.correctionBias !== undefined,
    routerBias: plan.routerBias !== undefined,
    biases: routed[0].b2 !== undefined,
    weightsOnInput: row.weightsOnInput ?? false,
    swiglu: Object.freeze({ ...plan.swiglu }),
    dtype: dtype ?? plan.dtype,
    routerDtype: plan.router.dtype as FloatDType,
    recordedPart: row.recordedPart ?? 'all',
  });
}

/** Moves the weights of one plan to a context. */
class Loader {
  readonly #reader: SafetensorsReader;
  readonly #options: ResolvedOptions;
  /** Host memory that every expert passes through. */
  #staging = { w13: new Uint8Array(0), w2: new Uint8Array(0), b13: new Uint8Array(0), b2: new Uint8Array(0) };
  #inFlight = 0;
  #done = 0;
  #total = 0;

  constructor(reader: SafetensorsReader, options: ResolvedOptions) {
    this.#reader = reader;
    this.#options = options;
  }

  async load(plan: LayerPlan, { fused, sharedSlots, dtype }: MoeLayerDescription): Promise<Weights> {
    const { context } = this.#options;
    const weights: { -readonly [K in keyof Weights]?: Weights[K] } = {};
    const layout = { hidden: plan.hidden, dtype, swiglu: plan.swiglu };
    const { shared, routed } = plan;
    const unfused = fused ? undefined : shared;
    this.#total = routed.length + sharedSlots + (unfused === undefined ? 0 : 1);
    try {
      weights.router = await this.#tensor(plan.router, plan.router.shape);
      if (plan.routerBias !== undefined) weights.routerBias = await this.#f32Vector(plan.routerBias);
      if (plan.correctionBias !== undefined)
        weights.correctionBias = await this.#f32Vector(plan.correctionBias);
      if (unfused?.gate !== undefined) weights.sharedGate = await this.#tensor(unfused.gate, [plan.hidden]);
      weights.experts = allocateExperts(context, {
        ...layout,
        slots: routed.length + sharedSlots,
        intermediate: plan.intermediate,
        biases: routed[0].b2 !== undefined,
      });
      for (const [slot, source] of routed.entries()) await this.#pack(source, weights.experts, slot);
      if (fused) await this.#packSlices(shared!.mlp, sharedSlots, weights.experts, routed.length);
      if (unfused !== undefined) {
        weights.shared = allocateExperts(context, {
          ...layout,
          slots: 1,
          intermediate: unfused.intermediate,
          biases: unfused.mlp.b2 !== undefined,
        });
        await this.#pack(unfused.mlp, weights.shared, 0);
      }
      await context.synchronize();
      throwIfAborted(this.#options.signal);
      return weights as Weights;
    } catch (error) {
      for (const thing of held(weights as Weights)) thing.dispose();
      throw error;
    }
  }

  async #tensor(info: TensorInfo, shape: readonly number[]): Promise<Tensor<FloatDType>> {
    const dtype = info.dtype as FloatDType;
    return this.#options.context.tensor(dtype, shape, view(dtype, await this.#reader.read(info.name)));
  }

  /** Biases of router and gate are f32 whatever the checkpoint holds. */
  async #f32Vector(info: TensorInfo): Promise<Tensor<'f32'>> {
    const dtype = info.dtype as FloatDType;
    const values = decode(dtype, view(dtype, await this.#reader.read(info.name)) as Raw<FloatDType>);
    return this.#options.context.tensor('f32', [values.length], values);
  }

  async #pack(source: MlpSource, into: ExpertWeights, slot: number, w2?: Uint8Array): Promise<void> {
    throwIfAborted(this.#options.signal);
    const { w13, b13, b2, transposed, order } = source;
    const stage = this.#staging;
    const parts: Partial<Record<keyof typeof stage, { bytes: Uint8Array; matrices: readonly Matrix[] }>> = {};
    for (const [name, matrices] of Object.entries({ w13, w2: [source.w2], b13, b2: b2 && [b2] })) {
      if (matrices === undefined) continue;
      const part = name as keyof typeof stage;
      const bytes = part === 'w2' && w2 !== undefined ? w2 : await this.#read(part, matrices);
      parts[part] = { bytes, matrices };
    }
    const temporary: Tensor[] = [];
    const tensor = (
      { bytes, matrices }: { bytes: Uint8Array; matrices: readonly Matrix[] },
      vector = false,
    ) => {
      const dtype = matrices[0].info.dtype as FloatDType;
      const columns = matrices[0].columns;
      const elements = bytes.byteLength / dtypeRow(dtype).bytes;
      const shape = vector ? [1, elements] : [1, elements / columns, columns];
      const made = this.#options.context.tensor(dtype, shape, view(dtype, bytes));
      temporary.push(made);
      this.#inFlight += bytes.byteLength;
      return made;
    };
    try {
      packExperts(
        {
          w13: tensor(parts.w13!),
          w2: tensor(parts.w2!),
          ...(parts.b13 && { b13: tensor(parts.b13, true) }),
          ...(parts.b2 && { b2: tensor(parts.b2, true) }),
        },
        { into, firstSlot: slot, gateUp: order, transposed },
      );
    } finally {
      for (const made of temporary) made.dispose();
    }
    if (this.#inFlight > MAX_BYTES_IN_FLIGHT) {
      await this.#options.context.synchronize();
      this.#inFlight = 0;
    }
    this.#done++;
    this.#options.onProgress?.({ done: this.#done, total: this.#total, unit: 'experts' });
  }

  /**
   * Packs a wide dense MLP as `count` expert slots: gate and up split along the out axis, down along the in axis, so
   * that the slices add up to the whole. The down bias is added once, by the first slice.
   */
  async #packSlices(mlp: MlpSource, count: number, into: ExpertWeights, firstSlot: number): Promise<void> {
    const width = intermediateOf(mlp) / count;
    const halves = mlp.w13.length === 1 ? splitRows(mlp.w13[0], 2) : mlp.w13;
    const biasHalves = mlp.b13?.length === 1 ? splitColumns(mlp.b13[0], 2) : mlp.b13;
    const { b2, ...unbiased } = mlp;
    const down = await this.#reader.read(mlp.w2.info.name);
    const elementBytes = dtypeRow(mlp.w2.info.dtype).bytes;
    const rowBytes = width * elementBytes;
    for (let j = 0; j < count; j++) {
      const slice: MlpSource = {
        ...unbiased,
        w13: halves.map((half) => splitRows(half, count)[j]),
        w2: { ...mlp.w2, columns: width },
        ...(biasHalves && { b13: biasHalves.map((half) => splitColumns(half, count)[j]) }),
        ...(b2 && j === 0 && { b2 }),
      };
      let w2 = down;
      if (count > 1) {
        w2 = new Uint8Array(mlp.w2.rows * rowBytes);
        for (let row = 0; row < mlp.w2.rows; row++) {
          const begin = (row * count + j) * rowBytes;
          w2.set(down.subarray(begin, begin + rowBytes), row * rowBytes);
        }
      }
      await this.#pack(slice, into, firstSlot + j, w2);
    }
  }

  /** Reads matrices one after the other into the staging memory of `part`. */
  async #read(part: 'w13' | 'w2' | 'b13' | 'b2', matrices: readonly Matrix[]): Promise<Uint8Array> {
    const ranges = matrices.map(({ info, firstRow, rows, columns }) => {
      const width = columns * dtypeRow(info.dtype).bytes;
      return { name: info.name, offset: firstRow * width, length: rows * width };
    });
    const total = ranges.reduce((sum, { length }) => sum + length, 0);
    if (this.#staging[part].byteLength < total) this.#staging[part] = new Uint8Array(total);
    const bytes = this.#staging[part].subarray(0, total);
    let done = 0;
    for (const { name, offset, length } of ranges) {
      await this.#reader.read(name, { into: bytes.subarray(done, done + length), offset, length });
      done += length;
    }
    return bytes;
  }
}

/** Equal parts of a matrix along its rows. */
function splitRows(matrix: Matrix, parts: number): Matrix[] {
  const rows = matrix.rows / parts;
  return Array.from({ length: parts }, (_, j) => ({ ...matrix, firstRow: matrix.firstRow + j * rows, rows }));
}

/** Equal parts of a vector, each as a row of its own. */
function splitColumns(vector: Matrix, parts: number): Matrix[] {
  const columns = vector.columns / parts;
  return Array.from({ length: parts }, (_, j) => ({
    ...vector,
    firstRow: vector.firstRow * parts + j,
    columns,
  }));
}

/** Bytes as the array that holds the bits of a dtype. */
function view<D extends FloatDType>(dtype: D, bytes: Uint8Array): TensorData<D> {
  const { raw, bytes: width } = dtypeRow(dtype);
  return new raw(bytes.buffer, bytes.byteOffset, bytes.byteLength / width) as unknown as TensorData<D>;
}
