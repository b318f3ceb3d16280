// Arguments in disguise: getters that change their mind, proxies, frozen and inherited options, strangers' tensors.
import { describe, expect, it } from 'vitest';
import {
  allocateExperts,
  Capture,
  Context,
  createContext,
  ExpertWeights,
  fusedMoe,
  MoeError,
  moeDispatch,
  moeFusedGate,
  moeRouter,
  packExperts,
  Tensor,
} from '../../lib/index.js';
import { failure, rejection } from '../failures.js';
import { backends } from '../ops/backends.js';
import { type Anything, setUp } from './set_up.js';

describe.each(backends)('arguments on %s', async (backend) => {
  const { context, f32 } = await setUp(backend);

  const logits = () => context.tensor('f32', [1, 4], Float32Array.of(1, 4, 3, 2));
  const ids = async (gate: { ids: Tensor<'i32'> }) => [...(await gate.ids.read())];

  /** An object whose property gives the next of `answers` at every look. */
  const changing = (rest: object, name: string, ...answers: unknown[]): Anything => {
    let looks = 0;
    const get = () => answers[Math.min(looks++, answers.length - 1)];
    return Object.defineProperty({ ...rest }, name, { get, enumerable: true });
  };

  it('reads every input and option once, and works with the first answer', async () => {
    const inputs = changing({}, 'logits', logits(), f32(1, 1), undefined);
    const options = changing({}, 'topK', 2, 1000, Number.NaN);
    expect(await ids(moeFusedGate(inputs, options))).toEqual([1, 2]);
    const valid = changing({ logits: logits() }, 'validTokens', 1, 1e9);
    expect(await ids(moeFusedGate(valid, { topK: 2 }))).toEqual([1, 2]);
    const layout = changing({ hidden: 2, intermediate: 2, dtype: 'f32' }, 'slots', 1, 2 ** 40);
    expect(allocateExperts(context, layout).slots).toBe(1);
    const opened = await createContext(changing({ backend }, 'threads', 1, -7));
    await opened.close();
    const [w13, w2] = [f32(1, 4, 2), f32(1, 2, 2)];
    for (const given of [
      changing({ w2 }, 'w13', w13, f32(9, 9, 9)),
      changing({ w13 }, 'w2', w2, f32(9, 9, 9)),
      changing({ w13, w2 }, 'b2', undefined, f32(9, 9)),
    ]) {
      expect(String(packExperts(given))).toBe('experts f32[1, 2, 2]');
    }
    const swiglu = changing({}, 'alpha', 2, 1e300);
    expect(packExperts({ w13, w2 }, { swiglu }).swiglu.alpha).toBe(2);
  });

  it('lets what a getter throws through, and holds nothing', async () => {
    const thrower = (name: string, rest: object = {}): Anything =>
      Object.defineProperty({ ...rest }, name, {
        enumerable: true,
        get: () => {
          throw new RangeError('mine');
        },
      });
    const input = logits();
    const [w13, w2] = [f32(1, 4, 2), f32(1, 2, 2)];
    const before = context.memory().used;
    for (const call of [
      () => moeFusedGate(thrower('logits'), { topK: 1 }),
      () => moeFusedGate({ logits: input }, thrower('topK')),
      () => packExperts(thrower('w13', { w2 })),
      () => packExperts({ w13, w2 }, thrower('swiglu')),
      () => packExperts({ w13, w2 }, { swiglu: thrower('alpha') }),
      () => context.tensor('f32', thrower('0', [1])),
      () => context.capture(() => moeFusedGate({ logits: input }, thrower('topK'))),
      () => context.capture(() => thrower('then', { x: f32(8) })),
    ]) {
      expect(call).toThrow(/mine|expected shape/);
    }
    await expect(createContext(thrower('backend'))).rejects.toThrow('mine');
    await expect(input.read(thrower('signal'))).rejects.toThrow('mine');
    expect(context.memory().used).toBe(before);
    expect((await input.read()).length).toBe(4);
  });

  it('a getter may dispose, write, call ops and close other contexts', async () => {
    const other = await createContext({ backend });
    const [hidden, weight] = [f32(2, 3), f32(4, 3)];
    const meddling = {
      get hidden() {
        hidden.dispose();
        return hidden;
      },
      get weight() {
        void other.close();
        moeRouter({ hidden: f32(1, 3), weight }).dispose();
        return weight;
      },
    };
    expect(failure(() => moeRouter(meddling))).toMatchObject({ code: 'ERR_MOE_DISPOSED', arg: 'hidden' });
    const closing = {
      hidden: weight,
      get weight() {
        return other.state === 'closed' ? weight : f32(1, 3);
      },
    };
    expect((await moeRouter(closing).read()).length).toBe(16);
  });

  it('a getter that closes the context of its call makes the call refuse, naming it', async () => {
    const closing =
      (name: string, value: unknown, rest: object = {}) =>
      (own: Context) =>
        Object.defineProperty({ ...rest }, name, {
          enumerable: true,
          get: () => {
            void own.close();
            return value;
          },
        }) as Anything;
    const closingList = (own: Context): Anything =>
      new Proxy([1, 1], {
        get: (list, name) => {
          if (name === '0') void own.close();
          return Reflect.get(list, name);
        },
      });
    const calls: [string, (own: Context, x: Tensor<'f32'>) => unknown][] = [
      ['moe_fused_gate', (own, x) => moeFusedGate({ logits: x }, closing('topK', 2)(own))],
      [
        'moe_fused_gate',
        (own, x) => moeFusedGate(closing('validTokens', 1, { logits: x })(own), { topK: 2 }),
      ],
      ['moe_router', (own, x) => moeRouter(closing('weight', x, { hidden: x })(own))],
      ['tensor', (own) => own.tensor('f32', closingList(own))],
      ['read', (own, x) => x.read(closing('signal', undefined)(own))],
      ['synchronize', (own) => own.synchronize(closing('signal', undefined)(own))],
      [
        'allocate_experts',
        (own) => allocateExperts(own, closing('slots', 1, { hidden: 2, intermediate: 2, dtype: 'f32' })(own)),
      ],
    ];
    for (const [op, call] of calls) {
      const own = await createContext({ backend });
      const x = own.tensor('f32', [1, 4]);
      const error = await rejection(async () => call(own, x));
      expect({ op: error.op, code: error.code, message: error.message }).toEqual({
        op,
        code: 'ERR_MOE_DISPOSED',
        message: `[${op}] expected an open context but ${own} is closed`,
      });
    }
  });

  it('takes frozen, sealed, inherited and null-prototype arguments, and proxies of them', async () => {
    const input = logits();
    for (const wrap of [
      Object.freeze,
      Object.seal,
      (x: object) => Object.create(x),
      (x: object) => Object.assign(Object.create(null), x),
      (x: object) => new Proxy(x, {}),
      (x: object) => Object.freeze(new Proxy(Object.freeze(x), {})),
    ] as ((x: Anything) => Anything)[]) {
      const gate = moeFusedGate(wrap({ logits: input }), wrap({ topK: 2, renormalize: true }));
      expect(await ids(gate)).toEqual([1, 2]);
      Object.freeze(gate);
      gate.ids.dispose();
    }
    const frozen = Object.freeze({ w13: f32(1, 4, 2), w2: f32(1, 2, 2) });
    const experts = packExperts(frozen, Object.freeze({ swiglu: Object.freeze({ limit: 1 }) }));
    expect(experts.swiglu.limit).toBe(1);
  });

  it('a revoked or throwing proxy throws and breaks nothing', async () => {
    const { proxy, revoke } = Proxy.revocable({ topK: 1 }, {});
    revoke();
    expect(() => moeFusedGate({ logits: logits() }, proxy)).toThrow(TypeError);
    expect(() => moeFusedGate(proxy as Anything, { topK: 1 })).toThrow(TypeError);
    expect(() => context.tensor('f32', [2], proxy as Anything)).toThrow();
    expect(await ids(moeFusedGate({ logits: logits() }, { topK: 1 }))).toEqual([1]);
  });

  it('is not taken in by what only looks like a tensor, weights or a context', () => {
    const tensor = f32(2, 3);
    const experts = allocateExperts(context, { slots: 1, hidden: 3, intermediate: 2, dtype: 'f32' });
    const looks = (real: object): Anything[] => [
      new Proxy(real, {}),
      Object.create(real),
      { ...real },
      Object.setPrototypeOf({ ...real }, Object.getPrototypeOf(real)),
      structuredClone({ shape: [2, 3], dtype: 'f32' }),
    ];
    for (const fake of looks(tensor)) {
      expect(fake instanceof Tensor).toBe(false);
      const error = failure(() => moeRouter({ hidden: fake, weight: tensor }));
      expect(error).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', arg: 'hidden' });
      expect(error.message).toMatch(/received an object that this copy of moe-kernels did not make/);
      expect(failure(() => packExperts({ w13: fake, w2: fake }))).toMatchObject({ arg: 'w13' });
    }
    for (const fake of looks(experts)) {
      expect(fake instanceof ExpertWeights).toBe(false);
      const call = () =>
        fusedMoe({ hidden: tensor, ids: context.tensor('i32', [2, 1]), weights: f32(2, 1), experts: fake });
      expect(failure(call)).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', arg: 'experts' });
      const into = () => packExperts({ w13: f32(1, 4, 3), w2: f32(1, 3, 2) }, { into: fake });
      expect(failure(into)).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', arg: 'into' });
    }
    for (const fake of looks(context)) {
      expect(fake instanceof Context).toBe(false);
      const call = () => allocateExperts(fake, { slots: 1, hidden: 3, intermediate: 2, dtype: 'f32' });
      expect(failure(call)).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', arg: 'context' });
    }
  });

  it('methods refuse a receiver of another kind', async () => {
    const tensor = f32(2);
    for (const name of ['write', 'readSync', 'dispose', 'to', 'read'] as const) {
      for (const receiver of [{}, new Proxy(tensor, {}), Object.create(tensor)]) {
        // A property of the class is reached through the receiver, so some of these fail only when awaited
        const call = async () => (Tensor.prototype as Anything)[name].call(receiver, Float32Array.of(1, 2));
        await expect(call(), name).rejects.toThrow();
      }
    }
    expect([...(await tensor.read())]).toEqual([0, 0]);
  });

  it('nobody makes tensors, weights, contexts or captures by hand', () => {
    for (const Made of [Tensor, ExpertWeights, Context, Capture] as Anything[]) {
      for (const secret of [undefined, Symbol('moe-kernels construction'), {}]) {
        expect(failure(() => new Made(secret, context, 'f32', [1], 0))).toMatchObject({
          code: 'ERR_MOE_INVALID_ARG',
        });
      }
    }
  });

  it('tensors moved to a disposed, closed or made-up context are refused', async () => {
    const tensor = f32(2);
    const other = await createContext({ backend });
    await other.close();
    expect(await rejection(() => tensor.to(other))).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    for (const fake of [undefined, null, 1, {}, new Proxy(context, {}), 'cpu'] as Anything[]) {
      expect(await rejection(() => tensor.to(fake))).toMatchObject({ arg: 'context' });
    }
  });

  it('an op stands for itself only with its own arguments', () => {
    for (const junk of [undefined, null, 0, '', 'x', Symbol.iterator, 1n, [], () => {}, new Map(), /x/]) {
      for (const op of [moeRouter, moeFusedGate, moeDispatch, fusedMoe, packExperts] as Anything[]) {
        expect(() => op(junk, junk)).toThrow(MoeError);
      }
    }
  });
});
