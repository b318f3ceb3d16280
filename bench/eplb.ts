// Planners on traces: quality, moves and time of every policy on every trace in one table, what moves buy, what noise
// costs, and what weighted dispatch adds. Run the compiled file; --shapes 32x9,64x5 takes some of the shapes (what needs
// 32x9 only runs with it), with --json FILE the rows are written there too, beside what other runs left in it.
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { dispatchShares, sharedDeviceLoads } from '../lib/eplb/dispatch_shares.js';
import { Loads } from '../lib/eplb/loads.js';
import { deviceLoads, peakToAverage } from '../lib/eplb/metrics.js';
import { planSync } from '../lib/eplb/plan.js';
import { policies } from '../lib/eplb/registry.js';
import { type PolicyFigures, simulate } from '../lib/eplb/simulate.js';
import { generateTrace } from '../lib/eplb/trace.js';

const layers = 58;
const window = 64;
const windows = 4;
const experts = 256;

type Row = Record<string, string | number>;
const results: Record<string, Row[]> = {};

const record = (table: string, row: Row): void => {
  const rows = results[table] ?? [];
  results[table] = rows;
  if (rows.length === 0)
    console.log(
      `\n${table}\n${Object.keys(row)
        .map((name, index) => (index < 3 ? name.padEnd(16) : name.padStart(10)))
        .join('')}`,
    );
  rows.push(row);
  console.log(
    Object.values(row)
      .map((value, index) => {
        const text =
          typeof value === 'number'
            ? Number.isInteger(value)
              ? String(value)
              : value >= 10
                ? value.toFixed(1)
                : value.toFixed(4)
            : value;
        return index < 3 ? text.padEnd(16) : text.padStart(10);
      })
      .join(''),
  );
};

const figuresRow = (figures: PolicyFigures): Row => ({
  same: figures.parSame,
  next: figures.parNext,
  same_step: figures.parStepSame,
  next_step: figures.parStepNext,
  moves1: figures.movesFirst,
  moves: figures.moves,
  layers: figures.layersTouched,
  ms1: figures.msFirst,
  ms: figures.ms,
});

/** Windows of one popularity and of another in turn. */
function alternating(): Loads {
  const phases = [31, 32].map((seed) =>
    generateTrace({ kind: 'steady', steps: (window * windows) / 2, layers, experts, seed, tokens: 2048 }),
  );
  const counts = new Float64Array(window * windows * layers * experts);
  for (let index = 0; index < windows; index++)
    counts.set(
      phases[index % 2]!.window((index >> 1) * window, window).counts,
      index * window * layers * experts,
    );
  return new Loads({ steps: window * windows, layers, experts }, counts);
}

const trace = (kind: 'steady' | 'drifting' | 'bursty' | 'mixed', seed: number, tokens: number): Loads =>
  generateTrace({ kind, steps: window * windows, layers, experts, seed, tokens, groups: 8 });

const traces: Record<string, Loads> = {
  steady: trace('steady', 1, 2048),
  'steady, small': trace('steady', 2, 256),
  drifting: trace('drifting', 3, 4096),
  'drifting, small': trace('drifting', 4, 1024),
  bursty: trace('bursty', 5, 2048),
  mixed: trace('mixed', 6, 4096),
  alternating: alternating(),
};

const option = (name: string): string | undefined => {
  const at = process.argv.indexOf(`--${name}`);
  return at < 0 ? undefined : process.argv[at + 1];
};
const only = option('shapes')?.split(',') ?? ['32x9', '16x17', '8x36', '64x5', '64x4', '32x9 shared'];
const machine = {
  cpu: cpus()[0]!.model,
  node: process.version,
  date: new Date().toISOString().slice(0, 10),
  command: 'node bench/eplb.js (compiled)',
};
console.log(
  Object.entries(machine)
    .map(([name, value]) => `${name}: ${value}`)
    .join(', '),
);
console.log(
  `${layers} layers, ${experts} experts, ${windows} windows of ${window} steps; ms is for all layers on one thread`,
);

// Let the code warm up before the clock counts
await simulate(trace('drifting', 9, 512), { devices: 32, slots: 9, window, policies: [...policies.keys()] });

const atShape = new Map<string, Map<string, PolicyFigures[]>>();
for (const shape of only) {
  const shared = shape.endsWith('shared') ? 1 : 0;
  const [devices, slots] = shape.split(' ')[0]!.split('x').map(Number) as [number, number];
  for (const [name, loads] of Object.entries(traces)) {
    const figures = await simulate(shared ? loads.withShared(1, 8) : loads, {
      devices,
      slots,
      shared,
      window,
      policies: [...policies.keys()],
    });
    if (!shared) atShape.set(shape, (atShape.get(shape) ?? new Map()).set(name, figures));
    for (const row of figures)
      record('Every policy on every trace', { shape, trace: name, policy: row.name, ...figuresRow(row) });
  }
}

/** adaptive on a trace with a budget; the first plan, before serving, has none. */
async function within(shape: string, trace: string, maxMoves?: number): Promise<PolicyFigures> {
  const [devices, slots] = shape.split('x').map(Number) as [number, number];
  const budget = maxMoves === undefined ? {} : { maxMoves };
  const [row] = await simulate(traces[trace]!, { devices, slots, window, policies: ['adaptive'], ...budget });
  return row!;
}

const publicOnes = ['deepseek', 'greedy', 'swift', 'flashlb'];
for (const [shape, ofTraces] of atShape)
  for (const [trace, figures] of ofTraces) {
    const flashlb = figures.find((row) => row.name === 'flashlb')!;
    const budgets: [string, number | undefined][] = [0, 1 / 8, 1 / 4, 1 / 2].map((part) => {
      const moves = Math.floor(flashlb.moves * part);
      return [String(moves), moves];
    });
    for (const [budget, maxMoves] of [
      ...budgets,
      ['none', undefined] as const,
      ['free', Number.POSITIVE_INFINITY] as const,
    ]) {
      const row = await within(shape, trace, maxMoves);
      record('What moves buy: adaptive with parts of the moves of flashlb as its budget', {
        shape,
        trace,
        budget,
        moves: row.moves,
        same: row.parSame,
        next_step: row.parStepNext,
        flashlb: flashlb.parStepNext,
        ms: row.ms,
      });
    }
  }

for (const [shape, ofTraces] of atShape)
  for (const [trace, figures] of ofTraces)
    for (const peer of figures.filter(({ name }) => publicOnes.includes(name))) {
      const row = await within(shape, trace, Math.floor(peer.moves));
      record('Every public planner, and adaptive with its moves as a budget', {
        shape,
        trace,
        planner: peer.name,
        moves: peer.moves,
        next_step: peer.parStepNext,
        our_moves: row.moves,
        ours: row.parStepNext,
        percent: 100 * (row.parStepNext / peer.parStepNext - 1),
      });
    }

if (only.includes('32x9')) weightedDispatch();

function weightedDispatch(): void {
  for (const [name, loads] of Object.entries(traces)) {
    const { placements } = planSync({
      loads: loads.window(0, window),
      devices: 32,
      slots: 9,
      policy: 'greedy',
    });
    const sums = { even: 0, oracle: 0, causal: 0, step: 0, stepLp: 0, us: 0 };
    let steps = 0;
    for (let layer = 0; layer < layers; layer++) {
      const placement = placements[layer]!;
      const next = loads.window(window, window);
      const total = next.total(layer);
      const past = dispatchShares(placement, loads.window(0, window).total(layer)).shares;
      sums.even += peakToAverage(deviceLoads(placement, total)) / layers;
      sums.oracle += peakToAverage(dispatchShares(placement, total).deviceLoads) / layers;
      sums.causal += peakToAverage(sharedDeviceLoads(placement, past, total)) / layers;
      for (let step = 0; step < 16; step++, steps++) {
        const counts = next.at(step, layer);
        sums.step += peakToAverage(deviceLoads(placement, counts));
        const start = performance.now();
        const split = dispatchShares(placement, counts, { tolerance: 1e-3 });
        sums.us += 1000 * (performance.now() - start);
        sums.stepLp += peakToAverage(split.deviceLoads);
      }
    }
    record('Weighted dispatch under the greedy placement of the window before, 32x9', {
      trace: name,
      split: 'by window',
      shape: '32x9',
      even: sums.even,
      causal: sums.causal,
      oracle: sums.oracle,
      step_even: sums.step / steps,
      step_own: sums.stepLp / steps,
      us_a_step: sums.us / steps,
    });
  }
}

const file = option('json');
if (file !== undefined) {
  const all: Record<string, Row[]> = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')).results : {};
  for (const [table, rows] of Object.entries(results)) {
    const shapes = new Set(rows.map(({ shape }) => shape));
    all[table] = [...(all[table] ?? []).filter(({ shape }) => !shapes.has(shape!)), ...rows];
  }
  writeFileSync(
    file,
    `${JSON.stringify({ machine, layers, experts, window, windows, results: all }, null, 1)}\n`,
  );
}
