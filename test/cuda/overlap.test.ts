// Kernels that start while the kernel before them still runs keep to the order of the stream.
import { describe, expect, it } from 'vitest';
import { type Context, createContext, moeDispatch, moeFusedGate, type Tensor } from '../../lib/index.js';
import { moe_dispatch } from '../../lib/oracle/moe_dispatch.js';
import { ready, values } from './device.js';

const [EXPERTS, TOP_K, BLOCK] = [256, 8, 16];

/** Logits in, a plan out: twice, so that a gate also follows a dispatch whose outputs may take the memory of others. */
function forward(logits: Tensor<'f32'>, bias: Tensor<'f32'>) {
  const plan = () => {
    const { ids, weights } = moeFusedGate(
      { logits, bias },
      { topK: TOP_K, sharedExperts: 1, groups: 8, topGroups: 4, scoring: 'sigmoid' },
    );
    weights.dispose();
    return { ids, ...moeDispatch({ ids }, { experts: EXPERTS + 1, blockSize: BLOCK }) };
  };
  const first = plan();
  for (const tensor of Object.values(first)) tensor?.dispose();
  return plan();
}

const read = async (outputs: Record<string, Tensor | undefined>) =>
  Object.fromEntries(
    await Promise.all(Object.entries(outputs).map(async ([name, tensor]) => [name, await tensor?.read()])),
  ) as Record<string, Int32Array>;

function planOf(ids: Int32Array, lengths: Record<string, Int32Array>) {
  const tensor = (length: number) => ({ shape: [length], data: new Int32Array(length) });
  const outputs = {
    order: tensor(lengths.order.length),
    inverse: tensor(ids.length),
    counts: tensor(EXPERTS + 1),
    offsets: tensor(EXPERTS + 2),
    blockExperts: tensor(lengths.blockExperts.length),
  };
  moe_dispatch(
    { ids: { shape: [ids.length / (TOP_K + 1), TOP_K + 1], data: ids } },
    { experts: EXPERTS + 1, firstExpert: 0, blockSize: BLOCK },
    outputs,
  );
  return Object.fromEntries(Object.entries(outputs).map(([name, { data }]) => [name, data]));
}

describe.runIf(ready)('a dispatch that overlaps with the gate before it, on cuda', () => {
  it.each([1, 3, 4, 64, 113, 114, 1000, 4096, 9000])('%i tokens', async (tokens) => {
    await using context: Context = await createContext({ backend: 'cuda' });
    const logits = context.tensor('f32', [tokens, EXPERTS], values(tokens * EXPERTS));
    const bias = context.tensor('f32', [EXPERTS], values(EXPERTS, 2));
    using step = context.capture(() => forward(logits, bias));
    for (let seed = 3; seed < 8; seed++) {
      logits.write(values(tokens * EXPERTS, seed));
      step.replay();
      step.replay();
      const replayed = await read(step.output);
      const { ids, ...plan } = replayed;
      expect(plan).toEqual(planOf(ids, replayed));
      const outside = forward(logits, bias);
      expect(await read(outside)).toEqual(replayed);
      for (const tensor of Object.values(outside)) tensor?.dispose();
    }
  });
});
