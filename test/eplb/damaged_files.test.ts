// Files with bytes changed, cut out or doubled: every one is read or refused by name, and nothing else happens.
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { parseLoads, type ReadLoadsOptions } from '../../lib/eplb/load_file.js';
import { formatNpy } from '../../lib/eplb/npy.js';
import { MoeError } from '../../lib/errors.js';
import { formatExpertMap, parseExpertMap } from '../../lib/placement/expert_map_file.js';
import { redundantPlacement } from '../../lib/placement/strategies.js';
import { Random } from '../cases/random.js';

const text = (value: string) => new TextEncoder().encode(value);
const counts = Float64Array.from({ length: 24 }, (_, index) => index % 7);
const nested = [0, 1, 2].map((layer) => [...counts.subarray(layer * 8, layer * 8 + 8)]);
const lines = nested.flatMap((row, layer) => row.map((count, expert) => `0,${layer},${expert},${count}`));
const maps = Array.from({ length: 3 }, () => redundantPlacement(8, 2, 2));
const topk = { experts: 7, stepTokens: 2 };

const loads =
  (file: string, options?: ReadLoadsOptions) =>
  (bytes: Uint8Array): unknown =>
    parseLoads(bytes, file, options);
const map = (bytes: Uint8Array): unknown =>
  parseExpertMap(new TextDecoder().decode(bytes), { file: 'map.json', devices: 2, experts: 8 });
const recorded = (mode: string) => new Uint8Array(readFileSync(`test/fixtures/recorder/${mode}.pt`));

const files: [name: string, whole: Uint8Array, read: (bytes: Uint8Array) => unknown][] = [
  ['counts.npy', formatNpy([3, 8], counts), loads('counts.npy')],
  ['ids.npy', formatNpy([2, 6, 2], counts), loads('ids.npy', { topk })],
  ['counts.json', text(JSON.stringify(nested)), loads('counts.json')],
  ['ids.json', text(JSON.stringify([nested, nested])), loads('ids.json', { topk })],
  ['counts.csv', text(['step,layer,expert,count', ...lines].join('\n')), loads('counts.csv')],
  ...['stat', 'per_pass', 'per_token'].map((mode): (typeof files)[number] => [
    `${mode}.pt`,
    recorded(mode),
    loads(`${mode}.pt`),
  ]),
  ['map.json of vllm-ascend', text(formatExpertMap(maps, 'vllm-ascend')), map],
  ['map.json of SGLang', text(formatExpertMap(maps, 'sglang')), map],
];

function damage(whole: Uint8Array, random: Random): Uint8Array {
  const bytes = [...whole];
  for (let change = 0; change <= random.integer(3); change++) {
    const at = random.integer(bytes.length);
    const part = bytes.slice(at, at + 1 + random.integer(8));
    const how = random.integer(4);
    if (how === 0) bytes[at] = random.integer(256);
    else if (how === 1) bytes[at]! ^= 1 << random.integer(8);
    else if (how === 2) bytes.splice(at, part.length);
    else bytes.splice(at, 0, ...part);
  }
  return Uint8Array.from(bytes);
}

describe('damaged files', () => {
  it.each(files)('%s', (name, whole, read) => {
    expect(() => read(whole)).not.toThrow();
    const random = new Random(7);
    let refused = 0;
    for (let round = 0; round < 600; round++) {
      const bytes = damage(whole, random);
      try {
        read(bytes);
      } catch (error) {
        refused++;
        if (error instanceof MoeError && error.message.includes(`${name.split(' ')[0]}: `)) continue;
        const shown = Buffer.from(bytes).toString('base64').slice(0, 2000);
        throw new Error(`round ${round} of ${name}: ${shown}`, { cause: error });
      }
    }
    expect(refused).toBeGreaterThan(10);
  });
});
