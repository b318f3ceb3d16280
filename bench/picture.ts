// Draws a run of bench/device.ts: node dist/bench/picture.js RESULTS.json PICTURE.svg (or .html)
import { readFileSync } from 'node:fs';
import { writeReport } from '../lib/report/report_file.js';
import { deviceReport } from './device/picture.js';
import type { DeviceReport } from './device/run.js';

const [, , from, to] = process.argv;
if (from === undefined || to === undefined) {
  console.error('usage: node dist/bench/picture.js RESULTS.json PICTURE.svg');
  process.exit(2);
}
await writeReport(to, deviceReport(JSON.parse(readFileSync(from, 'utf8')) as DeviceReport));
