import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Loads } from '../../lib/eplb/loads.js';
import { planSync, startPlacements } from '../../lib/eplb/plan.js';
import { uniform } from '../../lib/eplb/random.js';
import { policies } from '../../lib/eplb/registry.js';
import { countMoves } from '../../lib/placement/align.js';
import { Placement } from '../../lib/placement/placement.js';

const names = [...policies.keys()];

const instance = fc
  .record({
    devices: fc.integer({ min: 1, max: 9 }),
    slots: fc.integer({ min: 1, max: 7 }),
    steps: fc.integer({ min: 1, max: 9 }),
    seed: fc.integer({ min: 0, max: 1e6 }),
    skew: fc.integer({ min: 0, max: 6 }),
  })
  .map(({ devices, slots, steps, seed, skew }) => {
    const random = uniform(seed);
    const least = Math.max(2, slots);
    const experts = Math.max(
      1,
      Math.min(devices * slots, least + Math.floor(random() * (devices * slots - least + 1))),
    );
    const counts = Float64Array.from({ length: steps * 2 * experts }, () =>
      Math.floor(1000 * random() ** (1 + skew)),
    );
    return { devices, slots, experts, loads: { steps, layers: 2, experts }, counts, seed };
  })
  .filter(({ slots, experts, devices }) => slots <= experts && experts >= 2 && devices * slots >= experts);

const usable = (loads: Loads) =>
  [0, 1].every((layer) => loads.total(layer).filter((value) => value > 0).length >= 2);

describe.each(names)('%s', (policy) => {
  it('always gives a legal placement, twice the same, and counts its own moves', () => {
    fc.assert(
      fc.property(instance, ({ devices, slots, experts, loads: shape, counts }) => {
        const loads = new Loads(shape, counts);
        fc.pre(usable(loads));
        const start = startPlacements(2, experts, devices, slots);
        // Without a placement in use a policy that orders slots has nothing to keep
        const inUse = policies.get(policy)!.ordersSlots === true ? { current: start } : {};
        const request = { loads, devices, slots, policy, ...inUse };
        const plan = planSync(request);
        let moves = 0;
        for (const [layer, placement] of plan.placements.entries()) {
          const rows = placement.toRows();
          expect(rows.length).toBe(devices);
          for (const row of rows) {
            expect(row.length).toBe(slots);
            expect(new Set(row).size).toBe(slots);
          }
          expect(new Set(rows.flat()).size).toBe(experts);
          moves += countMoves(start[layer]!, placement);
          // Kept experts keep their slots
          for (const [device, row] of rows.entries())
            for (const [slot, expert] of row.entries())
              if (start[layer]!.has(device, expert)) expect(start[layer]!.slotOf(expert, device)).toBe(slot);
        }
        expect(plan.moves).toBe(moves);
        const again = planSync(request);
        expect(again.placements.every((placement, layer) => placement.equals(plan.placements[layer]!))).toBe(
          true,
        );
      }),
      { numRuns: 60 },
    );
  });

  it('keeps any budget', () => {
    fc.assert(
      fc.property(
        instance,
        fc.integer({ min: 0, max: 12 }),
        ({ devices, slots, loads: shape, counts }, maxMoves) => {
          const loads = new Loads(shape, counts);
          fc.pre(usable(loads));
          const plan = planSync({ loads, devices, slots, policy, maxMoves, maxMovesPerLayer: 5 });
          expect(plan.moves).toBeLessThanOrEqual(maxMoves);
          expect(Math.max(...plan.movesPerLayer)).toBeLessThanOrEqual(5);
        },
      ),
      { numRuns: 30 },
    );
  });

  it('keeps a replica of every pinned shared expert on every device', () => {
    const random = uniform(4);
    const loads = new Loads(
      { steps: 3, layers: 1, experts: 18 },
      Float64Array.from({ length: 54 }, () => 5 + Math.floor(90 * random())),
    );
    const plan = planSync({ loads, devices: 4, slots: 7, shared: 2, sharedPlacement: 'everyDevice', policy });
    for (const row of plan.placements[0]!.toRows()) expect(row.slice(-2)).toEqual([16, 17]);
  });
});

describe('maps that hold an expert twice on a device', () => {
  it.each(names)('are a start for %s', (policy) => {
    const random = uniform(12);
    const doubled = Placement.fromRows(
      [
        [0, 0, 1, 2],
        [3, 4, 5, 5],
        [6, 7, 8, 9],
      ],
      { duplicates: 'allow' },
    );
    // Expert 0 has more replicas than there are devices
    const crowded = Placement.fromRows(
      [
        [0, 0, 1, 2],
        [3, 0, 0, 5],
        [6, 7, 4, 0],
      ],
      { duplicates: 'allow', experts: 8 },
    );
    for (const current of [doubled, crowded])
      for (const maxMoves of [Number.POSITIVE_INFINITY, 3, 0]) {
        const loads = new Loads(
          { steps: 2, layers: 1, experts: current.experts },
          Float64Array.from({ length: 2 * current.experts }, () => 1 + Math.floor(900 * random() ** 3)),
        );
        const plan = planSync({ loads, devices: 3, slots: 4, policy, current: [current], maxMoves });
        expect(plan.moves).toBeLessThanOrEqual(maxMoves);
        if (plan.moves === 0) continue;
        for (const row of plan.placements[0]!.toRows()) expect(new Set(row).size).toBe(4);
      }
  });
});

describe('names of devices', () => {
  it('change nothing about a plan of the default policy but the names', () => {
    const random = uniform(6);
    const experts = 40;
    const popularity = Array.from({ length: experts }, () => 500 * random() ** 3);
    const counts = Float64Array.from({ length: 12 * experts }, (_, index) =>
      Math.floor(popularity[index % experts]! * (0.9 + 0.2 * random())),
    );
    const loads = new Loads({ steps: 12, layers: 1, experts }, counts);
    const [start] = startPlacements(1, experts, 8, 6);
    const rows = start!.toRows();
    const plan = planSync({ loads, devices: 8, slots: 6, current: [start!] });
    expect(plan.moves).toBeGreaterThan(0);
    for (let trial = 0; trial < 10; trial++) {
      const order = rows.map((_, device) => device).sort(() => random() - 0.5);
      const renamed = Placement.fromRows(
        order.map((device) => rows[device]!),
        { experts },
      );
      const other = planSync({ loads, devices: 8, slots: 6, current: [renamed] });
      expect(other.moves).toBe(plan.moves);
      expect(other.placements[0]!.toRows()).toEqual(
        order.map((device) => plan.placements[0]!.toRows()[device]),
      );
    }
  });
});

describe('requests that cannot be planned', () => {
  const loads = new Loads({ steps: 1, layers: 2, experts: 4 }, [1, 2, 3, 4, 4, 3, 2, 1]);
  const code = 'ERR_MOE_INVALID_ARG';
  it.each([
    [{ devices: 2, slots: 1 }, 'at least 4 slots for 4 experts but received 2 devices x 1 slots = 2'],
    [{ devices: 2, slots: 5 }, 'at most 4 slots per device'],
    [{ devices: 0, slots: 2 }, 'devices to be an integer >= 1'],
    [{ devices: 2.5, slots: 2 }, 'received 2.5'],
    [{ devices: 2, slots: 2, maxMoves: -1 }, 'maxMoves'],
    [{ devices: 2, slots: 2, policy: 'best' }, 'policy to be one of adaptive'],
    [{ devices: 2, slots: 2, nodes: 3 }, 'divide by 3 nodes'],
    [{ devices: 2, slots: 2, groups: 3 }, 'divide by groups'],
    [{ devices: 2, slots: 2, shared: 4 }, 'shared to be less than'],
    [{ devices: 2, slots: 2, current: startPlacements(1, 4, 2, 2) }, 'each of 2 layers but received 1'],
    [
      { devices: 2, slots: 3, current: startPlacements(2, 4, 2, 2) },
      'layer 0: expected a current placement with 3 slots but received 2',
    ],
    [
      {
        devices: 2,
        slots: 3,
        shared: 2,
        sharedPlacement: 'everyDevice' as const,
        loads: new Loads({ steps: 1, layers: 1, experts: 5 }, [1, 2, 3, 4, 5]),
      },
      'at least 4 slots per device',
    ],
  ])('%o', (request, message) => {
    expect(() => planSync({ loads, ...request })).toThrow(message);
    expect(() => planSync({ loads, ...request })).toThrow(expect.objectContaining({ code }));
  });

  it('refuses layers without usable load, or keeps them as they are', () => {
    const idle = new Loads({ steps: 1, layers: 3, experts: 4 }, [9, 2, 3, 4, 0, 0, 0, 0, 0, 7, 0, 0]);
    expect(() => planSync({ loads: idle, devices: 2, slots: 3 })).toThrow(
      'layer 1: expected some load but received all zero',
    );
    const single = new Loads({ steps: 1, layers: 1, experts: 4 }, [0, 7, 0, 0]);
    expect(() => planSync({ loads: single, devices: 2, slots: 3 })).toThrow(
      'layer 0: expected load on more than one expert but received all of it on expert 1',
    );
    for (const policy of names) {
      const plan = planSync({ loads: idle, devices: 2, slots: 3, policy, degenerate: 'keep' });
      const start = startPlacements(3, 4, 2, 3);
      expect(plan.placements[1]!.equals(start[1]!)).toBe(true);
      expect(plan.placements[2]!.equals(start[2]!)).toBe(true);
    }
  });
});
