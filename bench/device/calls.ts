// What a gate and a dispatch cost the JS thread: captured and replayed, and as plain calls. And what a wait costs that
// finds nothing to wait for.
import { type Context, moeDispatch, moeFusedGate } from '../../lib/index.js';
import { Inputs } from './inputs.js';

const ROUNDS = 11;
const CALLS = 200;

export interface CallTimes {
  readonly replayMicroseconds: number;
  readonly plainMicroseconds: number;
  readonly idleWaitMicroseconds: number;
}

const median = (values: readonly number[]): number => values.toSorted((a, b) => a - b)[values.length >> 1];

export async function callTimes(context: Context): Promise<CallTimes> {
  const inputs = new Inputs(context);
  const logits = inputs.normal('bf16', [64, 256], 0);
  const bias = inputs.normal('f32', [256], 1, 0.1);
  const run = () => {
    const { ids, weights } = moeFusedGate(
      { logits, bias },
      {
        scoring: 'sigmoid',
        groups: 8,
        topGroups: 4,
        topK: 8,
        sharedExperts: 1,
        renormalize: true,
        routedScalingFactor: 2.5,
      },
    );
    return [ids, weights, ...Object.values(moeDispatch({ ids }, { experts: 257 }))];
  };
  const perCall = async (work: () => void) => {
    const times: number[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      const begun = performance.now();
      for (let i = 0; i < CALLS; i++) work();
      times.push((1e3 * (performance.now() - begun)) / CALLS);
      await context.synchronize();
    }
    return median(times);
  };
  const plain = () => run().forEach((tensor) => void tensor.dispose());
  await perCall(plain); // warms up the JIT
  const step = context.capture(run);
  await perCall(() => step.replay());
  const replayMicroseconds = await perCall(() => step.replay());
  const plainMicroseconds = await perCall(plain);
  step.dispose();
  const waits: number[] = [];
  for (let i = 0; i < CALLS; i++) {
    const begun = performance.now();
    await context.synchronize();
    waits.push(1e3 * (performance.now() - begun));
  }
  inputs.dispose();
  return { replayMicroseconds, plainMicroseconds, idleWaitMicroseconds: median(waits) };
}
