// The backends that this machine can run, for tests that must hold on each of them.
import { afterAll, beforeAll } from 'vitest';
import { backendStatuses, type Context, createContext } from '../../lib/index.js';

type Backend = NonNullable<NonNullable<Parameters<typeof createContext>[0]>['backend']>;

export const backends: readonly Backend[] = [
  'oracle',
  ...backendStatuses().flatMap(({ backend, state }) => (state === 'ready' ? [backend] : [])),
];

/** A context that lives as long as the describe block it is called in. */
export function useContext(backend: Backend): () => Context {
  let context: Context;
  beforeAll(async () => {
    context = await createContext({ backend });
  });
  afterAll(() => context.close());
  return () => context;
}

/** |actual - expected| / |expected| */
export function relNorm(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return actual.length === expected.length ? Math.sqrt(difference / norm) : Number.NaN;
}

/** Rows of ids as sorted strings, the first `columns` of each row of `stride`. */
export function idSets(ids: ArrayLike<number>, stride: number, columns: number): string[] {
  return Array.from({ length: ids.length / stride }, (_, row) =>
    Array.from({ length: columns }, (_, column) => ids[row * stride + column])
      .sort((a, b) => a - b)
      .join(' '),
  );
}
