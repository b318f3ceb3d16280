// Device memory: counted, reused, given back, and refused with numbers.
import { describe, expect, it } from 'vitest';
import { createContext, moeFusedGate, moeRouter, type Tensor } from '../../lib/index.js';
import { ready, values } from './device.js';

const MIB = 1 << 20;

describe.runIf(ready)('memory on cuda', () => {
  it('counts what tensors hold', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    expect(ctx.memory().used).toBe(0);
    const tensors = [1, 100, 300, 5000, MIB, 64 * MIB].map((bytes) => ctx.tensor('u8', [bytes]));
    expect(ctx.memory().used).toBe(1 + 100 + 300 + 5000 + MIB + 64 * MIB);
    expect(ctx.memory().reserved).toBeGreaterThanOrEqual(ctx.memory().used);
    for (const tensor of tensors) tensor.dispose();
    expect(ctx.memory().used).toBe(0);
  });

  it('hands freed memory out again without mixing up what is in flight', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const reads: Promise<void>[] = [];
    for (let i = 0; i < 300; i++) {
      const size = 1 + ((i * 7919) % 300_000);
      const data = new Float32Array(size).fill(i);
      const tensor = ctx.tensor('f32', [size], data);
      reads.push(tensor.read().then((back) => expect(back.every((x) => x === i)).toBe(true)));
      tensor.dispose(); // with the read in flight
    }
    await Promise.all(reads);
    expect(ctx.memory().reserved).toBeLessThan(512 * MIB);
  });

  it('lets far more pass through than the device has', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    for (let i = 0; i < 1000; i++) ctx.tensor('u8', [256 * MIB]).dispose();
    await ctx.synchronize();
    expect(ctx.memory().reserved).toBeLessThan(2048 * MIB);
  });

  it('gives everything back when a context is closed', async () => {
    for (let i = 0; i < 24; i++) {
      const ctx = await createContext({ backend: 'cuda' });
      ctx.allocate('test', 'block', 'u8', [16384 * MIB]); // not disposed; all of them are more than any device has
      ctx.capture(() => ctx.tensor('u8', [MIB]));
      await ctx.close();
    }
  });

  it('refuses what does not fit with what was asked for and what there is, and goes on', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const shape = [2 ** 21, 2 ** 21]; // 4 TiB
    for (let i = 0; i < 3; i++) {
      expect(() => ctx.tensor('u8', shape)).toThrow(
        expect.objectContaining({
          code: 'ERR_MOE_OOM',
          message: expect.stringMatching(/requested 4398046511104 bytes but \d+ of \d+ are free on device 0/),
        }),
      );
      const small = ctx.tensor('f32', [3], Float32Array.of(1, 2, 3));
      expect(await small.read()).toEqual(Float32Array.of(1, 2, 3));
      small.dispose();
    }
    expect(() => ctx.capture(() => ctx.tensor('u8', shape))).toThrow(
      expect.objectContaining({ code: 'ERR_MOE_OOM' }),
    );
    const x = ctx.tensor('f32', [2, 2], values(4));
    expect((await moeRouter({ hidden: x, weight: x }).read()).length).toBe(4);
  });

  it('fills the device, refuses the rest, and has it all again', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const held: { dispose(): void }[] = [];
    let refused = 0;
    for (let i = 0; i < 64 && refused === 0; i++) {
      try {
        held.push(ctx.allocate('test', 'block', 'u8', [8192 * MIB]));
      } catch (error) {
        expect(error).toMatchObject({ code: 'ERR_MOE_OOM' });
        refused++;
      }
    }
    expect(refused).toBe(1);
    const count = held.length;
    const small = ctx.tensor('f32', [3], Float32Array.of(1, 2, 3));
    expect(await small.read()).toEqual(Float32Array.of(1, 2, 3));
    for (const tensor of held.splice(0)) tensor.dispose();
    for (let i = 0; i < count; i++) held.push(ctx.allocate('test', 'block', 'u8', [8192 * MIB]));
    for (const tensor of held) tensor.dispose();
    // Another size than what the pool holds: it has to be given back first.
    ctx.allocate('test', 'block', 'u8', [count * 8192 * MIB]).dispose();
  });

  it('may be all taken: a load is then counted without counters of its own', async () => {
    await using ctx = await createContext({ backend: 'cuda' });
    const [tokens, experts, topK] = [300, 256, 6];
    const logits = ctx.tensor('f32', [tokens, experts], values(tokens * experts));
    const count = (load: Tensor<'i64'>) => {
      const { ids, weights } = moeFusedGate({ logits, load }, { topK });
      ids.dispose();
      weights.dispose();
    };
    const total = async (load: Tensor<'i64'>) => Number((await load.read()).reduce((sum, n) => sum + n, 0n));
    const loads = [0, 1].map(() => ctx.tensor('i64', [experts]));
    const reserve = [0, 1].map(() => ctx.allocate('test', 'block', 'f32', [tokens, topK])); // for ids and weights
    const held: { dispose(): void }[] = [];
    for (let bytes = 8192 * MIB; bytes >= 4096; ) {
      try {
        held.push(ctx.allocate('test', 'block', 'u8', [bytes]));
      } catch (error) {
        expect(error).toMatchObject({ code: 'ERR_MOE_OOM' });
        bytes /= 2;
      }
    }
    const full = ctx.memory().used;
    for (const tensor of reserve) tensor.dispose();
    count(loads[0]);
    expect(ctx.memory().used).toBeLessThan(full);
    for (const tensor of held) tensor.dispose();
    const before = ctx.memory().used;
    for (let i = 0; i < 3; i++) count(loads[0]);
    expect(ctx.memory().used).toBe(before); // not asked for again
    count(loads[1]);
    expect(ctx.memory().used).toBeGreaterThan(before);
    expect(await total(loads[0])).toBe(4 * tokens * topK);
    expect(await total(loads[1])).toBe(tokens * topK);
  });
});
