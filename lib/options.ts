// The kinds of options an op can have: closed, each with one number that stands for it in native calls.
import { MoeError } from './errors.js';

/** What is known when a default is computed: earlier options, which inputs are present, bound dimensions. */
export interface OptionScope {
  readonly options: Readonly<Record<string, unknown>>;
  readonly given: { has(name: string): boolean };
  dim(name: string): number;
}

export interface OptionKind<T = unknown> {
  /** `enum halves|interleaved`, `integer`, `real`, `flag`: what the native side describes for the same field. */
  readonly native: string;
  readonly expected: string;
  readonly default: Default<T> | undefined;
  accepts(value: unknown): value is T;
  encode(value: T): number;
}

type Default<T> = T | ((scope: OptionScope) => T | undefined);

/** One of a closed set of names; the native side numbers them in this order. */
export function choice<const T extends string>(
  names: readonly T[],
  fallback: Default<NoInfer<T>> | undefined,
): OptionKind<T> {
  return {
    native: `enum ${names.join('|')}`,
    expected: `one of ${names.map((name) => `'${name}'`).join(', ')}`,
    default: fallback,
    accepts: (value): value is T => names.includes(value as T),
    encode: (value) => names.indexOf(value),
  };
}

/** An integer in [min, max]; without a fallback it must be given. */
export function integer(range: { min: number; max: number; default?: Default<number> }): OptionKind<number> {
  return {
    native: 'integer',
    expected: `an integer from ${range.min} to ${range.max}`,
    default: range.default,
    accepts: (value): value is number =>
      Number.isInteger(value) && (value as number) >= range.min && (value as number) <= range.max,
    encode: (value) => value,
  };
}

/** The first id of zero experts: 0 where there are none, else it must be given. */
export function firstZeroExpert(): OptionKind<number> {
  return integer({
    min: 0,
    max: 0x7fffffff,
    default: ({ options }) => (options.zeroExperts === 0 ? 0 : undefined),
  });
}

/** A number that f32 can hold: kernels compute with that. */
export function real(range: { default?: Default<number> } = {}): OptionKind<number> {
  return {
    native: 'real',
    expected: 'a finite number (in f32)',
    default: range.default,
    accepts: (value): value is number => typeof value === 'number' && Number.isFinite(Math.fround(value)),
    encode: (value) => value,
  };
}

/** A factor that f32 can multiply by and divide by. */
export function positive(range: { default?: Default<number> } = {}): OptionKind<number> {
  const holds = (value: number) => Number.isFinite(Math.fround(value)) && Math.fround(value) > 0;
  return {
    native: 'real',
    expected: 'a finite number above 0 (in f32, and so its reciprocal)',
    default: range.default,
    accepts: (value): value is number => typeof value === 'number' && holds(value) && holds(1 / value),
    encode: (value) => value,
  };
}

export function flag(fallback: Default<boolean>): OptionKind<boolean> {
  return {
    native: 'flag',
    expected: 'true or false',
    default: fallback,
    accepts: (value): value is boolean => typeof value === 'boolean',
    encode: Number,
  };
}

// biome-ignore lint/suspicious/noExplicitAny: a kind is contravariant in the value it encodes
export type OptionKinds = Readonly<Record<string, OptionKind<any>>>;

const lists = new WeakMap<OptionKinds, readonly (readonly [name: string, kind: OptionKinds[string]])[]>();

/** The kinds in their order, listed once: a call of an op should not spend its time on that. */
export function listOf(kinds: OptionKinds): readonly (readonly [name: string, kind: OptionKinds[string]])[] {
  let list = lists.get(kinds);
  if (list === undefined) {
    list = Object.entries(kinds);
    lists.set(kinds, list);
  }
  return list;
}

/** Anything that a test accepts, for functions around ops; never part of a native call. */
export function value<T>(
  expected: string,
  accepts: (given: unknown) => boolean,
  fallback: T,
  presence: 'optional' | 'required' = 'required',
): OptionKind<T> {
  return {
    native: '',
    expected,
    default: fallback,
    accepts: (given): given is T => (presence === 'optional' && given === undefined) || accepts(given),
    encode: () => 0,
  };
}

/** Checks options against their kinds and fills in the defaults, in the order of the kinds. */
export function resolveOptions(
  op: string,
  kinds: OptionKinds,
  given: unknown,
  scope: Omit<OptionScope, 'options'>,
): Record<string, unknown> {
  if (given !== undefined && (typeof given !== 'object' || given === null || Array.isArray(given))) {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected options: an object but received ${describeValue(given)}`,
      {
        op,
        arg: 'options',
      },
    );
  }
  const source = (given ?? {}) as Record<string, unknown>;
  for (const name of Object.keys(source)) {
    if (!Object.hasOwn(kinds, name)) {
      const known = Object.keys(kinds).join(', ') || 'none';
      throw new MoeError('ERR_MOE_INVALID_ARG', `unknown option '${name}'; the options are: ${known}`, {
        op,
        arg: name,
      });
    }
  }
  const options: Record<string, unknown> = {};
  const known: OptionScope = { options, given: scope.given, dim: scope.dim };
  for (const [name, kind] of listOf(kinds)) {
    let value = source[name];
    if (value === undefined) value = typeof kind.default === 'function' ? kind.default(known) : kind.default;
    if (!kind.accepts(value)) {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${name}: ${kind.expected} but received ${describeValue(value)}`,
        { op, arg: name },
      );
    }
    options[name] = value;
  }
  return options;
}

/** A value as an error message shows it: short, and never by running code of the value's own. */
export function describeValue(value: unknown): string {
  if (value === null) return 'null';
  if (typeof value === 'string') return `'${value.length > 60 ? `${value.slice(0, 60)}...` : value}'`;
  if (typeof value === 'bigint') return `${value}n`;
  if (typeof value === 'function') return 'a function';
  if (typeof value === 'symbol') return 'a symbol';
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (ArrayBuffer.isView(value))
    return `${Object.prototype.toString.call(value).slice(8, -1)}(${value.byteLength} bytes)`;
  if (typeof value === 'object') return 'an object';
  return String(value);
}
