// `moe-kernels bench`: the benches of bench/, which this command finds and runs.
import type { Command } from 'commander';
import { type BackendName, createContext, MoeError } from '../index.js';
import { progress } from './progress.js';

interface BenchModule {
  benchNames(): string[];
  runBenches(options: {
    names: readonly string[];
    context: Awaited<ReturnType<typeof createContext>>;
    onResult?: (line: string) => void;
    onProgress?: (done: number, total: number) => void;
  }): Promise<object>;
}

export function registerBench(program: Command): void {
  program
    .command('bench')
    .argument('[op...]', 'ops to measure, by their snake_case names (default: all)')
    .description('measure ops beside their baseline and their floor')
    .option('--backend <name>', 'auto, cuda, ascend, cpu or oracle', 'auto')
    .option('--json', 'print one JSON object')
    .action(async (names: string[], { backend, json }: { backend: string; json?: boolean }) => {
      // Resolved at run time: benches use the package as its users do, so the package cannot import them.
      const module = (await import(new URL('../../bench/run.js', import.meta.url).href)) as BenchModule;
      const known = module.benchNames();
      for (const name of names) {
        if (!known.includes(name)) {
          throw new MoeError(
            'ERR_MOE_INVALID_ARG',
            `expected op: one of ${known.join(', ')} but received '${name}'`,
            {
              op: 'bench',
              arg: 'op',
            },
          );
        }
      }
      await using context = await createContext({ backend: backend as BackendName });
      const bar = progress('Measuring', 'ops', true);
      const result = await module
        .runBenches({
          names: names.length > 0 ? names : known,
          context,
          ...(json ? {} : { onResult: (line: string) => bar.print(line) }),
          onProgress: (done, total) => bar.update(done, total),
        })
        .finally(() => bar.stop()); // its timer would keep the process
      if (json) console.log(JSON.stringify(result, null, 2));
    });
}
