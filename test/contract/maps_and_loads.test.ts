// Contract 6: idMap is applied once, after the shared ids; load counts what was mapped; logical ids can be captured.
import { beforeAll, describe, expect, it } from 'vitest';
import { type Context, moeFusedGate } from '../../lib/index.js';
import { Random } from '../cases/random.js';
import { backends, contextOf } from '../ops/backends.js';

describe.each(backends)('maps and loads on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  const tensor = (shape: number[], values: readonly number[]) =>
    context.tensor('i32', shape, Int32Array.from(values));

  it('token t uses round t mod rounds, on routed, shared and zero columns alike', async () => {
    // Experts 0 1 | zero expert; shared id 2, zero id 3. Every token chooses 1, then the zero expert.
    const logits = context.tensor('f32', [3, 3], Float32Array.of(0, 9, 5, 0, 9, 5, 0, 9, 5));
    const idMap = tensor([2, 4], [10, 11, 12, 13, 20, 21, 22, 23]);
    const { ids, logicalIds } = moeFusedGate(
      { logits, idMap },
      { topK: 2, zeroExperts: 1, sharedExperts: 1, captureLogicalIds: true },
    );
    expect([...(await ids.read())]).toEqual([11, 13, 12, 21, 23, 22, 11, 13, 12]);
    expect([...(await logicalIds!.read())]).toEqual([1, 3, 1, 3, 1, 3]);
  });

  it('a map onto other experts is not applied twice', async () => {
    const logits = context.tensor('f32', [1, 4], Float32Array.of(4, 3, 2, 1));
    const { ids } = moeFusedGate({ logits, idMap: tensor([1, 4], [1, 2, 3, 0]) }, { topK: 4 });
    expect([...(await ids.read())]).toEqual([1, 2, 3, 0]);
  });

  it('-1 in a map stays -1, keeps its weight and is not counted', async () => {
    const logits = context.tensor('f32', [1, 3], Float32Array.of(3, 2, 1));
    const load = context.tensor('i64', [2]);
    const { ids, weights } = moeFusedGate({ logits, idMap: tensor([1, 3], [-1, 1, 7]), load }, { topK: 3 });
    expect([...(await ids.read())]).toEqual([-1, 1, 7]);
    expect((await weights.read())[0]).toBeGreaterThan(0.5);
    expect(await load.read()).toEqual(BigInt64Array.of(0n, 1n));
  });

  it('load adds to what is there, beyond 32 bits', async () => {
    const logits = context.tensor('f32', [100, 8], new Random(1).normals(800));
    const start = 2n ** 40n;
    const load = context.tensor('i64', [9], new BigInt64Array(9).fill(start));
    for (let step = 1n; step <= 3n; step++) {
      const { ids } = moeFusedGate({ logits, load }, { topK: 2, sharedExperts: 1 });
      const counts = await load.read();
      for (let slot = 0; slot < 9; slot++) {
        const perCall = (await ids.read()).filter((id) => id === slot).length;
        expect(counts[slot]).toBe(start + step * BigInt(perCall));
      }
    }
  });

  it('load counts mapped ids, not logical ones', async () => {
    const logits = context.tensor('f32', [50, 4], new Random(2).normals(200));
    const idMap = tensor([2, 4], [0, 0, 0, 0, 5, 5, 5, 5]);
    const load = context.tensor('i64', [6]);
    moeFusedGate({ logits, idMap, load }, { topK: 2 });
    expect(await load.read()).toEqual(BigInt64Array.of(50n, 0n, 0n, 0n, 0n, 50n));
  });

  it('every replay of a capture adds to the load again', async () => {
    const logits = context.tensor('f32', [10, 4], new Random(3).normals(40));
    const load = context.tensor('i64', [4]);
    using step = context.capture(() => moeFusedGate({ logits, load }, { topK: 1 }));
    const totals = [];
    for (let i = 0; i < 3; i++) {
      step.replay();
      totals.push((await load.read()).reduce((sum, count) => sum + count, 0n));
    }
    expect(totals).toEqual([10n, 20n, 30n]);
  });
});
