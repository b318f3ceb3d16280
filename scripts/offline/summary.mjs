// What became of the suites, in a file small enough to be kept: node summary.mjs tests.json summary.json
import { readFileSync, writeFileSync } from 'node:fs';
import { relative } from 'node:path';
import { backendStatuses } from '../../dist/lib/index.js';

const [, , from, to] = process.argv;
const { testResults, numPassedTests, numFailedTests, numPendingTests } = JSON.parse(
  readFileSync(from, 'utf8'),
);
const cuda = backendStatuses().find(({ backend }) => backend === 'cuda');
const count = (tests, status) => tests.filter((test) => test.status === status).length;
const suites = testResults
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
  passed: numPassedTests,
  failed: numFailedTests,
  skipped: numPendingTests,
  suites,
};
writeFileSync(to, `${JSON.stringify(summary, null, 2)}\n`);
