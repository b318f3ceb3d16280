// Finds the benches beside this file and runs them; `moe-kernels bench` is the way in.
import { readdirSync } from 'node:fs';
import type { Context } from '../lib/index.js';
import { type Bench, ceilings, circumstances, type Measurement, measure } from './harness.js';
import { header, line } from './report.js';

const folder = new URL('.', import.meta.url);
const pattern = /^(\w+)\.bench\.[jt]s$/;

/** The op of every <op>.bench file. */
export function benchNames(): string[] {
  return readdirSync(folder).flatMap((file) => pattern.exec(file)?.[1] ?? []);
}

export interface BenchReport {
  readonly circumstances: Record<string, string | number>;
  readonly results: readonly Measurement[];
}

export async function runBenches({
  names,
  context,
  onResult = () => {},
  onProgress = () => {},
}: {
  names: readonly string[];
  context: Context;
  onResult?: (line: string) => void;
  onProgress?: (done: number, total: number) => void;
}): Promise<BenchReport> {
  const roofline = ceilings(context);
  const about = circumstances(context, roofline);
  onResult(
    Object.entries(about)
      .map(([name, value]) => `${name}: ${value}`)
      .join(', '),
  );
  onResult(header());
  const extension = import.meta.url.slice(-3);
  const results: Measurement[] = [];
  for (const name of names) {
    const { bench } = (await import(new URL(`${name}.bench${extension}`, folder).href)) as { bench: Bench };
    for (const result of await measure(bench, context, roofline)) {
      results.push(result);
      onResult(line(result));
    }
    onProgress(names.indexOf(name) + 1, names.length);
  }
  return { circumstances: about, results };
}
