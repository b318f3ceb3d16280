// The tensors of device benches: normal values and uniform routings, made once and cut differently for every launch, so
// that a gigabyte of inputs costs an upload and nothing else. Everything made here is given back together.
import type { Context, FloatDType, Tensor } from '../../lib/index.js';
import { encode, type RawArray } from '../../lib/tensor.js';
import { Random } from '../../test/cases/random.js';

/** Prime: rows of any width differ from their neighbours. */
const PERIOD = 1_048_573;
const ROUTED_TOKENS = 8192;

const pools = new Map<string, RawArray>();
const routings = new Map<string, Int32Array>();

/** At least `length` normal values from any offset below the period, as the dtype's own bits. */
function pool(dtype: FloatDType, scale: number, length: number): RawArray {
  const key = `${dtype} ${scale}`;
  const known = pools.get(key);
  if (known !== undefined && known.length >= length + PERIOD) return known;
  const period = encode(dtype, new Random(7).normals(PERIOD, scale));
  const values = new (period.constructor as new (length: number) => typeof period)(length + PERIOD);
  values.set(period as never);
  for (let done = PERIOD; done < values.length; done *= 2) {
    values.copyWithin(done, 0, Math.min(done, values.length - done));
  }
  pools.set(key, values);
  return values;
}

/** Different uniform choices for every token of a few thousand. */
function routing(experts: number, topK: number): Int32Array {
  const key = `${experts} ${topK}`;
  let ids = routings.get(key);
  if (ids === undefined) {
    const random = new Random(experts + topK);
    const all = Array.from({ length: experts }, (_, e) => e);
    ids = new Int32Array(ROUTED_TOKENS * topK);
    for (let i = 0; i < ids.length; i++) {
      const c = i % topK; // a partial shuffle of what the token before left is as good as one of a sorted list
      const j = c + random.integer(experts - c);
      [all[c], all[j]] = [all[j], all[c]];
      ids[i] = all[c];
    }
    routings.set(key, ids);
  }
  return ids;
}

export interface RoutingShape {
  readonly tokens: number;
  readonly topK: number;
  /** Routed experts. */
  readonly experts: number;
  /** Shared experts, appended to every row. Default 0. */
  readonly shared?: number;
}

/** Ids [tokens, topK + shared], another cut of the same routing for every set. */
export function uniformIds({ tokens, topK, experts, shared = 0 }: RoutingShape, set: number): Int32Array {
  const base = routing(experts, topK);
  const columns = topK + shared;
  const ids = new Int32Array(tokens * columns);
  for (let t = 0; t < tokens; t++) {
    const row = ((t + 97 * set) % ROUTED_TOKENS) * topK;
    for (let c = 0; c < columns; c++) ids[t * columns + c] = c < topK ? base[row + c] : experts + c - topK;
  }
  return ids;
}

/** Makes the tensors of one case and gives them back. */
export class Inputs {
  readonly context: Context;
  readonly #held: { dispose(): void }[] = [];

  constructor(context: Context) {
    this.context = context;
  }

  keep<T extends { dispose(): void }>(held: T): T {
    this.#held.push(held);
    return held;
  }

  /** Normal values times `scale`, another cut for every `set`. */
  normal<D extends FloatDType>(dtype: D, shape: readonly number[], set: number, scale = 1): Tensor<D> {
    const length = shape.reduce((a, b) => a * b, 1);
    const first = (set * 7919) % PERIOD;
    const data = pool(dtype, scale, length).subarray(first, first + length);
    return this.keep(this.context.tensor(dtype, shape, data as never));
  }

  int32(shape: readonly number[], data: Int32Array): Tensor<'i32'> {
    return this.keep(this.context.tensor('i32', shape, data));
  }

  dispose(): void {
    for (const each of this.#held.splice(0)) each.dispose();
  }
}
