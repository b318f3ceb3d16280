// The planning API called from JavaScript with what its types forbid: every call is refused in words.
import { describe, expect, it } from 'vitest';
import {
  dispatchRounds,
  dispatchShares,
  formatExpertMap,
  Loads,
  log2phy,
  mixedPlacement,
  Placement,
  Planner,
  planSync,
  readLoads,
} from '../../lib/index.js';

// biome-ignore lint/suspicious/noExplicitAny: what types forbid is the point
type Anything = any;

const placement = Placement.fromRows([
  [0, 1, 2],
  [2, 3, 0],
]);
const loads = new Loads({ steps: 2, layers: 1, experts: 4 }, [5, 1, 2, 7, 1, 3, 4, 1]);
const plan = (fields: Anything) => () => planSync({ loads, devices: 2, slots: 3, ...fields });
const { shares } = dispatchShares(placement, [5, 2, 3, 4]);

describe('the planning API', () => {
  it.each<[name: string, call: () => unknown, message: string]>([
    ['a map format that is none', () => formatExpertMap([placement], 'onnx' as Anything), 'format: one of'],
    ['rows without slots', () => Placement.fromRows([[], []]), 'at least one slot'],
    ['half an expert', () => Placement.fromRows([[0, 1]], { experts: 1.5 }), 'received 1.5'],
    ['no number of experts', () => Placement.fromRows([[0, 1]], { experts: Number.NaN }), 'received NaN'],
    [
      'copies that are neither',
      () => mixedPlacement({ routed: 8, shared: 1, devices: 4, copies: 'all' as Anything }),
      "copies to be everyDevice or onePerDevice but received 'all'",
    ],
    [
      'a preference that is none',
      () => log2phy(placement, 0, { prefer: 'near' as Anything }),
      'prefer to be',
    ],
    ['a layer beyond the last', () => loads.total(1), 'a layer in 0..0 but received 1'],
    ['a step beyond the last', () => loads.at(2, 0), 'a step in 0..1'],
    ['windows of nothing', () => loads.windows(0), 'received 0'],
    ['shared experts of no router', () => loads.withShared(1, 0), 'topK to be a positive integer'],
    ['fewer than no shared experts', () => loads.withShared(-1, 8), 'shared to be a positive integer'],
    ['no request', () => planSync(null as Anything), 'request: an object but received null'],
    ['a misspelt budget', plan({ maxMove: 3 }), "unknown field 'maxMove'; the fields are: loads, devices"],
    ['a placement of shared experts', plan({ sharedPlacement: 'all' }), 'sharedPlacement to be one of'],
    ['a way with degenerate layers', plan({ degenerate: 'drop' }), 'degenerate to be one of reject, keep'],
    ['a thread that is none', () => new Planner({ thread: 'gpu' as Anything }), "received 'gpu'"],
    ['a load that is no number', () => dispatchShares(placement, [1, Number.NaN, 1, 1]), 'for expert 1'],
    ['a negative load', () => dispatchShares(placement, [-1, 1, 1, 1]), 'for expert 0'],
    ['an infinite load', () => dispatchShares(placement, [1, 1, 1, 1 / 0]), 'for expert 3'],
    [
      'shares of another placement',
      () => dispatchRounds(placement, new Float64Array(4).fill(1), 0, 4),
      'shares of 6 physical experts but received 4',
    ],
    [
      'shares that do not share',
      () =>
        dispatchRounds(
          placement,
          shares.map((share) => share / 2),
          0,
          4,
        ),
      'sum to 1 for expert 0',
    ],
  ])('refuses %s', (_, call, message) => {
    expect(call).toThrow(
      expect.objectContaining({ code: 'ERR_MOE_INVALID_ARG', message: expect.stringContaining(message) }),
    );
  });

  it('refuses a file that is no path', async () => {
    await expect(readLoads(new URL('file:///loads.npy') as Anything)).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      message: expect.stringContaining('file: a path'),
    });
  });

  it('takes counts as `load` of moeFusedGate reads, for shares too', () => {
    const counts = [5, 2, 3, 4];
    const read = BigInt64Array.from(counts.map(BigInt));
    expect(dispatchShares(placement, read)).toEqual(dispatchShares(placement, counts));
  });
});
