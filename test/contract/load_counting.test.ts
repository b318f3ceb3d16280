// What `load` counts can be read, written and replaced at any time, inside captures and outside, and is exact: a
// backend may keep additions apart from the tensor, and nobody may notice.
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type Capture,
  type Context,
  createContext,
  type MoeFusedGateOptions,
  moeFusedGate,
  type Tensor,
} from '../../lib/index.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from '../ops/backends.js';

const grouped: MoeFusedGateOptions = {
  topK: 8,
  groups: 8,
  topGroups: 4,
  scoring: 'sigmoid',
  renormalize: true,
};

/** [tokens, experts, options, different rows]: few tokens and many, every routing apart or all tokens alike. */
const shapes: [number, number, MoeFusedGateOptions, number][] = [
  [3, 16, { topK: 2 }, 3],
  [64, 256, grouped, 64],
  [600, 256, grouped, 1],
  [2000, 256, grouped, 50],
  [1100, 128, { topK: 8 }, 40],
  [300, 1000, { topK: 20, sharedExperts: 1 }, 30],
];
const slotCounts = [1, 16, 256, 1001, 4096, 5000];

/** Rows without ties: every logit of a row is another multiple of 1/64. */
function rowsOf(tokens: number, experts: number, kinds: number): Float32Array {
  const random = new Random(tokens + experts);
  const rows = Array.from({ length: kinds }, () => random.distinct(experts, experts));
  return Float32Array.from(
    { length: tokens * experts },
    (_, i) => rows[Math.floor(i / experts) % kinds][i % experts] / 64 - experts / 128,
  );
}

interface Gate {
  readonly inputs: { logits: Tensor<'f32'>; bias?: Tensor<'f32'>; idMap?: Tensor<'i32'> };
  readonly options: MoeFusedGateOptions;
  /** What one call adds to a load of so many slots. */
  readonly adds: ReadonlyMap<number, BigInt64Array>;
}

/** Every shape, without a map and with one that has ids outside the slots; what they choose is the oracle's word. */
const cases = shapes.flatMap(([tokens, experts, options, kinds]) =>
  [false, true].map((mapped) => {
    const width = experts + (options.sharedExperts ?? 0);
    const random = new Random(experts);
    const map = Int32Array.from({ length: 3 * width }, () => random.integer(6000) - 1);
    const rows = rowsOf(tokens, experts, kinds);
    const inputs = (context: Context) => ({
      logits: context.tensor('f32', [tokens, experts], rows),
      ...(options.groups === undefined ? {} : { bias: context.tensor('f32', [experts]) }),
      ...(mapped ? { idMap: context.tensor('i32', [3, width], map) } : {}),
    });
    return { inputs, options };
  }),
);
const oracle = await contextOf('oracle');
const added = cases.map(({ inputs, options }) => {
  const ids = moeFusedGate(inputs(oracle), options).ids.readSync();
  return new Map(
    slotCounts.map((slots) => {
      const counts = new BigInt64Array(slots);
      for (const id of ids) if (id >= 0 && id < slots) counts[id]++;
      return [slots, counts];
    }),
  );
});
const gatesOf = (context: Context): Gate[] =>
  cases.map(({ inputs, options }, i) => ({ inputs: inputs(context), options, adds: added[i] }));

describe.each(backends.filter((name) => name !== 'oracle'))('counting load on %s', (backend) => {
  let context: Context;
  let gates: Gate[];
  beforeAll(async () => {
    context = await contextOf(backend);
    gates = gatesOf(context);
  });

  /** A load tensor and what it has to hold. */
  class Load {
    expected: BigInt64Array;
    constructor(
      readonly slots: number,
      readonly tensor = context.tensor('i64', [slots]),
    ) {
      this.expected = new BigInt64Array(slots);
    }

    /** Enqueues or records a call; what it adds is added now, or by the caller at every replay. */
    count(gate: Gate, effects?: (() => void)[]): void {
      const { ids, weights } = moeFusedGate({ ...gate.inputs, load: this.tensor }, gate.options);
      ids.dispose();
      weights.dispose();
      const adds = gate.adds.get(this.slots)!;
      const add = (n: bigint, slot: number) => {
        this.expected[slot] += n;
      };
      this.#after(() => adds.forEach(add), effects);
    }

    write(values: BigInt64Array, effects?: (() => void)[]): void {
      this.tensor.write(values);
      this.#after(() => {
        this.expected = values.slice();
      }, effects);
    }

    clear(effects?: (() => void)[]): void {
      this.write(new BigInt64Array(this.slots), effects);
    }

    async check(): Promise<void> {
      const expected = this.expected.slice(); // as of now: the read comes later
      expect(await this.tensor.read()).toEqual(expected);
    }

    #after(effect: () => void, effects: (() => void)[] | undefined): void {
      if (effects === undefined) effect();
      else effects.push(effect);
    }
  }

  const numbers = (slots: number, seed: number) => {
    const random = new Random(seed);
    return BigInt64Array.from({ length: slots }, () => BigInt(random.integer(2 ** 30)) << 20n);
  };

  it.each(slotCounts)('is exact whenever it is read, with %i slots', async (slots) => {
    const load = new Load(slots);
    for (const gate of gates) {
      for (let calls = 0; calls < 5; calls++) load.count(gate);
      await load.check();
      expect(load.tensor.readSync()).toEqual(load.expected);
      load.count(gate);
    }
    await load.check();
    await load.check();
  });

  it('starts from what is written, whatever was counted before', async () => {
    const load = new Load(256);
    for (const [i, gate] of gates.entries()) {
      load.write(numbers(256, i));
      load.count(gate);
      await load.check();
      load.count(gate);
      load.write(numbers(256, i + 100)); // without a read in between
      load.count(gate);
      load.count(gate);
      await load.check();
      load.count(gate);
      load.clear();
      await load.check();
    }
  });

  it.each([false, true])('is added to by replays, first used before the capture: %s', async (usedBefore) => {
    const load = new Load(256);
    if (usedBefore) load.count(gates[2]);
    const effects: (() => void)[] = [];
    using step = context.capture(() => {
      load.count(gates[2], effects);
      load.count(gates[4], effects);
    });
    await load.check();
    const replay = () => {
      step.replay();
      for (const effect of effects) effect();
    };
    for (let round = 0; round < 5; round++) {
      replay();
      if (round % 2 === 0) await load.check();
      load.count(gates[3]);
      replay();
      replay();
      await load.check();
      if (round === 3) load.write(numbers(256, 7));
    }
    await load.check();
  });

  it.each([false, true])(
    'is written by replays in their order, first used before the capture: %s',
    async (usedBefore) => {
      const load = new Load(256);
      if (usedBefore) load.count(gates[2]);
      const effects: (() => void)[] = [];
      using zeroed = context.capture(() => load.clear(effects));
      const written: (() => void)[] = [];
      using whole = context.capture(() => {
        load.count(gates[3], written);
        load.write(numbers(256, 3), written);
        load.count(gates[4], written);
      });
      const replay = (step: Capture<void>, done: (() => void)[]) => {
        step.replay();
        for (const effect of done) effect();
      };
      for (let round = 0; round < 4; round++) {
        load.count(gates[2]);
        replay(zeroed, effects);
        if (round % 2 === 1) await load.check();
        load.count(gates[2]);
        await load.check();
        replay(whole, written);
        replay(whole, written);
        if (round < 2) await load.check();
        load.count(gates[4]);
        replay(zeroed, effects);
        replay(whole, written);
        await load.check();
      }
    },
  );

  it('counts in a tensor of the capture from zero at every replay, and after it', async () => {
    const adds = gates[3].adds.get(256)!;
    using step = context.capture(() => {
      const load = context.tensor('i64', [256]);
      for (let i = 0; i < 2; i++) moeFusedGate({ ...gates[3].inputs, load }, gates[3].options);
      return load;
    });
    for (let round = 0; round < 3; round++) {
      step.replay();
      step.replay();
      expect(await step.output.read()).toEqual(adds.map((n) => 2n * n));
      moeFusedGate({ ...gates[3].inputs, load: step.output }, gates[3].options);
      expect(await step.output.read()).toEqual(adds.map((n) => 3n * n));
    }
  });

  it('goes on exactly after a recording that failed', async () => {
    const load = new Load(256);
    const failing = () =>
      context.capture(() => {
        load.count(gates[2], []);
        load.clear([]);
        throw new Error('on purpose');
      });
    expect(failing).toThrow('on purpose');
    load.count(gates[2]);
    await load.check();
    expect(failing).toThrow('on purpose');
    load.count(gates[3]);
    await load.check();
  });

  it('may be given back with work in flight, and what comes in its place counts from zero', async () => {
    const reads: Promise<void>[] = [];
    for (let i = 0; i < 60; i++) {
      const load = new Load(slotCounts[i % slotCounts.length]);
      load.count(gates[i % gates.length]);
      load.count(gates[(i + 1) % gates.length]);
      if (i % 3 !== 0) reads.push(load.check());
      load.tensor.dispose();
    }
    await Promise.all(reads);
    const load = new Load(256);
    const effects: (() => void)[] = [];
    const step = context.capture(() => load.count(gates[3], effects));
    load.tensor.dispose(); // the capture still counts in it
    for (let i = 0; i < 10; i++) {
      step.replay();
      const next = new Load(256);
      next.count(gates[2]);
      reads.push(next.check());
      next.tensor.dispose();
      if (i === 5) step.replay();
    }
    step.dispose();
    const last = new Load(256);
    last.count(gates[2]);
    await Promise.all([...reads, last.check()]);
  });

  it('counts beside another load in an overlap', async () => {
    const [one, other] = [new Load(256), new Load(256)];
    for (let round = 0; round < 3; round++) {
      context.overlap(
        () => one.count(gates[3]),
        () => other.count(gates[4]),
      );
      context.overlap(
        () => other.clear(),
        () => one.count(gates[4]),
      );
      one.count(gates[2]);
      other.count(gates[2]);
      await one.check();
    }
    await other.check();
  });

  it('is counted by every context for itself', async () => {
    const others = await Promise.all([1, 2, 3].map(() => createContext({ backend })));
    const loads = [context, ...others].map((on) => ({
      gate: gatesOf(on)[2],
      load: new Load(256, on.tensor('i64', [256])),
    }));
    for (let round = 0; round < 5; round++) {
      for (const [i, { gate, load }] of loads.entries()) for (let n = 0; n <= i; n++) load.count(gate);
      for (const { load } of loads) await load.check();
    }
    const moved = await loads[1].load.tensor.to(context);
    expect(await moved.read()).toEqual(loads[1].load.expected);
    for (const { gate, load } of loads) load.count(gate);
    await Promise.all(others.map((on) => on.close())); // with counts that nobody has read
    await loads[0].load.check();
  });

  it('holds over any sequence of counting, reading, writing, captures and disposals', async () => {
    const at = fc.nat({ max: 1000 });
    const change = fc.record({
      what: fc.constantFrom('count', 'count', 'count', 'write', 'clear'),
      load: at,
      with: at,
    });
    const command = fc.oneof(
      { weight: 5, arbitrary: change },
      {
        weight: 3,
        arbitrary: fc.record({ what: fc.constantFrom('read', 'readLater', 'replace'), load: at }),
      },
      {
        weight: 1,
        arbitrary: fc.record({
          what: fc.constant('capture' as const),
          fails: fc.constantFrom(false, false, false, true),
          changes: fc.array(change, { minLength: 1, maxLength: 4 }),
        }),
      },
      {
        weight: 3,
        arbitrary: fc.record({ what: fc.constantFrom('replay', 'drop'), capture: at, times: at }),
      },
    );

    const holds = async (commands: readonly (typeof command extends fc.Arbitrary<infer C> ? C : never)[]) => {
      const loads = [256, 256, 16, 1001].map((slots) => new Load(slots));
      const captures: { step: Capture<unknown>; effects: (() => void)[] }[] = [];
      const later: Promise<void>[] = [];
      const apply = (given: { what: string; load: number; with: number }, effects?: (() => void)[]) => {
        const load = loads[given.load % loads.length];
        if (given.what === 'count') load.count(gates[given.with % gates.length], effects);
        else if (given.what === 'write') load.write(numbers(load.slots, given.with), effects);
        else load.clear(effects);
      };
      for (const given of commands) {
        if (given.what === 'capture') {
          const effects: (() => void)[] = [];
          const record = () => {
            for (const each of given.changes) apply(each, effects);
            if (given.fails) throw new Error('on purpose');
          };
          if (given.fails) expect(() => context.capture(record)).toThrow('on purpose');
          else captures.push({ step: context.capture(record), effects });
        } else if ('capture' in given) {
          if (captures.length === 0) continue;
          const which = given.capture % captures.length;
          const { step, effects } = captures[which];
          if (given.what === 'drop') {
            step.dispose();
            captures.splice(which, 1);
          } else {
            for (let i = 0; i <= given.times % 3; i++) {
              step.replay();
              for (const effect of effects) effect();
            }
          }
        } else if ('with' in given) {
          apply(given);
        } else {
          const which = given.load % loads.length;
          if (given.what === 'read') await loads[which].check();
          else later.push(loads[which].check());
          if (given.what !== 'replace') continue;
          loads[which].tensor.dispose();
          loads[which] = new Load(loads[which].slots);
        }
      }
      for (const load of loads) later.push(load.check());
      await Promise.all(later);
      for (const { step } of captures) step.dispose();
      for (const load of loads) load.tensor.dispose();
    };
    await fc.assert(fc.asyncProperty(fc.array(command, { minLength: 5, maxLength: 40 }), holds), {
      seed: 1,
      numRuns: 60,
    });
  }, 120_000);
});
