// What a function around the ops is given, checked by kind: every refusal is a MoeError that names the function, the
// argument, what was expected and what came. The options of ops have kinds of their own (options.ts).
import { MoeError } from './errors.js';
import { describeValue } from './options.js';

/** The checks of one function, `op` in its errors. Each throws ERR_MOE_INVALID_ARG or returns what it was given. */
export class Arguments {
  readonly op: string;

  constructor(op: string) {
    this.op = op;
  }

  refuse(arg: string, expected: string, given: unknown): never {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected ${arg} to be ${expected} but received ${describeValue(given)}`,
      { op: this.op, arg },
    );
  }

  integer(arg: string, given: unknown, least: number, most = Number.MAX_SAFE_INTEGER): number {
    if (Number.isSafeInteger(given) && (given as number) >= least && (given as number) <= most)
      return given as number;
    const range =
      most < Number.MAX_SAFE_INTEGER ? `an integer in ${least}..${most}` : `an integer >= ${least}`;
    return this.refuse(arg, range, given);
  }

  /** A finite number. */
  number(arg: string, given: unknown, least: number, most = Number.POSITIVE_INFINITY): number {
    if (typeof given === 'number' && Number.isFinite(given) && given >= least && given <= most) return given;
    const range =
      most < Number.POSITIVE_INFINITY ? `a number in ${least}..${most}` : `a finite number >= ${least}`;
    return this.refuse(arg, range, given);
  }

  text(arg: string, given: unknown): string {
    return typeof given === 'string' ? given : this.refuse(arg, 'a string', given);
  }

  flag(arg: string, given: unknown): boolean {
    return typeof given === 'boolean' ? given : this.refuse(arg, 'true or false', given);
  }

  /** A function, or nothing. */
  callback(arg: string, given: unknown): void {
    if (given !== undefined && typeof given !== 'function') this.refuse(arg, 'a function', given);
  }

  oneOf<T extends string>(arg: string, given: unknown, names: readonly T[]): T {
    return names.includes(given as T) ? (given as T) : this.refuse(arg, `one of ${names.join(', ')}`, given);
  }

  /** An object with named fields; with `known`, none but these. */
  object<T extends object>(arg: string, given: T, known?: readonly string[]): T {
    if (typeof given !== 'object' || given === null || Array.isArray(given))
      return this.refuse(arg, 'an object', given);
    const unknown =
      known === undefined ? undefined : Object.keys(given).find((name) => !known.includes(name));
    if (unknown !== undefined)
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `unknown option '${unknown}'; the options are: ${known!.join(', ')}`,
        {
          op: this.op,
          arg: unknown,
        },
      );
    return given;
  }

  instance<T>(arg: string, given: T, kind: { readonly name: string; prototype: T }): T {
    return given instanceof (kind as never) ? given : this.refuse(arg, `a ${kind.name}`, given);
  }

  list<T extends readonly unknown[]>(arg: string, given: T): T {
    return Array.isArray(given) ? given : this.refuse(arg, 'an array', given);
  }

  /** A list of objects of one class, such as a placement for each layer. */
  instances<T>(
    arg: string,
    given: readonly T[],
    kind: { readonly name: string; prototype: T },
  ): readonly T[] {
    for (const [index, one] of this.list(arg, given).entries()) this.instance(`${arg}[${index}]`, one, kind);
    return given;
  }

  /** An array or typed array; what it holds is for others to look at. */
  numbers<T extends ArrayLike<number> | ArrayLike<bigint>>(arg: string, given: T): T {
    if (Array.isArray(given) || (ArrayBuffer.isView(given) && !(given instanceof DataView))) return given;
    return this.refuse(arg, 'an array of numbers', given);
  }
}
