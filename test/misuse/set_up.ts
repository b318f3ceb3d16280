// What the tests of misuse share: a context of their own for each backend, tensors in it, and tables of refused calls.
import { afterAll, expect, it } from 'vitest';
import { type BackendName, type Context, createContext, moeFusedGate, packExperts } from '../../lib/index.js';
import { failure } from '../failures.js';

// biome-ignore lint/suspicious/noExplicitAny: the point is to pass what the types forbid
export type Anything = any;

/** Inside a describe: a context that lasts as long as it, and what makes zeros in that. */
export async function setUp(backend: BackendName) {
  const context = await createContext({ backend });
  afterAll(() => context.close());
  const f32 = (...shape: number[]) => context.tensor('f32', shape);
  const i32 = (...shape: number[]) => context.tensor('i32', shape);
  const experts = () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) });
  return { context, f32, i32, experts };
}

/** What is wrong, the call, code, argument, message. */
export type RefusedCall = [string, () => unknown, string, string | undefined, RegExp];

export function itRefuses(context: Context, calls: readonly RefusedCall[]): void {
  it.each(calls)('%s', (_, act, code, arg, message) => {
    const error = failure(act);
    expect({ code: error.code, arg: error.arg }).toEqual({ code: `ERR_MOE_${code}`, arg });
    expect(error.message).toMatch(message);
    expect(error.message).toMatch(/^\[\w+\] /);
  });

  it('goes on working after every one of them', async () => {
    const { ids } = moeFusedGate(
      { logits: context.tensor('f32', [1, 3], Float32Array.of(1, 3, 2)) },
      { topK: 2 },
    );
    expect([...(await ids.read())]).toEqual([1, 2]);
  });
}
