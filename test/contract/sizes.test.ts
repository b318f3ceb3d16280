// Contract 7: every op takes an empty batch, any number of experts up to 1024, any divisor as groups, topK up to 32.
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type Context,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeFusedGate,
  moeRouter,
  sharedExperts,
  type Tensor,
} from '../../lib/index.js';
import type { GateCase } from '../cases/gate.js';
import { backends, contextOf } from '../ops/backends.js';
import { checkGate, runGate } from '../ops/gate.js';
import { packCase } from '../ops/packed.js';

describe.each(backends)('sizes on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await contextOf(backend);
  });

  it('an empty batch goes through every op, also captured', async () => {
    const [experts, hidden] = [4, 6];
    using packed = packCase(context, { slots: experts + 1, hidden, intermediate: 3 });
    using dense = packCase(context, { slots: 1, hidden, intermediate: 3 });
    const xs = context.tensor('bf16', [0, hidden]);
    const weight = context.tensor('bf16', [experts, hidden]);
    const load = context.tensor('i64', [experts + 1]);
    const forward = () => {
      const logits = moeRouter({ hidden: xs, weight });
      const { ids, weights, logicalIds } = moeFusedGate(
        { logits, load },
        { topK: 2, sharedExperts: 1, captureLogicalIds: true },
      );
      const plain = moeDispatch({ ids, hidden: xs }, { experts: experts + 1 });
      const blocks = moeDispatch({ ids, hidden: xs }, { experts: experts + 1, blockSize: 16 });
      const { counts, offsets, inverse, rows } = plain;
      const outputs = moeExperts({ rows: rows!, counts, offsets, experts: packed });
      const routed = moeCombine({ rows: outputs, inverse, weights });
      const fused = fusedMoe({ hidden: xs, ids, weights, experts: packed });
      const shared = sharedExperts({ hidden: xs, experts: dense, routed });
      return {
        logits,
        ids,
        weights,
        logicalIds: logicalIds!,
        ...plain,
        blocks: blocks.blockExperts!,
        outputs,
        routed,
        fused,
        shared,
      };
    };
    using step = context.capture(forward);
    step.replay();
    for (const results of [forward(), step.output]) {
      const shapes = Object.fromEntries(
        Object.entries(results).map(([name, tensor]) => [name, tensor!.shape]),
      );
      expect(shapes).toMatchObject({
        logits: [0, 4],
        ids: [0, 3],
        weights: [0, 3],
        logicalIds: [0, 2],
        order: [0],
        inverse: [0, 3],
        counts: [5],
        offsets: [6],
        blocks: [0],
        rows: [0, 6],
        outputs: [0, 6],
        routed: [0, 6],
        fused: [0, 6],
        shared: [0, 6],
      });
      for (const tensor of Object.values(results)) {
        const values = (await (tensor as Tensor).read()) as Float32Array;
        expect(values.every((value) => value === 0)).toBe(true);
      }
    }
    expect((await load.read()).every((count) => count === 0n)).toBe(true);
  });

  it('experts from 1 to 1024, each with every group count that divides it', async () => {
    for (const experts of [
      1, 2, 3, 5, 7, 12, 31, 32, 33, 63, 65, 96, 127, 130, 255, 257, 720, 1000, 1023, 1024,
    ]) {
      const divisors = [...Array(experts).keys()].map((d) => d + 1).filter((d) => experts % d === 0);
      for (const groups of divisors.filter((d) => d <= 130)) {
        const topGroups = Math.ceil(groups / 2);
        const topK = Math.min(32, (experts / groups) * topGroups);
        const given: GateCase = {
          tokens: 2,
          experts,
          bias: 'normal',
          seed: experts + groups,
          options: { topK, scoring: 'sigmoid', groups, topGroups, renormalize: true, sharedExperts: 1 },
        };
        checkGate(given, await runGate(context, given));
      }
    }
  });

  it('describe() tells which path each op took', async () => {
    await runGate(context, { tokens: 2, experts: 256, options: { topK: 8, groups: 8, topGroups: 4 } });
    const special = context.describe().paths.moe_fused_gate;
    await runGate(context, { tokens: 2, experts: 60, options: { topK: 3, groups: 5, topGroups: 2 } });
    const general = context.describe().paths.moe_fused_gate;
    for (const path of [special, general]) expect(path).toMatch(/\w/);
  });
});
