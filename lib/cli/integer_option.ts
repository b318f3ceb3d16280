// Parses the integer options of the planning commands: one rule and one message for all of them.
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';

/** A commander parser for an integer >= least. Throws ERR_MOE_INVALID_ARG naming the option. */
export function integerOption(name: string, least: number, or = ''): (text: string) => number {
  return (text) => {
    const value = /^\d+$/.test(text.trim()) ? Number(text) : Number.NaN;
    if (!Number.isSafeInteger(value) || value < least)
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${name} to be an integer >= ${least}${or} but received ${describeValue(text)}`,
        { op: 'cli', arg: name },
      );
    return value;
  };
}

/** The same for a budget of moves: an integer >= 0, or Infinity for `unlimited`. */
export function movesOption(name: string): (text: string) => number {
  const integer = integerOption(name, 0, ' or unlimited');
  return (text) => (text.trim() === 'unlimited' ? Number.POSITIVE_INFINITY : integer(text));
}
