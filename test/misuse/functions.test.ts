// Every function of the package called from JavaScript with what its types forbid.
import { describe, expect, it } from 'vitest';
import * as api from '../../lib/index.js';
import type { Anything } from './set_up.js';

const { createContext: _, ...rest } = api; // whose results want to be closed
const isClass = (value: object): boolean => /^class\b/.test(String(value));
const functions: [name: string, call: (...args: Anything[]) => unknown][] = Object.entries(rest).flatMap(
  ([name, value]) => (typeof value === 'function' && !isClass(value) ? [[name, value as Anything]] : []),
);

describe('the functions of the package', () => {
  it('are all here', () => {
    const names = functions.map(([name]) => name);
    expect(names).toEqual(expect.arrayContaining(['moeFusedGate', 'packExperts', 'planSync', 'writeReport']));
  });

  const given: Anything[] = [undefined, null, Number.NaN, -1, 1.5, 'x', {}, [], Symbol('s'), 3n, 2 ** 53];
  it.each(functions)(
    '%s gives an error of this package, or a result, for whatever it is given',
    async (name, call) => {
      for (const first of given)
        for (const args of [[first], [first, first], [{}, first], [[], first]])
          try {
            await call(...args);
          } catch (error) {
            expect(error, `${name}(${args.map((one) => typeof one)})`).toBeInstanceOf(api.MoeError);
            expect((error as api.MoeError).code).not.toBe('ERR_MOE_INTERNAL');
          }
    },
  );
});
