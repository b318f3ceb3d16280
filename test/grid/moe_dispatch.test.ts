import { beforeAll, describe, it } from 'vitest';
import { type Context, type MoeDispatchOptions, moeDispatch } from '../../lib/index.js';
import { type RoutingKind, routing } from '../cases/experts.js';
import { Random } from '../cases/random.js';
import { contextOf } from '../ops/backends.js';
import { expectSameBits, gridTokens, natives, outputsOf, referenceOf } from './sizes.js';

const kinds: RoutingKind[] = ['uniform', 'skewed', 'one', 'none', 'holes'];

describe.each(natives)('moe_dispatch on %s', (backend) => {
  let context: Context;
  let oracle: Context;
  beforeAll(async () => {
    [context, oracle] = await Promise.all([contextOf(backend), referenceOf('oracle')]);
  });

  /** Integers and copied rows: every bit counts, twice. */
  async function check(
    ids: Int32Array,
    columns: number,
    options: MoeDispatchOptions,
    hidden = 0,
  ): Promise<void> {
    const tokens = ids.length / columns;
    const build = (c: Context) => ({
      ...moeDispatch(
        {
          ids: c.tensor('i32', [tokens, columns], ids),
          ...(hidden === 0
            ? {}
            : {
                hidden: c.tensor(
                  'bf16',
                  [tokens, hidden],
                  Uint16Array.from({ length: tokens * hidden }, (_, i) => (i * 31) & 0x7f7f),
                ),
              }),
        },
        options,
      ),
    });
    const label = `${tokens} tokens, ${columns} columns, ${hidden} wide, ${JSON.stringify(options)}`;
    const actual = await outputsOf(context, build);
    expectSameBits(actual, await outputsOf(oracle, build), label);
    expectSameBits(await outputsOf(context, build), actual, `a second run of ${label}`);
  }

  describe.each(kinds)('%s routing', (kind) => {
    it.each(gridTokens)('%i tokens', async (tokens) => {
      for (const [experts, columns] of [
        [257, 9],
        [60, 4],
      ]) {
        const { ids } = routing(kind, tokens, columns, experts, new Random(tokens + experts));
        for (const options of [
          { experts },
          { experts, blockSize: 128 },
          { experts: 32, firstExpert: 16, blockSize: 12 },
        ]) {
          await check(ids, columns, options);
        }
      }
    });
  });

  it.each([512, 513, 4097, 40000])('%i tokens of 32 columns, all of one expert', async (tokens) => {
    await check(new Int32Array(32 * tokens).fill(3), 32, { experts: 8, blockSize: 64 });
  });

  it.each([511, 4097, 40000])('gathers the rows of %i tokens', async (tokens) => {
    for (const hidden of tokens === 40000 ? [8] : [8, 7, 136]) {
      const { ids } = routing('holes', tokens, 4, 60, new Random(tokens));
      await check(ids, 4, { experts: 60 }, hidden);
      await check(ids, 4, { experts: 60, blockSize: 16 }, hidden);
    }
  });

  it('more experts than shared memory counts', async () => {
    const { ids } = routing('skewed', 4097, 3, 3000, new Random(2));
    await check(ids, 3, { experts: 3000, blockSize: 2 });
  });
});
