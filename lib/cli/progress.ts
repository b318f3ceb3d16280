// A progress bar for work that takes more than a second, on a terminal only, and on stderr so that output stays clean.
import { Presets, SingleBar } from 'cli-progress';

const PATIENCE_MS = 1000;

export interface Progress {
  update(done: number, total: number): void;
  /** A line of output, with the bar out of its way. */
  print(line: string): void;
  stop(): void;
}

export function progress(what: string, unit: string, enabled: boolean): Progress {
  const begun = performance.now();
  let bar: SingleBar | undefined;
  return {
    update(done, total) {
      if (!enabled || !process.stderr.isTTY) return;
      if (bar === undefined && performance.now() - begun > PATIENCE_MS) {
        const format = `${what} {bar} {value}/{total} ${unit}, {eta_formatted} left`;
        bar = new SingleBar(
          { format, stream: process.stderr, clearOnComplete: true },
          Presets.shades_classic,
        );
        bar.start(total, done);
      }
      bar?.update(done);
    },
    print(line) {
      if (bar !== undefined) process.stderr.write('\r\x1b[K');
      console.log(line);
    },
    stop: () => bar?.stop(),
  };
}
