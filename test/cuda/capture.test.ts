// Captures are CUDA graphs with an arena of their own.
import { describe, expect, it } from 'vitest';
import {
  allocateExperts,
  type Context,
  createContext,
  moeCombine,
  moeRouter,
  packExperts,
  sharedExperts,
} from '../../lib/index.js';
import { ready, values } from './device.js';

const [TOKENS, HIDDEN] = [33, 64];
const floats = (context: Context, shape: number[], seed: number) =>
  context.tensor(
    'f32',
    shape,
    values(
      shape.reduce((a, b) => a * b),
      seed,
    ),
  );

const routed = (context: Context) => ({
  x: floats(context, [TOKENS, HIDDEN], 1),
  weight: floats(context, [HIDDEN, HIDDEN], 2),
});
/** Makes tensors that would take memory given back too early, and gives them back once `work` is done. */
const crowded = async (context: Context, work: () => Promise<void>) => {
  const crowd = Array.from({ length: 50 }, (_, i) => floats(context, [TOKENS, HIDDEN], i));
  await work();
  for (const tensor of crowd) tensor.dispose();
};

describe.runIf(ready)('a capture on cuda', () => {
  it('gives the bits of the same calls outside, on every replay and for every input', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const { x, weight } = routed(ctx);
    const forward = () => {
      const first = moeRouter({ hidden: x, weight });
      const second = moeRouter({ hidden: first, weight });
      first.dispose(); // its memory may serve later tensors of the same capture
      const third = moeRouter({ hidden: second, weight });
      second.dispose();
      return third;
    };
    using step = ctx.capture(forward);
    for (let seed = 3; seed < 8; seed++) {
      x.write(values(TOKENS * HIDDEN, seed));
      const expected = await forward().read();
      step.replay();
      step.replay();
      expect(await step.output.read()).toEqual(expected);
    }
  });

  it('does nothing until it is replayed', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const x = ctx.tensor('f32', [4], Float32Array.of(1, 2, 3, 4));
    using step = ctx.capture(() => x.write(Float32Array.of(5, 6, 7, 8)));
    expect(await x.read()).toEqual(Float32Array.of(1, 2, 3, 4));
    step.replay();
    expect(await x.read()).toEqual(Float32Array.of(5, 6, 7, 8));
  });

  it('freezes data that is written inside, and zeros', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const source = values(100_000);
    using step = ctx.capture(() => ({
      frozen: ctx.tensor('f32', [100_000], source),
      zeros: ctx.tensor('f32', [1000]),
    }));
    const kept = source.slice();
    source.fill(7);
    for (let i = 0; i < 3; i++) {
      step.output.frozen.write(new Float32Array(100_000).fill(i));
      step.output.zeros.write(new Float32Array(1000).fill(i));
      step.replay();
      expect(await step.output.frozen.read()).toEqual(kept);
      expect(await step.output.zeros.read()).toEqual(new Float32Array(1000));
    }
  });

  it('makes weights inside once, with memory that outlasts later tensors', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const hidden = floats(ctx, [TOKENS, HIDDEN], 1);
    const w13 = floats(ctx, [1, 2 * HIDDEN, HIDDEN], 2);
    const w2 = floats(ctx, [1, HIDDEN, HIDDEN], 3);
    const outside = await sharedExperts({ hidden, experts: packExperts({ w13, w2 }) }).read();
    using step = ctx.capture(() => {
      const experts = packExperts({ w13, w2 });
      const empty = allocateExperts(ctx, { slots: 1, hidden: HIDDEN, intermediate: HIDDEN, dtype: 'f32' });
      return { out: sharedExperts({ hidden, experts }), none: sharedExperts({ hidden, experts: empty }) };
    });
    for (let i = 0; i < 3; i++) {
      step.replay();
      expect(await step.output.out.read()).toEqual(outside);
      expect(await step.output.none.read()).toEqual(new Float32Array(TOKENS * HIDDEN));
    }
  });

  it('keeps its inputs and its outputs while it lives, and gives everything back', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const before = ctx.memory().used;
    const { x, weight } = routed(ctx);
    const expected = await moeRouter({ hidden: x, weight }).read();
    const step = ctx.capture(() => moeRouter({ hidden: x, weight }));
    x.dispose();
    weight.dispose();
    await crowded(ctx, async () => {
      step.replay();
      expect(await step.output.read()).toEqual(expected);
    });
    for (let i = 0; i < 100; i++) step.replay();
    const last = step.output.read();
    step.dispose(); // with replays and a read in flight
    expect(await last).toEqual(expected);
    expect(() => step.replay()).toThrow(expect.objectContaining({ code: 'ERR_MOE_DISPOSED' }));
    await ctx.synchronize();
    globalThis.gc?.();
    expect(ctx.memory().used - before).toBeLessThanOrEqual(4 * TOKENS * HIDDEN); // the router's first output
  });

  it('keeps what it uses of another capture', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const { x, weight } = routed(ctx);
    const router = (hidden: typeof x) => moeRouter({ hidden, weight });
    const between = router(x);
    const last = router(between);
    const expected = await last.read();
    const before = ctx.memory().used;
    const first = ctx.capture(() => router(x));
    const second = ctx.capture(() => router(first.output));
    first.replay();
    first.dispose();
    await crowded(ctx, async () => {
      second.replay();
      expect(await second.output.read()).toEqual(expected);
    });
    second.dispose();
    expect(ctx.memory().used).toBe(before);
    for (const tensor of [between, last]) tensor.dispose(); // until here: the collector must not come first
  });

  it('interleaves with others and with plain calls', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const x = floats(ctx, [TOKENS, HIDDEN], 1);
    const weights = [2, 3, 4].map((seed) => floats(ctx, [HIDDEN, HIDDEN], seed));
    const expected = await Promise.all(weights.map((weight) => moeRouter({ hidden: x, weight }).read()));
    const steps = weights.map((weight) => ctx.capture(() => moeRouter({ hidden: x, weight })));
    for (let i = 0; i < 30; i++) {
      steps[i % 3].replay();
      const plain = moeRouter({ hidden: x, weight: weights[(i + 1) % 3] });
      expect(await steps[i % 3].output.read()).toEqual(expected[i % 3]);
      expect(await plain.read()).toEqual(expected[(i + 1) % 3]);
      plain.dispose();
    }
    for (const step of steps) step.dispose();
  });

  it('leaves the context as it was when recording fails', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const x = floats(ctx, [TOKENS, HIDDEN], 1);
    const before = ctx.memory().used;
    for (let i = 0; i < 3; i++) {
      expect(() =>
        ctx.capture(() => {
          moeRouter({ hidden: x, weight: x });
          ctx.tensor('f32', [1000], values(1000));
          throw new Error('on purpose');
        }),
      ).toThrow('on purpose');
      expect(() => ctx.capture(() => x.read())).toThrow();
      expect(() => ctx.capture(() => ctx.synchronizeSync())).toThrow(
        expect.objectContaining({ code: 'ERR_MOE_CAPTURE' }),
      );
    }
    expect(ctx.memory().used).toBe(before);
    using empty = ctx.capture(() => undefined);
    empty.replay();
    expect((await moeRouter({ hidden: x, weight: x }).read()).length).toBe(TOKENS * TOKENS);
  });

  it('replays with memory that does not grow', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const rows = floats(ctx, [64, 4096], 1);
    const inverse = ctx.tensor(
      'i32',
      [32, 2],
      Int32Array.from({ length: 64 }, (_, i) => i),
    );
    const weights = floats(ctx, [32, 2], 3);
    for (let i = 0; i < 200; i++) {
      const step = ctx.capture(() => moeCombine({ rows, inverse, weights }));
      for (let j = 0; j < 5; j++) step.replay();
      step.dispose();
      if (i % 50 === 0) await ctx.synchronize();
    }
    expect(ctx.memory().reserved).toBeLessThan(256 << 20);
  });
});
