// Ops on a CUDA device through the package, in tables: what a launch takes with a cold L2 cache (device/timing.ts), the
// floor from ceilings of this very run, what PyTorch takes for the same work in this run where it is installed, and what
// public kernels took when they were recorded (peers.ts).
//
//   node dist/bench/device.js [table...] [--json FILE] [--no-torch]
//   node dist/bench/picture.js FILE PICTURE.svg
//
// Tables: sweep, gates, dispatch, combine, router, shared, experts, calls; default: all of them.
import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { createContext } from '../lib/index.js';
import { measureCeilings, runControl } from './device/controls.js';
import { CALLS, deviceTables, runDeviceBench } from './device/run.js';
import { deviceTiming } from './device/timing.js';

const { values: options, positionals } = parseArgs({
  options: { json: { type: 'string' }, 'no-torch': { type: 'boolean', default: false } },
  allowPositionals: true,
});
const known = [...Object.keys(deviceTables), CALLS];
const unknown = positionals.find((name) => !known.includes(name));
if (unknown !== undefined) {
  console.error(`expected table: one of ${known.join(', ')} but received '${unknown}'`);
  process.exit(2);
}
const report = await runDeviceBench({
  names: positionals.length > 0 ? positionals : known,
  command: ['node dist/bench/device.js', ...positionals, ...(options['no-torch'] ? ['--no-torch'] : [])].join(
    ' ',
  ),
  open: () => createContext({ backend: 'cuda' }),
  tables: deviceTables,
  timing: deviceTiming,
  measureCeilings,
  runControl: options['no-torch']
    ? (script) => ({ script, about: {}, lines: [], note: 'left out (--no-torch)' })
    : (script, seconds) => {
        console.error(`Timing PyTorch for comparison: bench/${script}, at most ${seconds} s ...`);
        return runControl(script, seconds);
      },
  print: console.log,
  progress: console.error,
  save: (report) => {
    if (options.json !== undefined) writeFileSync(options.json, `${JSON.stringify(report, null, 2)}\n`);
  },
}).catch((error: Error) => {
  console.error(error.message);
  process.exit(1);
});
if (Object.values(report.tables).some(({ failures }) => failures.length > 0)) process.exitCode = 1;
