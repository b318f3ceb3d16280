// context.overlap: two sequences of work beside each other give what they give one after the other, memory that one of
// them gives back is not handed to the other, and nothing can be awaited inside.
import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, fusedMoe, type MoeError, moeFusedGate, sharedExperts } from '../../lib/index.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from '../ops/backends.js';
import { packCase } from '../ops/packed.js';

const [tokens, hidden, intermediate, experts] = [40, 64, 32, 6];

describe.each(backends)('overlap on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  function inputs(seed: number) {
    const random = new Random(seed);
    const tensor = (...shape: number[]) =>
      context.tensor('f32', shape, random.normals(shape.reduce((a, b) => a * b)));
    return {
      x: tensor(tokens, hidden),
      logits: tensor(tokens, experts),
      routed: packCase(context, { slots: experts, hidden, intermediate, seed }),
      shared: packCase(context, { slots: 1, hidden, intermediate: 2 * intermediate, seed }),
    };
  }

  /** A layer with separate shared experts whose temporaries go as soon as they have been used. */
  function layer({ x, logits, routed, shared }: ReturnType<typeof inputs>, overlapped: boolean) {
    const up = () => sharedExperts({ hidden: x, experts: shared }, { part: 'gateUp' });
    const main = () => {
      const { ids, weights } = moeFusedGate({ logits }, { topK: 2 });
      const output = fusedMoe({ hidden: x, ids, weights, experts: routed });
      ids.dispose();
      weights.dispose();
      return output;
    };
    const [projected, sum] = overlapped ? context.overlap(up, main) : [up(), main()];
    const result = sharedExperts({ hidden: x, experts: shared, projected, routed: sum }, { part: 'down' });
    projected.dispose();
    sum.dispose();
    return result;
  }

  it('gives the same bits as one after the other, many times over', async () => {
    const given = inputs(1);
    const expected = await layer(given, false).read();
    for (let round = 0; round < 50; round++) {
      using result = layer(given, true);
      if (round % 10 === 9) expect(await result.read()).toEqual(expected);
    }
  });

  it('can be captured and replayed', async () => {
    const given = inputs(2);
    const expected = await layer(given, false).read();
    using capture = context.capture(() => layer(given, true));
    for (let round = 0; round < 3; round++) {
      capture.replay();
      expect(await capture.output.read()).toEqual(expected);
    }
    const other = inputs(3);
    given.x.write(await other.x.read());
    const changed = await layer(given, false).read();
    expect(changed).not.toEqual(expected);
    capture.replay();
    expect(await capture.output.read()).toEqual(changed);
  });

  it('keeps memory that is given back inside out of use until both are done', async () => {
    const { x, shared } = inputs(4);
    const states = await x.read();
    const noise = new Random(9).normals(tokens * hidden);
    const expected = await sharedExperts({ hidden: x, experts: shared }).read();
    const [result] = context.overlap(
      () => {
        using copy = context.tensor('f32', [tokens, hidden], states);
        return sharedExperts({ hidden: copy, experts: shared });
      },
      () => {
        for (let i = 0; i < 8; i++) context.tensor('f32', [tokens, hidden], noise).dispose();
      },
    );
    expect(await result.read()).toEqual(expected);
  });

  it('refuses what waits, another overlap, captures and async functions', async () => {
    const { x } = inputs(5);
    const nothing = () => undefined;
    const bad: [string, () => unknown][] = [
      ['read', () => x.read()],
      ['readSync', () => x.readSync()],
      ['synchronize', () => context.synchronize()],
      ['synchronizeSync', () => context.synchronizeSync()],
      ['overlap', () => context.overlap(nothing, nothing)],
      ['capture', () => context.capture(nothing)],
      ['close', () => context.close()],
      ['overlap', async () => 1],
    ];
    for (const [op, work] of bad) {
      const refusal = expect.objectContaining<Partial<MoeError>>({ code: 'ERR_MOE_CAPTURE', op });
      expect(() => context.overlap(work, nothing), `${op} beside`).toThrow(refusal);
      expect(() => context.overlap(nothing, work), `${op} in main`).toThrow(refusal);
    }
    for (const wrong of [undefined, 1, 'f', {}]) {
      expect(() => context.overlap(wrong as never, nothing)).toThrow(
        /expected beside: a function but received/,
      );
      expect(() => context.overlap(nothing, wrong as never)).toThrow(
        /expected main: a function but received/,
      );
    }
    expect(await x.read()).toHaveLength(tokens * hidden);
  });

  it('joins when a function throws', async () => {
    const given = inputs(6);
    const failing = () => {
      throw new Error('mine');
    };
    expect(() => context.overlap(failing, () => layer(given, false))).toThrow('mine');
    expect(() => context.overlap(() => layer(given, false), failing)).toThrow('mine');
    expect(await layer(given, true).read()).toEqual(await layer(given, false).read());
  });
});
