// Functions of the caller's that throw, return promises or call back in: recorded functions, thenables, listeners.
import { getEventListeners } from 'node:events';
import { describe, expect, it } from 'vitest';
import { createContext, moeRouter } from '../../lib/index.js';
import { failure, rejection } from '../failures.js';
import { backends } from '../ops/backends.js';
import { type Anything, setUp } from './set_up.js';

describe.each(backends)('callbacks on %s', async (backend) => {
  const { context } = await setUp(backend);
  const x = () => context.tensor('f32', [4, 4], new Float32Array(16).fill(1));

  it('a recorded function may throw anything, and nothing of the recording stays', async () => {
    const input = x();
    await context.synchronize();
    const before = context.memory().used;
    for (const thrown of [new Error('mine'), undefined, null, 0, 'text', Symbol('s'), { code: 1 }]) {
      let caught: unknown = 'nothing';
      try {
        context.capture(() => {
          moeRouter({ hidden: input, weight: input });
          context.tensor('f32', [100_000]);
          throw thrown;
        });
      } catch (error) {
        caught = error;
      }
      expect(caught).toBe(thrown);
    }
    await context.synchronize();
    expect(context.memory().used).toBe(before);
    using capture = context.capture(() => moeRouter({ hidden: input, weight: input }));
    capture.replay();
    expect((await capture.output.read())[0]).toBe(4);
  });

  it('a recorded function may swallow what is thrown at it, and the rest is recorded', async () => {
    const input = x();
    using capture = context.capture(() => {
      for (const refused of [
        () => input.read(),
        () => input.readSync(),
        () => input.to(context),
        () => context.synchronize(),
        () => context.capture(() => 1),
        () => context.close(),
        () => moeRouter({ hidden: input, weight: context.tensor('f32', [2, 3]) }),
        () => context.tensor('f32', [2 ** 52]),
      ]) {
        failure(refused);
      }
      return moeRouter({ hidden: input, weight: input });
    });
    capture.replay();
    expect(await capture.output.read()).toEqual(new Float32Array(16).fill(4));
  });

  it('what a recorded function gives is handed on as it is, unless it is to be awaited', () => {
    for (const output of [undefined, null, 0, 'x', Symbol.iterator, () => 1, []]) {
      expect(context.capture(() => output as Anything).output).toBe(output);
    }
    let asked = 0;
    const fickle = {
      // biome-ignore lint/suspicious/noThenProperty: the point is to return one
      get then() {
        return asked++ === 0 ? () => {} : undefined;
      },
    };
    for (const awaited of [
      // biome-ignore lint/suspicious/noThenProperty: the point is to return one
      { then: () => {} },
      Object.assign(() => {}, {
        // biome-ignore lint/suspicious/noThenProperty: the point is to return one
        then: () => {
          throw new Error('mine');
        },
      }),
      Promise.reject(new Error('never seen')),
      fickle,
    ]) {
      expect(failure(() => context.capture(() => awaited))).toMatchObject({ code: 'ERR_MOE_CAPTURE' });
    }
  });

  it('a recorded function may dispose what it makes, what it was given, and other captures', async () => {
    const input = x();
    const other = context.capture(() => moeRouter({ hidden: input, weight: input }));
    other.replay();
    const last = other.output.read();
    using capture = context.capture(() => {
      const first = moeRouter({ hidden: input, weight: input });
      const second = moeRouter({ hidden: first, weight: first });
      first.dispose();
      input.dispose();
      other.dispose();
      return second;
    });
    expect((await last)[0]).toBe(4);
    for (let i = 0; i < 3; i++) capture.replay();
    expect((await capture.output.read())[0]).toBe(64);
    expect(failure(() => other.replay())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
  });

  it('refuses signals that are none', async () => {
    const tensor = x();
    for (const options of [
      { signal: 1 },
      { signal: {} },
      { signal: null },
      { sgnal: 1 },
      5,
      null,
    ] as Anything[]) {
      for (const wait of [
        () => tensor.read(options),
        () => tensor.readRaw(options),
        () => context.synchronize(options),
        async () => context.close(options),
      ]) {
        expect(await rejection(wait)).toMatchObject({ code: 'ERR_MOE_INVALID_ARG' });
      }
    }
    expect(context.state).toBe('open');
  });

  it('a wait with a signal ends with it, and leaves no listener and no wait', async () => {
    const tensor = x();
    const reason = { why: 'enough' };
    for (const wait of [
      (signal: AbortSignal) => tensor.read({ signal }),
      (signal: AbortSignal) => tensor.readRaw({ signal }),
      (signal: AbortSignal) => context.synchronize({ signal }),
    ]) {
      const aborted = expect.objectContaining({ code: 'ERR_MOE_ABORTED', cause: reason });
      await expect(wait(AbortSignal.abort(reason))).rejects.toEqual(aborted);
      const controller = new AbortController();
      const waiting = [wait(controller.signal), wait(controller.signal)];
      expect(getEventListeners(controller.signal, 'abort').length).toBe(2);
      controller.abort(reason);
      for (const each of waiting) await expect(each).rejects.toEqual(aborted);
      expect(getEventListeners(controller.signal, 'abort')).toEqual([]);
      const unused = new AbortController();
      await wait(unused.signal);
      expect(getEventListeners(unused.signal, 'abort')).toEqual([]);
      unused.abort();
    }
    expect((await tensor.read())[0]).toBe(1);
    await context.synchronize();
  });

  it('a listener may dispose, close and enqueue', async () => {
    const own = await createContext({ backend });
    const tensor = own.tensor('f32', [4, 4], new Float32Array(16).fill(1));
    const controller = new AbortController();
    const read = tensor.read({ signal: controller.signal });
    let closing: Promise<void> | undefined;
    controller.signal.addEventListener('abort', () => {
      moeRouter({ hidden: tensor, weight: tensor });
      tensor.dispose();
      closing = own.close();
    });
    controller.abort();
    expect(await rejection(() => read)).toMatchObject({ code: 'ERR_MOE_ABORTED' });
    await closing;
    expect(own.state).toBe('closed');
  });

  it('close with a signal gives up what is left, tells whoever waits, and is closed', async () => {
    for (const busy of [0, 1, 100]) {
      const own = await createContext({ backend });
      const width = backend === 'oracle' ? 16 : 1024;
      const big = own.tensor('f32', [width, width], new Float32Array(width * width).fill(1));
      const done = own.tensor('f32', [2], Float32Array.of(1, 2)).read();
      const reads = Array.from({ length: busy }, () => {
        const logits = moeRouter({ hidden: big, weight: big });
        return logits.read().then(
          () => 'done',
          ({ code }) => code,
        );
      });
      expect([...(await done)]).toEqual([1, 2]);
      const controller = new AbortController();
      const closing = own.close({ signal: controller.signal });
      const begun = performance.now();
      controller.abort('no patience');
      expect(await rejection(() => closing)).toMatchObject({ code: 'ERR_MOE_ABORTED', cause: 'no patience' });
      for (const each of await Promise.all(reads)) expect(each).toMatch(/^(done|ERR_MOE_ABORTED)$/);
      if (backend !== 'cuda') expect(performance.now() - begun).toBeLessThan(3000); // what a GPU has begun it finishes
      expect(own.state).toBe('closed');
      await own.close();
      await own
        .close({ signal: AbortSignal.abort() })
        .catch(({ code }) => expect(code).toBe('ERR_MOE_ABORTED'));
      expect(failure(() => own.memory())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
      big.dispose();
    }
  });

  // The oracle has nothing to wait for, and a GPU is done too soon
  it.runIf(backend === 'cpu')(
    'waits end when their signal says so, however long the work takes',
    async () => {
      const own = await createContext({ backend });
      const big = own.tensor('f32', [1024, 1024], new Float32Array(1 << 20).fill(1));
      for (let i = 0; i < 500; i++) moeRouter({ hidden: big, weight: big }).dispose(); // a trillion operations
      const last = moeRouter({ hidden: big, weight: big });
      for (const wait of [
        () => last.read({ signal: AbortSignal.timeout(20) }),
        () => own.synchronize({ signal: AbortSignal.timeout(20) }),
        () => own.close({ signal: AbortSignal.timeout(20) }),
      ]) {
        const begun = performance.now();
        const error = await rejection(wait);
        expect(error).toMatchObject({ code: 'ERR_MOE_ABORTED', cause: { name: 'TimeoutError' } });
        expect(performance.now() - begun).toBeLessThan(1000);
      }
      expect(own.state).toBe('closed');
    },
  );

  it('close with a signal that stays silent finishes everything', async () => {
    const own = await createContext({ backend });
    const tensor = own.tensor('f32', [64, 64], new Float32Array(64 * 64).fill(1));
    const read = moeRouter({ hidden: tensor, weight: tensor }).read();
    const { signal } = new AbortController();
    await own.close({ signal });
    expect((await read)[0]).toBe(64);
    expect(getEventListeners(signal, 'abort')).toEqual([]);
  });
});
