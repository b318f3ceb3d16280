// Every instruction set that this processor runs, chosen by option or by environment, gives right results and says so.
import { afterEach, describe, expect, it, vi } from 'vitest';
import { selfTest } from '../../lib/cli/self_test.js';
import { createContext } from '../../lib/index.js';
import { loadBackend } from '../../lib/native.js';

const { status } = loadBackend('cpu');
const usable = (status.facts['usable isas'] ?? '').split(' ').filter((name) => name !== '') as (
  | 'avx512'
  | 'avx2'
  | 'neon'
  | 'scalar'
)[];

describe('instruction sets of the CPU backend', () => {
  afterEach(() => vi.unstubAllEnvs());

  it('the portable one always runs, and the best is the default', async () => {
    expect(usable).toContain('scalar');
    expect(status.facts.isa).toBe(usable[0]);
    await using context = await createContext({ backend: 'cpu', isa: 'auto' });
    expect((await selfTest(context)).ok).toBe(true);
    expect(context.describe().paths.fused_moe).toBe(usable[0]);
  });

  it.each(usable)('%s', async (isa) => {
    await using chosen = await createContext({ backend: 'cpu', isa });
    expect(await selfTest(chosen)).toMatchObject({ ok: true });
    vi.stubEnv('MOE_KERNELS_ISA', isa);
    await using environment = await createContext({ backend: 'cpu' });
    await selfTest(environment);
    for (const { paths } of [chosen.describe(), environment.describe()]) {
      for (const op of [
        'moe_router',
        'moe_experts',
        'moe_combine',
        'fused_moe',
        'shared_experts',
        'pack_experts',
      ]) {
        expect(paths[op], op).toBe(isa);
      }
    }
  });

  it('one that does not run here is refused, with those that do', async () => {
    const isa = process.arch === 'arm64' ? 'avx2' : 'neon';
    await expect(createContext({ backend: 'cpu', isa })).rejects.toMatchObject({
      code: 'ERR_MOE_UNSUPPORTED',
      arg: 'isa',
      message: expect.stringContaining(`one of ${usable.join(', ')}`),
    });
  });

  it('an unknown name is refused, wherever it comes from', async () => {
    await expect(createContext({ backend: 'cpu', isa: 'mmx' as never })).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
    });
    vi.stubEnv('MOE_KERNELS_ISA', 'mmx');
    await expect(createContext({ backend: 'cpu' })).rejects.toMatchObject({
      code: 'ERR_MOE_INVALID_ARG',
      arg: 'MOE_KERNELS_ISA',
    });
  });
});
