// The addon on machines that cannot run it: it loads, says which state it is in, and 'auto' goes on without it.
import { describe, expect, it } from 'vitest';
import { createContext } from '../../lib/index.js';
import { child, ready, status } from './device.js';

const built = status.state !== 'not built';

describe.runIf(built)('the cuda addon', () => {
  it('names its state', () => {
    expect(['ready', 'no driver', 'no device']).toContain(status.state);
    expect(status.facts.runtime).toMatch(/^1[2-9]\.\d$/);
    expect(status.loadedFrom).toMatch(/moe_cuda\.node$/);
  });

  it.runIf(ready)('names devices, their compute capability, and the versions', () => {
    expect(status.devices.length).toBeGreaterThan(0);
    expect(status.facts['device 0']).toMatch(/compute capability \d+\.\d/);
    expect(status.facts['driver supports']).toMatch(/^\d+\.\d$/);
  });

  it.skipIf(ready)('refuses a context with the reason', async () => {
    await expect(createContext({ backend: 'cuda' })).rejects.toMatchObject({
      code: 'ERR_MOE_BACKEND',
      message: expect.stringContaining(status.state),
    });
  });

  it('is passed over by auto where no device is visible', () => {
    const code = `const ctx = await m.createContext(); console.log(ctx.backend);
      console.log(ctx.describe().passedOver.find(({ backend }) => backend === 'cuda').reason);
      try { await m.createContext({ backend: 'cuda' }); } catch (error) { console.log(error.code); }`;
    const { stdout } = child(code, { env: { CUDA_VISIBLE_DEVICES: '' } });
    expect(stdout).toMatch(/^(cpu|oracle)\n(no device|no driver): .*\nERR_MOE_BACKEND$/);
  });

  it.runIf(ready)('refuses a device that is not there', async () => {
    await expect(createContext({ backend: 'cuda', device: 99 })).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      message: expect.stringMatching(/expected device: 0 to \d+ .* but received 99/),
    });
  });
});
