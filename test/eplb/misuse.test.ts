// The planning API called from JavaScript with what its types forbid: every call is refused in words.
import { describe, expect, it } from 'vitest';
import {
  bytesToMove,
  checkPlannable,
  countMoves,
  deviceLoads,
  dispatchFigures,
  dispatchRounds,
  dispatchShares,
  formatExpertMap,
  formatNpy,
  gatherHeat,
  generateTrace,
  groupCounts,
  keepSlots,
  Loads,
  linearPlacement,
  log2phy,
  log2phyAll,
  log2phyCandidates,
  MoeError,
  mixedPlacement,
  movesPerLayer,
  Placement,
  Planner,
  parByStep,
  parseExpertMap,
  parseLoads,
  parseNpy,
  peakToAverage,
  planExperts,
  planReport,
  planSync,
  RankHeat,
  readExpertMap,
  readLoads,
  redundantPlacement,
  replicaCounts,
  roundRobinPlacement,
  serveTrace,
  sharedDeviceLoads,
  simulate,
  simulationReport,
  startPlacements,
  stepPar,
  transferSchedule,
  windowPar,
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
    ['windows of nothing', () => loads.windows(0), 'received 0'],
    ['shared experts of no router', () => loads.withShared(1, 0), 'topK to be an integer >= 1'],
    ['fewer than no shared experts', () => loads.withShared(-1, 8), 'shared to be an integer >= 1'],
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
    ['one of none', () => simulate(loads, { ...shape, policies: [] }), 'policies to be at least one name'],
    ['one of another', () => simulate(loads, { ...shape, policies: [3] as Anything }), 'but received 3'],
    [
      'a budget that only later plans would look at',
      () => simulate(loads, { ...shape, policies: ['linear'], maxMoves: -1 }),
      'maxMoves to be an integer >= 0 but received -1',
    ],
    ['a trace that is none', () => simulate([] as Anything, shape), 'trace to be a Loads'],
    ['a server without options', () => serveTrace(loads, undefined as Anything), 'options to be an object'],
  ])('refuses %s', async (_, call, message) => {
    await expect(call()).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      message: expect.stringContaining(message),
    });
  });

  const given: readonly Anything[] = [
    undefined,
    null,
    Number.NaN,
    -1,
    1.5,
    'x',
    {},
    [],
    Symbol('s'),
    3n,
    2 ** 53,
  ];
  const planning: Record<string, Anything> = {
    bytesToMove,
    checkPlannable,
    countMoves,
    deviceLoads,
    dispatchFigures,
    dispatchRounds,
    dispatchShares,
    formatExpertMap,
    formatNpy,
    gatherHeat,
    generateTrace,
    groupCounts,
    keepSlots,
    linearPlacement,
    log2phy,
    log2phyAll,
    log2phyCandidates,
    mixedPlacement,
    movesPerLayer,
    parByStep,
    parseExpertMap,
    parseLoads,
    parseNpy,
    peakToAverage,
    planExperts,
    planReport,
    planSync,
    readExpertMap,
    readLoads,
    redundantPlacement,
    replicaCounts,
    roundRobinPlacement,
    serveTrace,
    sharedDeviceLoads,
    simulate,
    simulationReport,
    startPlacements,
    stepPar,
    transferSchedule,
    windowPar,
  };
  it.each(Object.keys(planning))(
    '%s gives an error of this package, or a result, for whatever comes first',
    async (name) => {
      for (const value of given)
        try {
          await planning[name](value);
        } catch (error) {
          expect(error, `${name}(${typeof value})`).toBeInstanceOf(MoeError);
          expect((error as MoeError).code).not.toBe('ERR_MOE_INTERNAL');
        }
    },
  );

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
