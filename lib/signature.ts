// Reads the one-line types of op specs: 'f32|bf16[tokens, 2*intermediate]?' is documentation and validation at once.
//
//   inputs   dtype ('|' dtype)* '[' dim (',' dim)* ']' '?'     a tensor; '?' where it may be left out
//            '=name[...]'                                      a tensor with the dtype of the input `name`
//            'inout ...'                                       a tensor that the op also changes
//            'experts[slots, hidden, intermediate]'            packed ExpertWeights
//            'count(dim)?'                                     a number or an i32[1] tensor, `dim` where left out
//   outputs  the same without '?', 'inout', 'experts' and 'count'
//   dim      terms joined by '+'; a term is an integer, a name or integer*name
//
// A bare name binds on first sight and is compared from then on.
import { type DType, dtypes } from './tensor.js';

export interface Term {
  readonly factor: number;
  /** Absent for a plain integer. */
  readonly name?: string;
}
export type Dim = readonly Term[];

export interface Signature {
  readonly kind: 'tensor' | 'experts' | 'count';
  readonly text: string;
  readonly optional: boolean;
  readonly inout: boolean;
  readonly dtypes: readonly DType[];
  /** The input whose dtype this one has. */
  readonly dtypeOf?: string;
  readonly dims: readonly Dim[];
}

export function parseSignature(text: string): Signature {
  const match = /^(inout )?(=?[a-z0-9_|A-Z]+)([[(])(.*)[\])](\?)?$/.exec(text);
  if (match === null) throw new SyntaxError(`malformed signature '${text}'`);
  const [, inout, head, bracket, inner, optional] = match;
  const kind = bracket === '(' ? 'count' : head === 'experts' ? 'experts' : 'tensor';
  const dtypeOf = head.startsWith('=') ? head.slice(1) : undefined;
  const names = kind === 'tensor' && dtypeOf === undefined ? head.split('|') : [];
  for (const name of names) {
    if (!(name in dtypes)) throw new SyntaxError(`unknown dtype '${name}' in '${text}'`);
  }
  return {
    kind,
    text: text.replace(/\?$/, '').replace(/^inout /, ''),
    optional: optional !== undefined,
    inout: inout !== undefined,
    dtypes: names as DType[],
    ...(dtypeOf === undefined ? {} : { dtypeOf }),
    dims: inner.split(',').map((dim) => parseDim(dim.trim())),
  };
}

function parseDim(text: string): Dim {
  return text.split('+').map((part) => {
    const match = /^(?:(\d+)\*)?([a-z]\w*)$|^(\d+)$/i.exec(part.trim());
    if (match === null) throw new SyntaxError(`malformed dimension '${text}'`);
    const [, factor, name, integer] = match;
    return name === undefined ? { factor: Number(integer) } : { factor: Number(factor ?? 1), name };
  });
}

/** `2*intermediate`, `topK + sharedExperts`. */
export function formatDim(dim: Dim): string {
  return dim
    .map(({ factor, name }) => (name === undefined ? `${factor}` : factor === 1 ? name : `${factor}*${name}`))
    .join(' + ');
}

/** The value of a dimension, or undefined while one of its names is unbound. */
export function evaluateDim(dim: Dim, bound: ReadonlyMap<string, number>): number | undefined {
  let sum = 0;
  for (const { factor, name } of dim) {
    const value = name === undefined ? 1 : bound.get(name);
    if (value === undefined) return undefined;
    sum += factor * value;
  }
  return sum;
}

/** What a dimension of `size` says about its only name when that is still unbound: undefined if it cannot fit. */
export function solveDim(dim: Dim, size: number): { name: string; value: number } | undefined {
  if (dim.length !== 1 || dim[0].name === undefined) return undefined;
  const value = size / dim[0].factor;
  return Number.isInteger(value) ? { name: dim[0].name, value } : undefined;
}
