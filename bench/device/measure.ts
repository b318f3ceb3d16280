// Times the cases of a table and sets floors, recorded figures and controls beside them.
import type { Context } from '../../lib/index.js';
import { type Ceilings, type DeviceResult, type DeviceTable, floorOf } from './case.js';
import { type Control, controlFigures } from './controls.js';
import type { MeasuredTable } from './report.js';
import type { Timer } from './timing.js';

export interface Circumstances {
  readonly context: Context;
  readonly timer: Timer;
  readonly ceilings: Ceilings;
  readonly controls: readonly Control[];
  readonly progress: (text: string) => void;
}

export function measureTable(
  { title, cases }: DeviceTable,
  { context, timer, ceilings, controls, progress }: Circumstances,
): MeasuredTable {
  const results: DeviceResult[] = [];
  const failures: { case: string; tokens: number; reason: string }[] = [];
  for (const given of cases) {
    const { op, name, tokens, flops, recorded } = given;
    try {
      const timing = timer.time(given);
      const floor = floorOf(given, ceilings);
      progress(`${op}, ${name}, ${tokens} tokens: ${timing.microseconds.toFixed(2)} us`);
      const path = context.describe().paths[op] ?? '';
      results.push({
        op,
        case: name,
        tokens,
        ...timing,
        ...floor,
        timesFloor: timing.microseconds / floor.floorMicroseconds,
        tflops: flops === undefined ? null : flops / timing.microseconds / 1e6,
        path,
        programmaticLaunch: /overlapped|programmatic/.test(path), // as kernels that use it name themselves
        recorded,
        controls: controlFigures(controls, given.control, tokens),
      });
    } catch (error) {
      if (context.state !== 'open') throw error;
      failures.push({ case: name, tokens, reason: (error as Error).message });
    }
  }
  return { title, results, failures };
}
