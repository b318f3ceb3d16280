// The table of `moe-kernels bench`, of what the committed runs measured.
import { readFileSync } from 'node:fs';
import { expect, it } from 'vitest';
import type { Measurement } from '../../bench/harness.js';
import { header, line } from '../../bench/report.js';

it.each(['cpu-amd-epyc', 'cpu-pack-amd-epyc'])('lines of %s are aligned, the longest cases too', (name) => {
  const file = new URL(`../../bench/results/${name}.json`, import.meta.url);
  const { results } = JSON.parse(readFileSync(file, 'utf8')) as { results: Measurement[] };
  const begin = header().indexOf('path');
  expect(results.length).toBeGreaterThan(0);
  for (const one of results) {
    expect(line(one).slice(begin)).toBe(one.path);
    expect(line(one)[begin - 1]).toBe(' ');
  }
});
