// Numbers that are no sizes, sizes that no machine has, and empty tensors whose other dimensions are enormous.
import { describe, expect, it } from 'vitest';
import {
  allocateExperts,
  createContext,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeFusedGate,
  moeRouter,
  packExperts,
  sharedExperts,
} from '../../lib/index.js';
import { failure, rejection } from '../failures.js';
import { backends } from '../ops/backends.js';
import { packCase } from '../ops/packed.js';
import { type Anything, setUp } from './set_up.js';

describe.each(backends)('dimensions on %s', async (backend) => {
  const { context, f32, i32 } = await setUp(backend);

  const noSizes: [string, Anything][] = [
    ['-1', -1],
    ['-2^31', -(2 ** 31)],
    ['0.5', 0.5],
    ['NaN', Number.NaN],
    ['Infinity', Number.POSITIVE_INFINITY],
    ['-Infinity', Number.NEGATIVE_INFINITY],
    ['2^53', 2 ** 53],
    ['1e300', 1e300],
    ['2n', 2n],
    ["'2'", '2'],
    ['null', null],
    ['undefined', undefined],
    ['true', true],
    ['a symbol', Symbol('size')],
    ['an object', { valueOf: () => 2 }],
    ['an array', [2]],
    ['a Number', Object(2)],
  ];

  it.each(noSizes)('%s is no dimension of a tensor', (_, size) => {
    for (const shape of [[size], [2, size], [size, 2], [0, size], [1, 1, 1, 1, 1, 1, 1, size]]) {
      expect(failure(() => context.tensor('f32', shape))).toMatchObject({
        code: 'ERR_MOE_INVALID_ARG',
        arg: 'shape',
      });
    }
  });

  it.each(noSizes.filter(([, size]) => size !== undefined))('%s is no option that counts', (_, size) => {
    const calls: [string, () => unknown][] = [
      ['topK', () => moeFusedGate({ logits: f32(2, 8) }, { topK: size })],
      ['groups', () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, groups: size })],
      ['sharedExperts', () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, sharedExperts: size })],
      ['seed', () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, seed: size })],
      ['validTokens', () => moeFusedGate({ logits: f32(2, 8), validTokens: size }, { topK: 1 })],
      ['experts', () => moeDispatch({ ids: i32(2, 2) }, { experts: size })],
      ['blockSize', () => moeDispatch({ ids: i32(2, 2) }, { experts: 4, blockSize: size })],
      ['firstExpert', () => moeDispatch({ ids: i32(2, 2) }, { experts: 4, firstExpert: size })],
      ['slots', () => allocateExperts(context, { slots: size, hidden: 2, intermediate: 2, dtype: 'f32' })],
      ['hidden', () => allocateExperts(context, { slots: 1, hidden: size, intermediate: 2, dtype: 'f32' })],
    ];
    for (const [arg, call] of calls) {
      expect(failure(call), arg).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', arg });
    }
  });

  it.each(noSizes.filter(([, size]) => size !== undefined))(
    '%s is no device and no thread count',
    async (_, size) => {
      for (const arg of ['device', 'threads']) {
        expect(await rejection(() => createContext({ backend, [arg]: size }))).toMatchObject({
          code: 'ERR_MOE_INVALID_ARG',
          arg,
        });
      }
    },
  );

  it.each([
    ['2^31', [2 ** 20, 2 ** 20, 64]],
    ['2^53', [2 ** 27, 2 ** 27]],
    ['2^53 by bytes only', [2 ** 51, 2]],
    ['2^64', [2 ** 32, 2 ** 32]],
    ['what a double holds', [2 ** 52, 2 ** 52, 2 ** 52, 2 ** 52, 2 ** 52, 2 ** 52, 2 ** 52]],
  ])('elements beyond %s are out of memory, and the next call works', async (_, shape) => {
    expect(failure(() => f32(...shape))).toMatchObject({ code: 'ERR_MOE_OOM', arg: 'tensor' });
    expect(failure(() => context.capture(() => f32(...shape)))).toMatchObject({ code: 'ERR_MOE_OOM' });
    expect([...(await f32(2).read())]).toEqual([0, 0]);
  });

  it('single bytes up to the largest integer are out of memory, too', async () => {
    for (const bytes of [2 ** 50, Number.MAX_SAFE_INTEGER])
      expect(failure(() => context.tensor('u8', [bytes]))).toMatchObject({
        code: 'ERR_MOE_OOM',
        arg: 'tensor',
      });
    expect([...(await f32(2).read())]).toEqual([0, 0]);
  });

  it('ten terabytes are out of memory, with what was asked for and what there is', async () => {
    const terabytes = 10 * 2 ** 40;
    const before = context.memory().used;
    const ways: [string, string, () => unknown][] = [
      ['tensor', 'tensor', () => context.tensor('u8', [terabytes])],
      ['moe_router', 'logits', () => moeRouter({ hidden: f32(2 ** 20, 1), weight: f32(2.5 * 2 ** 20, 1) })],
      [
        'allocate_experts',
        'experts',
        () => allocateExperts(context, { slots: 65536, hidden: 2 ** 15, intermediate: 1200, dtype: 'f32' }),
      ],
    ];
    for (const [op, arg, ask] of ways) {
      const error = failure(ask);
      expect(error).toMatchObject({ code: 'ERR_MOE_OOM', op, arg });
      expect(error.message).toMatch(/requested \d{13,} bytes/);
      expect(error.message).toMatch(/\d+ (bytes available|of \d+ are free)/);
      expect([...(await f32(2).read())]).toEqual([0, 0]);
    }
    globalThis.gc?.();
    expect(context.memory().used - before).toBeLessThan(2 ** 26); // the inputs of the router, until they are collected
  });

  it('a shape is read once, element by element', () => {
    let asked = 0;
    const growing = Object.defineProperty([0, 2], 0, { get: () => ++asked });
    expect(context.tensor('f32', growing).shape).toEqual([1, 2]);
    expect(asked).toBe(1);
    const proxied = new Proxy([3], {
      get: (target, name) => (name === 'length' ? 1 : Reflect.get(target, name)),
    });
    expect(context.tensor('f32', Object.freeze([4]) as number[]).size).toBe(4);
    expect(context.tensor('f32', proxied).size).toBe(3);
    class Shape extends (Array as Anything) {
      every(): boolean {
        return true;
      }
      *[Symbol.iterator]() {
        yield 1000;
      }
    }
    expect(context.tensor('f32', (Shape as Anything).from([2, 3])).shape).toEqual([2, 3]);
    for (const holes of [new Array(2), new Array(2 ** 32 - 1), Object.assign(new Array(3), { 0: 1, 2: 2 })]) {
      expect(failure(() => context.tensor('f32', holes))).toMatchObject({ arg: 'shape' });
    }
  });

  it('tensors and weights cannot be given another shape', () => {
    const tensor = f32(2, 3) as Anything;
    const experts = packCase(context, { slots: 1, hidden: 2, intermediate: 2 }) as Anything;
    for (const change of [
      () => (tensor.shape = [1000]),
      () => (tensor.shape[0] = 1000),
      () => (tensor.dtype = 'i64'),
      () => (tensor.context = undefined),
      () => (experts.hidden = 1000),
      () => (experts.swiglu.alpha = 7),
    ]) {
      expect(change).toThrow(TypeError);
    }
    expect(String(tensor)).toBe('f32[2, 3]');
  });

  const huge = 2 ** 52;

  it('empty tensors may be enormous in their other dimensions, and take no time', async () => {
    const begun = performance.now();
    const experts = packCase(context, { slots: 2, hidden: 4, intermediate: 3 });
    expect(moeRouter({ hidden: f32(huge, 0), weight: f32(0, 0) }).shape).toEqual([huge, 0]);
    expect(moeRouter({ hidden: f32(0, huge), weight: f32(0, huge) }).shape).toEqual([0, 0]);
    expect([...(await moeRouter({ hidden: f32(1, 0), weight: f32(2, 0) }).read())]).toEqual([0, 0]);
    const dispatched = moeDispatch({ ids: i32(huge, 0) }, { experts: 3 });
    expect([...(await dispatched.counts.read())]).toEqual([0, 0, 0]);
    expect([...(await dispatched.offsets.read())]).toEqual([0, 0, 0, 0]);
    const blocks = moeDispatch({ ids: i32(huge, 0), hidden: f32(huge, 0) }, { experts: 3, blockSize: 16 });
    expect(blocks.rows!.shape).toEqual([0, 0]);
    const rows = f32(huge, 0);
    expect(moeCombine({ rows, inverse: i32(huge, 0), weights: f32(huge, 0) }).shape).toEqual([huge, 0]);
    expect(moeCombine({ rows: f32(0, huge), inverse: i32(0, huge), weights: f32(0, huge) }).size).toBe(0);
    const hidden = f32(0, 4);
    const none = { hidden, ids: i32(0, huge), weights: f32(0, huge), experts };
    expect((await fusedMoe(none).read()).length).toBe(0);
    expect(
      sharedExperts({ hidden, experts: packCase(context, { slots: 1, hidden: 4, intermediate: 3 }) }).size,
    ).toBe(0);
    const sorted = { rows: hidden, counts: i32(2), offsets: i32(3), experts };
    expect(moeExperts({ ...sorted, order: i32(0), weights: f32(huge, 0) }).size).toBe(0);
    const load = context.tensor('i64', [0]);
    expect(moeFusedGate({ logits: f32(0, 4), load }, { topK: 1 }).ids.size).toBe(0);
    packExperts({ w13: f32(0, 6, 4), w2: f32(0, 4, 3) }, { into: experts });
    await context.synchronize();
    expect(performance.now() - begun).toBeLessThan(5000);
  });

  it('refuses blocks that would need more places than an i32 counts', () => {
    const call = () => moeDispatch({ ids: i32(1024, 1024) }, { experts: 65536, blockSize: 65536 });
    expect(failure(call)).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', op: 'moe_dispatch' });
  });

  it('refuses shapes that cannot meet, however large', () => {
    expect(failure(() => moeRouter({ hidden: f32(0, huge), weight: f32(0, huge - 1) }))).toMatchObject({
      arg: 'weight',
    });
    expect(
      failure(() => moeCombine({ rows: f32(0, 1), inverse: i32(huge, 0), weights: f32(huge - 1, 0) })),
    ).toMatchObject({ arg: 'weights' });
  });
});
