// Layer shapes that benches use, and the tensors of a case.
import {
  type Context,
  dtypes,
  type ExpertWeights,
  type FloatDType,
  moeDispatch,
  packExperts,
  type Tensor,
} from '../lib/index.js';
import { Random } from '../test/cases/random.js';

/** A layer as one device of a laptop or a rank of a cluster would hold it. */
export interface LayerShape {
  readonly name: string;
  readonly hidden: number;
  readonly intermediate: number;
  readonly experts: number;
  readonly topK: number;
}

/** Small enough for a laptop, with the proportions of the real layers. */
export const qwenSmall: LayerShape = {
  name: 'Qwen3-30B/4',
  hidden: 512,
  intermediate: 192,
  experts: 32,
  topK: 8,
};
export const mixtralSmall: LayerShape = {
  name: 'Mixtral/8',
  hidden: 512,
  intermediate: 1792,
  experts: 8,
  topK: 2,
};

export const dtypeBytes = (dtype: FloatDType): number => dtypes[dtype].bytes;

const product = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** Normal values; a period of 64 Ki keeps the making of large cases short. */
export function normal<D extends FloatDType>(
  context: Context,
  dtype: D,
  shape: readonly number[],
  seed: number,
  scale = 1,
): Tensor<D> {
  const period = new Random(seed).normals(Math.min(product(shape), 1 << 16), scale);
  const data = new Float32Array(product(shape));
  for (let at = 0; at < data.length; at += period.length) {
    data.set(period.subarray(0, Math.min(period.length, data.length - at)), at);
  }
  return context.tensor(dtype, shape, data as never);
}

/** Distinct uniform choices and equal weights. */
export function routing(
  context: Context,
  tokens: number,
  { experts, topK }: LayerShape,
): { ids: Tensor<'i32'>; weights: Tensor<'f32'>; experts: number } {
  const random = new Random(tokens);
  const ids = Array.from({ length: tokens }, () => random.distinct(topK, experts)).flat();
  return {
    ids: context.tensor('i32', [tokens, topK], Int32Array.from(ids)),
    weights: context.tensor('f32', [tokens, topK], new Float32Array(tokens * topK).fill(1 / topK)),
    experts: new Set(ids).size,
  };
}

export function layerExperts(context: Context, shape: LayerShape, dtype: FloatDType): ExpertWeights {
  const { experts: slots, hidden, intermediate } = shape;
  using w13 = normal(context, dtype, [slots, 2 * intermediate, hidden], 1, hidden ** -0.5);
  using w2 = normal(context, dtype, [slots, hidden, intermediate], 2, intermediate ** -0.5);
  return packExperts({ w13, w2 });
}

/** Dispatched rows of a random routing. */
export function dispatched(context: Context, tokens: number, shape: LayerShape, dtype: FloatDType) {
  const { ids, weights, experts } = routing(context, tokens, shape);
  const hidden = normal(context, dtype, [tokens, shape.hidden], 3);
  const plan = moeDispatch({ ids, hidden }, { experts: shape.experts });
  return { ...plan, rows: plan.rows!, ids, weights, hidden, hitExperts: experts };
}

/** Bytes and operations of the expert MLPs: every hit expert's weights once, every row in and out. */
export function expertWork(shape: LayerShape, tokens: number, hitExperts: number, dtype: FloatDType) {
  const perExpert = 3 * shape.hidden * shape.intermediate;
  return {
    bytes: (hitExperts * perExpert + 2 * tokens * shape.hidden) * dtypeBytes(dtype),
    flops: 2 * perExpert * tokens * shape.topK,
  };
}
