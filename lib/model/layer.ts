// MoeLayer: one MoE layer of a checkpoint, assembled from the ops. layer_loader.ts moves its weights.
import { checkSignal, throwIfAborted } from '../abort.js';
import { Context } from '../context.js';
import { MoeError } from '../errors.js';
import type { ExpertWeights, SwiGLU } from '../experts.js';
import { fusedMoe } from '../ops/fused_moe.js';
import { moeFusedGate } from '../ops/moe_fused_gate.js';
import { moeRouter } from '../ops/moe_router.js';
import { sharedExperts } from '../ops/shared_experts.js';
import { choice } from '../options.js';
import { describeArgument } from '../owned_memory.js';
import { dtypeRow, type FloatDType, Tensor } from '../tensor.js';
import type { GateRules } from './architectures.js';
import { Checkpoint } from './checkpoint.js';
import { held, LayerLoader, type LoadProgress, loadOp, type Weights } from './layer_loader.js';
import type { LayerPlan } from './layer_plan.js';

/** Shared slices that the gate can append to a row. */
const MAX_SHARED_SLOTS = 8;
/** Rows that an overlapped layer is tried with when it is loaded. */
const VALIDATION_TOKENS = 10;
/** Relative norm by which two orders of the same arithmetic may differ. */
const OVERLAP_TOLERANCE: Record<FloatDType, number> = { f32: 1e-5, f16: 2e-3, bf16: 1.6e-2 };

export type FuseSharedExperts = 'auto' | 'on' | 'off';

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
    throwIfAborted(loadOp, resolved.signal, 'loading');
    const checkpoint = source instanceof Checkpoint ? source : await Checkpoint.open(source);
    try {
      const plan = await checkpoint.plan(resolved.layer);
      const description = describe(plan, resolved);
      const weights = await new LayerLoader(checkpoint.tensors, resolved).load(plan, description);
      const layer = new MoeLayer(resolved.context, description, weights);
      try {
        if (description.overlapped) await layer.#validateOverlap();
        throwIfAborted(loadOp, resolved.signal, 'loading');
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
   * @throws MoeError ERR_MOE_INVALID_ARG, ERR_MOE_DISPOSED, ERR_MOE_WRONG_CONTEXT, ERR_MOE_OOM.
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
    const { hidden: width } = this.description;
    if (!(hidden instanceof Tensor) || hidden.shape.length !== 2 || hidden.shape[1] !== width) {
      throw invalid(op, 'hidden', `a tensor f32|bf16|f16[tokens, ${width}]`, hidden);
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
    using whole = sharedExperts({ hidden, experts: shared, expertGate });
    const [projected] = this.context.overlap(
      () => sharedExperts({ hidden, experts: shared }, { part: 'gateUp' }),
      () => this.forward(hidden, { part: 'routed' }).dispose(),
    );
    using overlapped = sharedExperts({ hidden, experts: shared, projected, expertGate }, { part: 'down' });
    projected.dispose();
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

const bytesOf = (thing: Tensor | ExpertWeights): number =>
  'bytes' in thing ? thing.bytes : thing.size * dtypeRow(thing.dtype).bytes;

/** Why the shared experts of a layer cannot be slots beside its routed ones; undefined where they can. */
function fusionObstacle({ shared, intermediate, dtype, routed }: LayerPlan): string | undefined {
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
  const relative = difference === 0 ? 0 : Math.sqrt(difference / norm);
  return Number.isNaN(relative) ? Number.POSITIVE_INFINITY : relative;
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
    `expected ${arg}: ${expected} but received ${describeArgument(received)}`,
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
  checkSignal(loadOp, signal);
  if (onProgress !== undefined && typeof onProgress !== 'function') {
    throw invalid(loadOp, 'onProgress', 'a function', onProgress);
  }
  context.assertUsable(loadOp);
  return { layer, context, fuseSharedExperts, overlapSharedExperts, dtype, signal, onProgress };
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
