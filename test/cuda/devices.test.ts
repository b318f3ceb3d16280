// Several GPUs in one process: every context stays on its own, whichever was used last.
import { describe, expect, it } from 'vitest';
import { type Context, createContext, moeRouter } from '../../lib/index.js';
import { ready, status, values } from './device.js';

describe.runIf(ready && status.devices.length > 1)('several devices', () => {
  it('keeps contexts on their devices, in turn and at once', async () => {
    const contexts = await Promise.all(
      status.devices.map((_, device) => createContext({ backend: 'cuda', device })),
    );
    const run = (context: Context) => {
      const hidden = context.tensor('f32', [65, 128], values(65 * 128));
      return moeRouter({ hidden, weight: hidden });
    };
    const expected = await run(contexts[0]).read();
    for (let round = 0; round < 5; round++) {
      const outputs = contexts.map(run); // no wait between devices
      for (const output of outputs) expect(await output.read()).toEqual(expected);
    }
    const steps = contexts.map((context) => context.capture(() => run(context)));
    for (const step of [...steps, ...steps]) step.replay();
    for (const step of steps) expect(await step.output.read()).toEqual(expected);
    const moved = await steps[1].output.to(contexts[0]);
    expect(await moved.read()).toEqual(expected);
    for (const step of steps) step.dispose();
    await Promise.all(contexts.map((context) => context.close()));
  });
});
