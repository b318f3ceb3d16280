// The planning API called from JavaScript with what its types forbid: every call is refused in words.
import { describe, expect, it } from 'vitest';
import {
  dispatchRounds,
  dispatchShares,
  formatExpertMap,
  formatNpy,
  gatherHeat,
  generateTrace,
  groupCounts,
  Loads,
  log2phy,
  mixedPlacement,
  Placement,
  Planner,
  planSync,
  RankHeat,
  readLoads,
  serveTrace,
  simulate,
  stepPar,
  transferSchedule,
} from '../../lib/index.js';

// biome-ignore lint/suspicious/noExplicitAny: what types forbid is the point
type Anything = any;

const placement = Placement.fromRows([
  [0, 1, 2],
  [2, 3, 0],
]);
const loads = new Loads({ steps: 2, layers: 1, experts: 4 }, [5, 1, 2, 7, 1, 3, 4, 1]);
const shape: Anything = { devices: 2, slots: 3, window: 1 };
const plan = (fields: Anything) => () => planSync({ loads, devices: 2, slots: 3, ...fields });
const trace = (options: Anything) => () =>
  generateTrace({ kind: 'steady', steps: 1, layers: 1, experts: 4, seed: 1, ...options });
const transfers = (options: Anything) => () => transferSchedule(placement, placement, options);
const { shares } = dispatchShares(placement, [5, 2, 3, 4]);
const served = (options: Anything) => () =>
  serveTrace(loads, { devices: 2, slots: 3, collect: 1, plan: 1, layersPerStep: 1, ...options });
const other = Placement.fromRows([[0, 1, 2, 3]]);

describe('the planning API', () => {
  it.each<[name: string, call: () => unknown, message: string]>([
    ['a map format that is none', () => formatExpertMap([placement], 'onnx' as Anything), 'format: one of'],
    ['rows without slots', () => Placement.fromRows([[], []]), 'at least one slot'],
    ['half an expert', () => Placement.fromRows([[0, 1]], { experts: 1.5 }), 'received 1.5'],
    ['no number of experts', () => Placement.fromRows([[0, 1]], { experts: Number.NaN }), 'received NaN'],
    [
      'copies that are neither',
      () => mixedPlacement({ routed: 8, shared: 1, devices: 4, copies: 'all' as Anything }),
      "copies to be one of everyDevice, onePerDevice but received 'all'",
    ],
    [
      'a preference that is none',
      () => log2phy(placement, 0, { prefer: 'near' as Anything }),
      'prefer to be',
    ],
    ['a layer beyond the last', () => loads.total(1), 'layer to be an integer in 0..0 but received 1'],
    ['a step beyond the last', () => loads.at(2, 0), 'step to be an integer in 0..1'],
    ['the tokens of a layer beyond the last', () => loads.tokens(0, 9), 'layer to be an integer in 0..'],
    ['windows of nothing', () => loads.windows(0), 'received 0'],
    ['shared experts of no router', () => loads.withShared(1, 0), 'topK to be an integer >= 1'],
    ['fewer than no shared experts', () => loads.withShared(-1, 8), 'shared to be an integer >= 1'],
    ['no request', () => planSync(null as Anything), 'request: an object but received null'],
    ['a misspelt budget', plan({ maxMove: 3 }), "unknown field 'maxMove'; the fields are: loads, devices"],
    ['a placement of shared experts', plan({ sharedPlacement: 'all' }), 'sharedPlacement to be one of'],
    ['a way with degenerate layers', plan({ degenerate: 'drop' }), 'degenerate to be one of reject, keep'],
    [
      'a planner with an option of its plans',
      () => new Planner({ signal: AbortSignal.abort() } as Anything),
      "unknown option 'signal'; the options are: thread",
    ],
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
      'placements of fewer experts than there are loads of',
      () => stepPar(loads, [Placement.fromRows([[0, 1, 2]])]),
      'layer 0: expected a placement of 4 experts but received 3',
    ],
    ['a group list of another kind', () => groupCounts([1, 2], 'ends' as Anything), "received 'ends'"],
    ['heat of no list', () => new RankHeat(2).record(null as Anything, 'counts'), 'groupList to be an array'],
    ['heat that is none', () => gatherHeat([[{} as Anything]]), 'heat[0][0] to be a RankHeat'],
    [
      'a skew that is no number',
      trace({ skew: Number.NaN }),
      'skew to be a finite number >= 0 but received NaN',
    ],
    ['more than all correlation', trace({ groupCorrelation: 2 }), 'groupCorrelation to be a number in 0..1'],
    ['a misspelt option of a trace', trace({ drift: 5 }), "unknown option 'drift'"],
    ['no devices in a node', transfers({ devicesPerNode: 0 }), 'devicesPerNode to be an integer >= 1'],
    ['a node of no number', transfers({ devicesPerNode: Number.NaN }), 'received NaN'],
    [
      'a count in words',
      () => new Loads({ steps: 1, layers: 1, experts: 2 }, ['1', 2] as Anything),
      "received '1'",
    ],
    ['data that does not fill its shape', () => formatNpy([2, 2], new Float64Array(3)), 'received 3 values'],
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

  it.each<[name: string, call: () => Promise<unknown>, message: string]>([
    [
      'a simulation without policies',
      () => simulate(loads, shape),
      'policies to be an array but received undefined',
    ],
    [
      'a thread for a planner that has one',
      () => new Planner().plan({ loads, devices: 2, slots: 3 }, { thread: 'main' } as Anything),
      "unknown option 'thread'; the options are: signal, onProgress",
    ],
    ['one of none', () => simulate(loads, { ...shape, policies: [] }), 'policies to be at least one name'],
    ['one of another', () => simulate(loads, { ...shape, policies: [3] as Anything }), 'but received 3'],
    [
      'a budget that only later plans would look at',
      () => simulate(loads, { ...shape, policies: ['linear'], maxMoves: -1 }),
      'maxMoves to be an integer >= 0 but received -1',
    ],
    ['a trace that is none', () => simulate([] as Anything, shape), 'trace to be a Loads'],
    ['a server without options', () => serveTrace(loads, undefined as Anything), 'options to be an object'],
    [
      'a misspelt option of a simulation',
      () => simulate(loads, { ...shape, policies: ['linear'], budgetFrist: true } as Anything),
      "unknown option 'budgetFrist'; the options are: devices, slots",
    ],
    [
      'one policy for a simulation of several',
      () => simulate(loads, { ...shape, policies: ['linear'], policy: 'greedy' } as Anything),
      "unknown option 'policy'",
    ],
    ['a misspelt option of a server', served({ layersPerSteps: 2 }), "unknown option 'layersPerSteps'"],
    [
      'a budget of a server whose trace ends before the first plan',
      served({ collect: 9, maxMoves: Number.NaN }),
      'maxMoves to be an integer >= 0 but received NaN',
    ],
    ['start placements of another shape', served({ current: [other] }), 'with 2 devices but received 1'],
  ])('refuses %s', async (_, call, message) => {
    await expect(call()).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      message: expect.stringContaining(message),
    });
  });

  const answers: [name: string, answer: (plan: Anything) => unknown, message: string][] = [
    ['nothing', () => undefined, 'planner() to be an object but received undefined'],
    ['nothing, later', async () => null, 'planner() to be an object but received null'],
    ['no placements', () => ({}), 'planner().placements to be an array but received undefined'],
    [
      'placements of no layer',
      (plan) => ({ ...plan, placements: [] }),
      'planner().placements to be a placement for each of 1 layers but received an array of 0',
    ],
    [
      'maps instead of placements',
      (plan) => ({ ...plan, placements: [[0, 1, 2]] }),
      'planner().placements[0] to be a Placement but received an array of 3',
    ],
    [
      'a placement for other devices',
      (plan) => ({ ...plan, placements: [other] }),
      'planner().placements[0] to hold 4 experts on 2 devices x 3 slots but received 4 experts on 1 devices x 4 slots',
    ],
    ['no time', (plan) => ({ ...plan, ms: Number.NaN }), 'planner().ms to be a finite number >= 0'],
    ['no moves', (plan) => ({ ...plan, moves: undefined }), 'planner().moves to be an integer >= 0'],
    [
      'moves of no layer',
      (plan) => ({ ...plan, movesPerLayer: new Int32Array(2) }),
      'planner().movesPerLayer to be an Int32Array of 1 but received Int32Array(8 bytes)',
    ],
    ['half a PAR', (plan) => ({ ...plan, par: {} }), 'planner().par.after to be an object'],
    [
      'a PAR that is none',
      (plan) => ({ ...plan, parStep: { after: { mean: Number.NaN } } }),
      'planner().parStep.after.mean to be a finite number >= 0 but received NaN',
    ],
  ];
  it.each(answers)('refuses a planner that gives %s', async (_, answer, message) => {
    const planner: Anything = (request: Anything) => answer(planSync(request));
    const calls = {
      simulate: () => simulate(loads, { ...shape, policies: ['linear'], planner }),
      serve: served({ planner }),
    };
    for (const [op, call] of Object.entries(calls))
      await expect(call()).rejects.toMatchObject({
        code: 'ERR_MOE_INVALID_ARG',
        op,
        arg: message.split(' ')[0],
        message: expect.stringContaining(`[${op}] expected ${message}`),
      });
  });

  it('hands on what a planner throws', async () => {
    const planner = () => Promise.reject(new RangeError('on purpose'));
    await expect(simulate(loads, { ...shape, policies: ['linear'], planner })).rejects.toThrow(RangeError);
    await expect(served({ planner })()).rejects.toThrow(RangeError);
  });

  it('refuses a file that is no path', async () => {
    await expect(readLoads(new URL('file:///loads.npy') as Anything)).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      message: expect.stringContaining('file to be a path'),
    });
  });

  it('takes counts as `load` of moeFusedGate reads, for shares too', () => {
    const counts = [5, 2, 3, 4];
    const read = BigInt64Array.from(counts.map(BigInt));
    expect(dispatchShares(placement, read)).toEqual(dispatchShares(placement, counts));
  });
});
