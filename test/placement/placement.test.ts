import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { countMoves, keepSlots } from '../../lib/placement/align.js';
import { log2phy, log2phyAll, log2phyCandidates, replicaCounts } from '../../lib/placement/log2phy.js';
import { Placement } from '../../lib/placement/placement.js';
import {
  linearPlacement,
  mixedPlacement,
  redundantPlacement,
  roundRobinPlacement,
} from '../../lib/placement/strategies.js';

const rows = (placement: Placement) => placement.toRows();

describe('static strategies', () => {
  it('linear and round-robin give the remainder to the first devices', () => {
    expect(rows(linearPlacement(10, 4))).toEqual([
      [0, 1, 2],
      [3, 4, 5],
      [6, 7],
      [8, 9],
    ]);
    expect(rows(roundRobinPlacement(10, 4))).toEqual([
      [0, 4, 8],
      [1, 5, 9],
      [2, 6],
      [3, 7],
    ]);
    expect(() => linearPlacement(10, 4).slots).toThrow(/ragged/);
  });

  it('numbers physical ids densely, as the routing tables of all-to-all backends do', () => {
    const devices = 4;
    const placement = roundRobinPlacement(10, devices);
    for (let expert = 0; expert < 10; expert++) {
      const owner = expert % devices;
      const physical = owner * 2 + Math.min(owner, 2) + Math.floor(expert / devices);
      expect(placement.physicalOf(expert)).toBe(physical);
      expect(placement.ownerOf(expert)).toBe(owner);
    }
  });

  it('zigzag puts four experts of every group on every one of 8 devices', () => {
    const placement = roundRobinPlacement(256, 8, { groups: 8 });
    for (let device = 0; device < 8; device++) {
      const perGroup = new Array(8).fill(0);
      for (const expert of placement.expertsOn(device)) perGroup[Math.floor(expert / 32)]++;
      expect(perGroup).toEqual(new Array(8).fill(4));
    }
  });

  it('says which rule forbids round-robin', () => {
    const refuse = (model: Parameters<typeof roundRobinPlacement>[2]) => () =>
      roundRobinPlacement(8, 4, model);
    expect(refuse({ groups: 1 })).toThrow('groups = 1');
    expect(refuse({ groups: 2, redundant: 4 })).toThrow('redundant = 4');
    expect(refuse({ groups: 2, rebalancing: true })).toThrow('rebalancing = true');
    expect(refuse({ groups: 2, routingTables: false })).toThrow('routingTables = false');
    expect(rows(roundRobinPlacement(8, 4, { groups: 2, routingTables: true }))).toEqual([
      [0, 4],
      [1, 5],
      [2, 6],
      [3, 7],
    ]);
  });

  it('redundant is the flat list cut into devices', () => {
    expect(rows(redundantPlacement(8, 2, 2))).toEqual([
      [0, 1, 2, 3, 4],
      [5, 6, 7, 0, 1],
    ]);
    expect(() => redundantPlacement(8, 3, 2)).toThrow('divide by 3 devices but received 10');
    expect(() => redundantPlacement(2, 2, 4)).toThrow('at most 2 slots per device');
  });

  it('mixed gives the golden table and falls back to the standard placement without shared experts', () => {
    const golden = [
      [0, 1, 2, 8],
      [2, 3, 4, 8],
      [4, 5, 6, 8],
      [6, 7, 0, 8],
    ];
    expect(rows(mixedPlacement({ routed: 8, shared: 1, devices: 4, redundant: 4 }))).toEqual(golden);
    const large = mixedPlacement({ routed: 256, shared: 1, devices: 32 });
    expect([large.devices, large.slots, large.experts, large.redundant]).toEqual([32, 9, 257, 31]);
    expect(large.replicaCount(256)).toBe(32);
    for (const redundant of [0, 4]) {
      const off = mixedPlacement({ routed: 8, shared: 0, devices: 4, redundant });
      expect(off.physicalToLogical).toEqual(redundantPlacement(8, 4, redundant).physicalToLogical);
    }
    expect(rows(mixedPlacement({ routed: 4, shared: 2, devices: 2 }))).toEqual([
      [0, 1, 4, 5],
      [2, 3, 4, 5],
    ]);
    expect(rows(mixedPlacement({ routed: 4, shared: 2, devices: 2, copies: 'onePerDevice' }))).toEqual([
      [0, 1, 4],
      [2, 3, 5],
    ]);
  });
});

describe('Placement', () => {
  it('round-trips owner, slot and global id', () => {
    const arbitrary = fc
      .tuple(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 9 }), fc.integer({ min: 0, max: 1e6 }))
      .map(([devices, slots, seed]) => {
        let state = seed + 1;
        const random = (n: number) => {
          state = (Math.imul(state, 48271) >>> 0) % 2147483647;
          return state % n;
        };
        const experts = slots + random(devices * slots - slots + 1);
        const flat = Array.from({ length: devices * slots }, (_, slot) => slot % experts);
        return { placement: Placement.fromPhysical(flat, devices, { experts }), experts };
      });
    fc.assert(
      fc.property(arbitrary, ({ placement, experts }) => {
        let total = 0;
        for (let expert = 0; expert < experts; expert++) {
          total += placement.replicaCount(expert);
          for (let replica = 0; replica < placement.replicaCount(expert); replica++) {
            const device = placement.ownerOf(expert, replica);
            const slot = placement.slotOf(expert, device);
            expect(placement.globalOf(device, slot)).toBe(expert);
            expect(placement.deviceOfPhysical(placement.physicalOf(expert, replica))).toBe(device);
          }
        }
        expect(total).toBe(placement.physicalExperts);
        const again = Placement.fromRows(placement.toRows(), { experts });
        expect(again.equals(placement)).toBe(true);
      }),
    );
  });

  it('refuses what is not a placement, naming device and expert', () => {
    expect(() => Placement.fromRows([[0, 1], [2]])).toThrow(
      'expected 2 slots on every device (as on device 0) but received 1 on device 1',
    );
    expect(() =>
      Placement.fromRows([
        [0, 0],
        [1, 2],
      ]),
    ).toThrow('expert 0 twice on device 0');
    expect(() =>
      Placement.fromRows([
        [0, 1],
        [3, 0],
      ]),
    ).toThrow('expert 2 is nowhere');
    expect(() => Placement.fromRows([[0, 1]], { experts: 3 })).toThrow('at least 3 slots');
    expect(() => Placement.fromRows([[0, 5]], { experts: 2 })).toThrow(
      'in 0..1 in physical slot 1 but received 5',
    );
    expect(() => Placement.fromRows([[0, -1]])).toThrow('received -1');
    expect(() => Placement.fromPhysical([0, 1, 2], 2)).toThrow('divisible by 2');
    expect(
      Placement.fromRows(
        [
          [0, 0],
          [1, 2],
        ],
        { duplicates: 'allow' },
      ).replicaCount(0),
    ).toBe(2);
  });

  it('maps of the published two-rank example', () => {
    const placement = Placement.fromRows([
      [7, 2, 0, 3, 5],
      [6, 1, 4, 7, 2],
    ]);
    expect([...placement.expertMap(1)]).toEqual([-1, 1, 4, -1, 2, -1, 0, 3]);
    expect([...log2phy(placement, 1)]).toEqual([2, 6, 9, 3, 7, 4, 5, 8]);
    const redundant = redundantPlacement(8, 2, 2);
    expect([...redundant.expertMap(1)]).toEqual([3, 4, -1, -1, -1, 0, 1, 2]);
    expect([...log2phy(redundant, 1)]).toEqual([8, 9, 2, 3, 4, 5, 6, 7]);
    expect(
      log2phyCandidates(redundant, 3)
        .slice(0, 3)
        .map((row) => [...row]),
    ).toEqual([
      [0, 8, -1],
      [1, 9, -1],
      [2, -1, -1],
    ]);
    expect([...replicaCounts(redundant)]).toEqual([2, 2, 1, 1, 1, 1, 1, 1]);
    expect(roundRobinPlacement(8, 4).compressedExpertMap(1)).toBe('0->1, 1->5');
  });

  it('prefers the replica at home when asked, shared experts included', () => {
    const placement = mixedPlacement({ routed: 8, shared: 1, devices: 4, redundant: 4 });
    for (const [rank, map] of log2phyAll(placement, { prefer: 'local' }).entries()) {
      expect(map.length).toBe(9);
      expect(placement.deviceOfPhysical(map[8]!)).toBe(rank);
      for (const [expert, physical] of map.entries())
        expect(placement.physicalToLogical[physical]).toBe(expert);
    }
  });
});

describe('aligning to the slots in use', () => {
  it('keeps slots and counts only experts that are new on a device', () => {
    const from = Placement.fromRows([
      [0, 1, 2],
      [3, 4, 0],
    ]);
    const to = keepSlots(
      from,
      Placement.fromRows([
        [2, 3, 0],
        [0, 1, 4],
      ]),
    );
    expect(to.toRows()).toEqual([
      [0, 3, 2],
      [1, 4, 0],
    ]);
    expect(countMoves(from, to)).toBe(2);
    expect(countMoves(from, from)).toBe(0);
  });
});
