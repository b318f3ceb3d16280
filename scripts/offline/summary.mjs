// What became of the suites, in a file small enough to be kept: node summary.mjs summary.json tests.json...
import { readFileSync, writeFileSync } from 'node:fs';
import { relative } from 'node:path';
import { backendStatuses } from '../../dist/lib/index.js';

const [, , to, ...from] = process.argv;
const runs = from.map((file) => JSON.parse(readFileSync(file, 'utf8')));
const sum = (field) => runs.reduce((total, run) => total + run[field], 0);
const cuda = backendStatuses().find(({ backend }) => backend === 'cuda');
const count = (tests, status) => tests.filter((test) => test.status === status).length;
const suites = runs
  .flatMap(({ testResults }) => testResults)
  .map(({ name, assertionResults: tests }) => ({
    file: relative(process.cwd(), name),
    passed: count(tests, 'passed'),
    failed: tests.filter(({ status }) => status === 'failed').map(({ fullName }) => fullName),
    skipped: count(tests, 'skipped') + count(tests, 'pending'),
  }))
  .sort((a, b) => (a.file < b.file ? -1 : 1));
const summary = {
  date: new Date().toISOString().slice(0, 10),
  backend: 'cuda',
  devices: cuda.devices,
  facts: cuda.facts,
  node: process.version,
  passed: sum('numPassedTests'),
  failed: sum('numFailedTests'),
  skipped: sum('numPendingTests'),
  suites,
};
writeFileSync(to, `${JSON.stringify(summary, null, 2)}\n`);
