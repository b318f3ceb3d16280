import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { dispatchFigures } from '../../lib/eplb/dispatch_figures.js';
import { dispatchRounds } from '../../lib/eplb/dispatch_rounds.js';
import { dispatchShares, sharedDeviceLoads } from '../../lib/eplb/dispatch_shares.js';
import { Loads } from '../../lib/eplb/loads.js';
import { deviceLoads, peakToAverage, stepPar, windowPar } from '../../lib/eplb/metrics.js';
import { planSync } from '../../lib/eplb/plan.js';
import { uniform } from '../../lib/eplb/random.js';
import { generateTrace, traceKinds } from '../../lib/eplb/trace.js';
import { transferSchedule } from '../../lib/eplb/transfer.js';
import { countMoves } from '../../lib/placement/align.js';
import { Placement } from '../../lib/placement/placement.js';

/** A random legal placement: replicas handed out in turn from a random start. */
const randomPlacement = (devices: number, slots: number, experts: number, random: () => number) => {
  const replicas = new Array<number>(experts).fill(1);
  for (let extra = devices * slots - experts; extra > 0; ) {
    const expert = Math.floor(random() * experts);
    if (replicas[expert]! < devices) {
      replicas[expert]!++;
      extra--;
    }
  }
  const names = Array.from({ length: experts }, (_, expert) => expert).sort(() => random() - 0.5);
  const flat = names.flatMap((expert) => new Array<number>(replicas[expert]!).fill(expert));
  const rows: number[][] = Array.from({ length: devices }, () => []);
  for (const [index, expert] of flat.entries()) rows[index % devices]!.push(expert);
  return Placement.fromRows(rows, { experts });
};

const sizes = fc.record({
  devices: fc.integer({ min: 2, max: 8 }),
  slots: fc.integer({ min: 1, max: 6 }),
  seed: fc.integer({ min: 0, max: 1e6 }),
});

describe('metrics', () => {
  it('agree with a count slot by slot', () => {
    fc.assert(
      fc.property(sizes, ({ devices, slots, seed }) => {
        const random = uniform(seed);
        const experts = slots + Math.floor(random() * (devices * slots - slots + 1));
        const placement = randomPlacement(devices, slots, experts, random);
        const trace = new Loads(
          { steps: 3, layers: 1, experts },
          Float64Array.from({ length: 3 * experts }, () => Math.floor(100 * random())),
        );
        const byHand = (counts: ArrayLike<number>) => {
          const rows = placement.toRows();
          const copies = (expert: number) => rows.flat().filter((id) => id === expert).length;
          const perDevice = rows.map((row) =>
            row.reduce((sum, expert) => sum + counts[expert]! / copies(expert), 0),
          );
          const total = perDevice.reduce((sum, value) => sum + value, 0);
          expect(total).toBeCloseTo(
            Array.from(counts).reduce((sum, value) => sum + value, 0),
            6,
          );
          return total === 0 ? 1 : (Math.max(...perDevice) / total) * devices;
        };
        expect(windowPar(trace, [placement]).mean).toBeCloseTo(byHand(trace.total(0)), 9);
        const steps = [0, 1, 2].map((step) => byHand(trace.at(step, 0)));
        expect(stepPar(trace, [placement]).mean).toBeCloseTo((steps[0]! + steps[1]! + steps[2]!) / 3, 9);
      }),
    );
  });

  it('call no load balanced', () => {
    expect(peakToAverage([0, 0])).toBe(1);
    expect(peakToAverage([3, 1])).toBe(1.5);
  });
});

describe('transfer schedule', () => {
  it('moves exactly what is missing, from holders, without hot senders or clashes in a round', () => {
    fc.assert(
      fc.property(sizes, ({ devices, slots, seed }) => {
        const random = uniform(seed + 1);
        const experts = slots + Math.floor(random() * (devices * slots - slots + 1));
        const from = randomPlacement(devices, slots, experts, random);
        const to = randomPlacement(devices, slots, experts, random);
        const transfers = transferSchedule(from, to);
        expect(transfers.length).toBe(countMoves(from, to));
        const sends = new Array<number>(devices).fill(0);
        const receives = new Array<number>(devices).fill(0);
        const busy = new Set<string>();
        for (const transfer of transfers) {
          expect(from.globalOf(transfer.from, transfer.fromSlot)).toBe(transfer.expert);
          expect(to.globalOf(transfer.to, transfer.toSlot)).toBe(transfer.expert);
          expect(from.has(transfer.to, transfer.expert)).toBe(false);
          for (const key of [`s${transfer.from}.${transfer.round}`, `r${transfer.to}.${transfer.round}`]) {
            expect(busy.has(key)).toBe(false);
            busy.add(key);
          }
          sends[transfer.from]!++;
          receives[transfer.to]!++;
        }
        // Koenig: as many rounds as the busiest device needs
        const rounds = transfers.reduce((most, { round }) => Math.max(most, round + 1), 0);
        expect(rounds).toBe(Math.max(...sends, ...receives));
        // No choice of senders has a less loaded hottest sender: check by matching with capacity one less
        const hottest = Math.max(...sends);
        if (hottest > 0)
          expect(
            assignable(
              transfers.map(({ expert }) => from.replicasOf(expert)),
              from,
              hottest - 1,
            ),
          ).toBe(false);
      }),
    );
  });
});

/** Whether every transfer can get a sender when each device sends at most `capacity` (augmenting paths). */
function assignable(holders: Int32Array[], from: Placement, capacity: number): boolean {
  const taken = new Map<number, number[]>();
  const find = (need: number, seen: Set<number>): boolean => {
    for (const physical of holders[need]!) {
      const device = from.deviceOfPhysical(physical);
      if (seen.has(device)) continue;
      seen.add(device);
      const list = taken.get(device) ?? [];
      if (list.length < capacity) {
        taken.set(device, [...list, need]);
        return true;
      }
      for (const other of list)
        if (find(other, seen)) {
          taken.set(device, [...taken.get(device)!.filter((one) => one !== other), need]);
          return true;
        }
    }
    return false;
  };
  return holders.every((_, need) => find(need, new Set()));
}

describe('weighted dispatch', () => {
  it('reaches a proven lower bound of the peak', () => {
    fc.assert(
      fc.property(sizes, ({ devices, slots, seed }) => {
        const random = uniform(seed + 2);
        const experts = slots + Math.floor(random() * (devices * slots - slots + 1));
        const placement = randomPlacement(devices, slots, experts, random);
        const counts = Float64Array.from({ length: experts }, () => Math.floor(1000 * random() ** 4));
        const result = dispatchShares(placement, counts);
        for (let expert = 0; expert < experts; expert++) {
          const parts = Array.from(placement.replicasOf(expert), (physical) => result.shares[physical]!);
          expect(Math.min(...parts)).toBeGreaterThanOrEqual(0);
          expect(parts.reduce((sum, part) => sum + part, 0)).toBeCloseTo(1, 9);
        }
        const loads = sharedDeviceLoads(placement, result.shares, counts);
        expect(Math.max(...loads)).toBeCloseTo(result.peak, 6);
        expect(result.peak).toBeLessThanOrEqual(Math.max(...deviceLoads(placement, counts)) + 1e-9);
        expect(result.peak).toBeLessThanOrEqual(result.bound * 1.001 + 1e-9);
      }),
    );
  });

  it('counts a device that holds an expert twice as one holder of all its tokens', () => {
    const rows = [
      [0, 0, 3],
      [1, 2, 3],
      [4, 0, 2],
    ];
    const placement = Placement.fromRows(rows, { duplicates: 'allow' });
    for (const counts of [
      [10, 1, 1, 1, 1],
      [100, 3, 4, 50, 6],
      [5, 50, 3, 2, 1],
    ]) {
      const { shares, deviceLoads: loads, peak, bound } = dispatchShares(placement, counts);
      for (let expert = 0; expert < 5; expert++) {
        const parts = Array.from(placement.replicasOf(expert), (physical) => shares[physical]!);
        expect(parts.reduce((sum, part) => sum + part, 0)).toBeCloseTo(1, 12);
      }
      expect(shares[0]).toBe(shares[1]);
      const total = counts.reduce((sum, count) => sum + count, 0);
      expect(loads.reduce((sum, load) => sum + load, 0)).toBeCloseTo(total, 9);
      expect(peak).toBeLessThanOrEqual(bound * (1 + 1e-4));
      expect(dispatchShares(placement, counts).shares).toEqual(shares);
    }
  });

  it('makes the worked example perfectly even', () => {
    const placement = Placement.fromRows([
      [0, 4],
      [0, 5],
      [0, 6],
      [1, 7],
      [1, 2],
      [1, 3],
      [0, 1],
      [0, 1],
    ]);
    const result = dispatchShares(placement, [600, 560, 120, 120, 20, 10, 10, 10], {
      tolerance: 1e-6,
      sweeps: 2000,
    });
    expect(result.peak).toBeCloseTo(181.25, 2);
  });

  it('rotates by the shares, the replica at home first', () => {
    const placement = Placement.fromRows([
      [0, 1],
      [0, 2],
      [0, 1],
    ]);
    const shares = Float64Array.of(0.5, 0.25, 0.25, 1, 0.25, 0.75);
    for (const rank of [0, 1, 2]) {
      const map = dispatchRounds(placement, shares, rank, 8);
      const count = (expert: number, physical: number) =>
        Array.from({ length: 8 }, (_, round) => map[round * 3 + expert]).filter((id) => id === physical)
          .length;
      expect([count(0, 0), count(0, 2), count(0, 4)]).toEqual([4, 2, 2]);
      expect([count(1, 1), count(1, 5)]).toEqual([2, 6]);
      expect(count(2, 3)).toBe(8);
      expect(placement.deviceOfPhysical(map[0]!)).toBe(rank);
    }
  });

  it('helps with the counts of the step itself, hardly with those of the window before', () => {
    const trace = generateTrace({
      kind: 'drifting',
      steps: 64,
      layers: 2,
      experts: 256,
      seed: 1,
      driftSteps: 60,
    });
    const before = trace.window(0, 32);
    const { placements } = planSync({ loads: before, devices: 32, slots: 9, policy: 'greedy' });
    const figures = dispatchFigures(placements, before, trace.window(32, 32));
    expect(figures.oracle - 1).toBeLessThan(0.8 * (figures.even - 1));
    expect(figures.stepOwn - 1).toBeLessThan(0.8 * (figures.stepEven - 1));
    expect(figures.causal).toBeGreaterThan(figures.oracle);
    // Shares of the window before are worth it only where that window comes again
    const same = dispatchFigures(placements, trace.window(32, 32), trace.window(32, 32));
    expect(same.use).toBe('weighted');
    expect(same.causal).toBe(same.oracle);
    expect(figures.use).toBe(figures.causal < figures.even - 0.002 ? 'weighted' : 'even');
  });
});

describe('traces', () => {
  it.each(traceKinds)('%s: seeded, whole counts, the tokens asked for', (kind) => {
    const options = { kind, steps: 40, layers: 2, experts: 64, tokens: 1000, topK: 4 } as const;
    const trace = generateTrace({ ...options, seed: 5 });
    expect(trace.counts).toEqual(generateTrace({ ...options, seed: 5 }).counts);
    expect(trace.counts).not.toEqual(generateTrace({ ...options, seed: 6 }).counts);
    expect(trace.counts.every(Number.isInteger)).toBe(true);
    const total = trace.total(0).reduce((sum, value) => sum + value, 0);
    if (kind !== 'mixed') expect(Math.abs(total / (40 * 4000) - 1)).toBeLessThan(0.02);
  });

  it('correlates the experts of a group', () => {
    const trace = generateTrace({
      kind: 'steady',
      steps: 1,
      layers: 40,
      experts: 64,
      groups: 8,
      seed: 2,
      tokens: 100000,
      groupCorrelation: 0.8,
    });
    let within = 0;
    let all = 0;
    for (let layer = 0; layer < 40; layer++) {
      const logs = Array.from(trace.at(0, layer), (count) => Math.log(count + 1));
      const variance = (values: number[]) => {
        const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
        return values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length;
      };
      all += variance(logs);
      for (let group = 0; group < 8; group++) within += variance(logs.slice(8 * group, 8 * group + 8)) / 8;
    }
    expect(within / all).toBeLessThan(0.6);
  });
});
