// Loading the weights of one MoE layer: one expert at a time through one host buffer, so that a layer is never held
// twice; whatever goes wrong, everything loaded until then is given back.
import { throwIfAborted, unlessAborted } from '../abort.js';
import type { Context } from '../context.js';
import type { ExpertWeights } from '../experts.js';
import { allocateExperts, packExperts } from '../ops/pack_experts.js';
import { decode, dtypeRow, type FloatDType, type Raw, type Tensor, type TensorData } from '../tensor.js';
import { intermediateOf, type LayerPlan, type Matrix, type MlpSource } from './layer_plan.js';
import type { SafetensorsReader, TensorInfo } from './safetensors.js';

export const loadOp = 'MoeLayer.load';
/** Bytes on their way to the backend before loading waits for them to be packed. */
const MAX_BYTES_IN_FLIGHT = 128 * 2 ** 20;

export interface LoadProgress {
  readonly done: number;
  readonly total: number;
  readonly unit: 'experts';
}

export interface Weights {
  readonly router: Tensor<FloatDType>;
  readonly routerBias?: Tensor<'f32'>;
  readonly correctionBias?: Tensor<'f32'>;
  readonly experts: ExpertWeights;
  readonly shared?: ExpertWeights;
  readonly sharedGate?: Tensor<FloatDType>;
}

export const held = (weights: Weights): (Tensor | ExpertWeights)[] =>
  Object.values(weights).filter((thing) => thing !== undefined);

export interface LoaderOptions {
  readonly context: Context;
  readonly signal?: AbortSignal;
  readonly onProgress?: (progress: LoadProgress) => void;
}

/** What of a layer's description says how its weights are held. */
export interface HeldAs {
  readonly fused: boolean;
  readonly sharedSlots: number;
  readonly dtype: FloatDType;
}

/** Moves the weights of one plan to a context. */
export class LayerLoader {
  readonly #reader: SafetensorsReader;
  readonly #options: LoaderOptions;
  /** Host memory that every expert passes through. */
  #staging = { w13: new Uint8Array(0), w2: new Uint8Array(0), b13: new Uint8Array(0), b2: new Uint8Array(0) };
  #inFlight = 0;
  #done = 0;
  #total = 0;

  constructor(reader: SafetensorsReader, options: LoaderOptions) {
    this.#reader = reader;
    this.#options = options;
  }

  async load(plan: LayerPlan, { fused, sharedSlots, dtype }: HeldAs): Promise<Weights> {
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
      await this.#synchronize();
      throwIfAborted(loadOp, this.#options.signal, 'loading');
      return weights as Weights;
    } catch (error) {
      for (const thing of held(weights as Weights)) thing.dispose();
      throw error;
    }
  }

  #synchronize(): Promise<void> {
    const { context, signal } = this.#options;
    return unlessAborted(loadOp, context.synchronize(), signal, 'loading');
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
    throwIfAborted(loadOp, this.#options.signal, 'loading');
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
      await this.#synchronize();
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
