// The sizes of the grid, the backends that it is for, and what its files share. Small batches are in test/ops; here are
// those that fill a device: many blocks, ragged ends, persistent loops. References come from the oracle and, where it
// would take too long, from the CPU backend, which the same grid compares with the oracle.
import { expect } from 'vitest';
import { type Context, createContext, type Tensor } from '../../lib/index.js';
import type { RawArray } from '../../lib/tensor.js';
import { backends } from '../ops/backends.js';

export const gridTokens = [0, 1, 2, 31, 32, 33, 127, 511, 512, 513, 4097, 40000] as const;

/** The oracle is what they are compared with. */
export const natives = backends.filter((backend) => backend !== 'oracle');

export type Outputs = Readonly<Record<string, RawArray>>;

/** What `build` returns, as raw bits; its tensors are given back. */
export async function outputsOf(
  context: Context,
  build: (context: Context) => Record<string, Tensor | undefined>,
): Promise<Outputs> {
  const tensors = Object.entries(build(context)).filter(
    (entry): entry is [string, Tensor] => entry[1] !== undefined,
  );
  const read = await Promise.all(
    tensors.map(async ([name, tensor]) => [name, await tensor.readRaw()] as const),
  );
  for (const [, tensor] of tensors) tensor.dispose();
  return Object.fromEntries(read);
}

const bytesOf = ({ buffer, byteOffset, byteLength }: RawArray) => Buffer.from(buffer, byteOffset, byteLength);

/** Every bit; element by element only where one differs. */
export function expectSameBits(actual: Outputs, expected: Outputs, label = ''): void {
  expect(Object.keys(actual), label).toEqual(Object.keys(expected));
  for (const [name, values] of Object.entries(actual)) {
    const wanted = expected[name];
    expect(values.length, `${label} ${name}`).toBe(wanted.length);
    if (bytesOf(values).equals(bytesOf(wanted))) continue;
    const at = values.findIndex((value: number | bigint, i: number) => !Object.is(value, wanted[i]));
    expect.fail(`${label} ${name}[${at}] is ${values[at]} instead of ${wanted[at]}`);
  }
}

const contexts = new Map<string, Promise<Context>>();

/** The context that references come from. */
export function referenceOf(backend: 'oracle' | 'cpu'): Promise<Context> {
  let context = contexts.get(backend);
  if (context === undefined) {
    context = createContext({ backend });
    contexts.set(backend, context);
  }
  return context;
}
