import { existsSync } from 'node:fs';
import { lstat, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { Command } from 'commander';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { readLoads } from '../../lib/eplb/load_file.js';
import { stepPar } from '../../lib/eplb/metrics.js';
import { formatNpy } from '../../lib/eplb/npy.js';
import { startPlacements } from '../../lib/eplb/plan.js';
import { policies } from '../../lib/eplb/registry.js';
import { generateTrace } from '../../lib/eplb/trace.js';
import { buildLibrary } from '../cases/loads_build.js';

let folder: string;
let register: ((program: Command) => void)[];
const file = (name: string) => join(folder, name);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'moe-cli-'));
  const built = await buildLibrary('cli');
  const load = (name: string) => import(pathToFileURL(resolve(built, 'cli', name)).href);
  register = [(await load('plan.js')).registerPlan, (await load('simulate.js')).registerSimulate];
  const trace = generateTrace({
    kind: 'drifting',
    steps: 24,
    layers: 3,
    experts: 32,
    seed: 3,
    driftSteps: 30,
  });
  await writeFile(file('trace.npy'), formatNpy([24, 3, 32], trace.counts));
  await writeFile(
    file('window.json'),
    JSON.stringify([0, 1, 2].map((layer) => [...trace.window(0, 12).total(layer)])),
  );
}, 60_000);
afterAll(() => rm(folder, { recursive: true }));

/** Runs the command line as the main program would: exit code, what it printed, and the error's message. */
const run = async (...args: string[]) => {
  const program = new Command('moe-kernels').exitOverride().configureOutput({ writeErr: () => {} });
  for (const add of register) add(program);
  for (const command of program.commands) command.exitOverride().configureOutput({ writeErr: () => {} });
  let out = '';
  const write = vi.spyOn(process.stdout, 'write').mockImplementation((text) => {
    out += text;
    return true;
  });
  try {
    await program.parseAsync(args, { from: 'user' });
    return { code: 0, out, message: '' };
  } catch (error) {
    return { code: 2, out, message: (error as Error).message };
  } finally {
    write.mockRestore();
  }
};

const shape = ['--devices', '4', '--slots', '9'];

describe('moe-kernels plan', () => {
  it('prints the documented JSON and writes a map that it reads back', async () => {
    const { out, code } = await run(
      'plan',
      '--loads',
      file('window.json'),
      ...shape,
      '--out',
      file('map.json'),
      '--json',
    );
    expect(code).toBe(0);
    const plan = JSON.parse(out);
    expect(Object.keys(plan)).toEqual([
      'policy',
      'ms',
      'layers',
      'devices',
      'slots',
      'par',
      'parStep',
      'moves',
      'layersTouched',
      'placement',
    ]);
    expect(plan).toMatchObject({ policy: 'adaptive', layers: 3, devices: 4, slots: 9, layersTouched: 3 });
    expect(plan.par.after).toBeLessThan(plan.par.before);
    expect([plan.placement.length, plan.placement[0].length, plan.placement[0][0].length]).toEqual([3, 4, 9]);
    const map = JSON.parse(await readFile(file('map.json'), 'utf8'));
    expect(
      map.layer_list.map((layer: { device_list: { device_expert: number[] }[] }) =>
        layer.device_list.map(({ device_expert }) => device_expert),
      ),
    ).toEqual(plan.placement);
    const again = JSON.parse(
      (await run('plan', '--loads', file('window.json'), ...shape, '--current', file('map.json'), '--json'))
        .out,
    );
    expect(again.moves).toBe(0);
  });

  it('takes a budget of moves, and moves that are free', async () => {
    const start = ['plan', '--loads', file('trace.npy'), ...shape, '--current', file('start.json'), '--json'];
    await run(
      'plan',
      '--loads',
      file('window.json'),
      ...shape,
      '--policy',
      'linear',
      '--out',
      file('start.json'),
    );
    const { moves, par } = JSON.parse((await run(...start, '--max-moves', 'unlimited')).out);
    expect(moves).toBeGreaterThan(20);
    expect(par.after).toBeLessThan(1.01);
    expect(JSON.parse((await run(...start, '--max-moves', '5')).out).moves).toBeLessThanOrEqual(5);
    expect((await run(...start, '--max-moves', 'many')).message).toContain(
      "--max-moves to be an integer >= 0 or unlimited but received 'many'",
    );
  });

  it('states bytes and writes who sends what to whom', async () => {
    const { out } = await run(
      'plan',
      '--loads',
      file('window.json'),
      ...shape,
      '--transfers',
      file('transfers.json'),
      '--expert-bytes',
      '1000',
      '--json',
    );
    const plan = JSON.parse(out);
    expect(plan.bytes).toBe(1000 * plan.moves);
    const { layers } = JSON.parse(await readFile(file('transfers.json'), 'utf8'));
    expect(
      layers
        .map((transfers: unknown[]) => transfers.length)
        .reduce((sum: number, count: number) => sum + count, 0),
    ).toBe(plan.moves);
    expect(Object.keys(layers[0][0])).toEqual(['expert', 'from', 'fromSlot', 'to', 'toSlot', 'round']);
  });

  it('sends what the plan moves where shared experts are on every device from the start', async () => {
    const { out } = await run(
      ...['plan', '--loads', file('window.json'), '--devices', '4', '--slots', '9', '--shared', '1'],
      ...['--shared-placement', 'everyDevice', '--transfers', file('shared.json'), '--json'],
    );
    const plan = JSON.parse(out);
    expect(plan.placement.flat().every((device: number[]) => device.at(-1) === 31)).toBe(true);
    const { layers } = JSON.parse(await readFile(file('shared.json'), 'utf8'));
    expect(layers.flat().length).toBe(plan.moves);
    expect(layers.flat().some(({ expert }: { expert: number }) => expert === 31)).toBe(false);
    // One shared expert whose column the router has not counted
    const added = await run(
      ...['plan', '--loads', file('window.json'), '--devices', '4', '--slots', '10', '--shared-top-k', '8'],
      ...['--shared-placement', 'everyDevice', '--json'],
    );
    const { placement } = JSON.parse(added.out);
    expect(placement.flat().every((device: number[]) => device.at(-1) === 32)).toBe(true);
  });

  it("gives DeepSeek's published example as it was published", async () => {
    const weights = [
      [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
      [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ];
    await writeFile(file('published.json'), JSON.stringify(weights));
    const published = ['--loads', file('published.json'), '--devices', '8', '--slots', '2'];
    const hierarchical = ['--policy', 'deepseek', '--groups', '4', '--nodes', '2', '--json'];
    const { placement } = JSON.parse((await run('plan', ...published, ...hierarchical)).out);
    expect(placement.map((layer: number[][]) => layer.flat())).toEqual([
      [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
      [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]);
  });

  it('gives the peaks of the worked example, flashlb at the depth asked for', async () => {
    const loads = [600, 560, 120, 120, 20, 10, 10, 10];
    await writeFile(file('worked.json'), JSON.stringify([loads]));
    const worked = ['plan', '--loads', file('worked.json'), '--devices', '8', '--slots', '2', '--json'];
    const peak = async (...policy: string[]) =>
      JSON.parse((await run(...worked, '--policy', ...policy)).out).par.after * 181.25;
    expect(await peak('adaptive')).toBeCloseTo(590 / 3, 9);
    expect(await peak('greedy')).toBeCloseTo(232, 9);
    expect(await peak('flashlb')).toBeCloseTo(200, 9);
    expect(await peak('flashlb', '--depth', '2')).toBeCloseTo(205, 9);
    expect((await run(...worked, '--depth', '0')).message).toContain('--depth to be an integer >= 1');
  });

  it('never overwrites its loads, and no output with another', async () => {
    const plan = ['plan', '--loads', file('window.json'), ...shape];
    const loads = await readFile(file('window.json'), 'utf8');
    await symlink('window.json', file('alias.json'));
    for (const name of ['window.json', 'alias.json', join('..', basename(folder), 'window.json')])
      expect((await run(...plan, '--out', file(name))).message).toContain(
        'expected --out to be another file than --loads',
      );
    expect((await run(...plan, '--out', file('a.json'), '--transfers', file('a.json'))).message).toContain(
      'expected --transfers to be another file than --out',
    );
    expect((await run(...plan, '--out', '/dev/null', '--transfers', '/dev/null')).code).toBe(0);
    expect(await readFile(file('window.json'), 'utf8')).toBe(loads);
    // The map in use may be replaced by the next one
    await run(...plan, '--policy', 'linear', '--out', file('use.json'));
    const inUse = [...plan, '--current', file('use.json')];
    expect((await run(...inUse, '--out', file('use.json'))).code).toBe(0);
    expect((await run(...inUse, '--transfers', file('use.json'))).message).toContain(
      'expected --transfers to be another file than --current',
    );
  });

  it.skipIf(!existsSync('/dev/full'))('writes nothing where a device takes no more', async () => {
    await writeFile(file('kept.json'), 'kept');
    const before = (await readdir(folder)).sort();
    const plan = ['plan', '--loads', file('window.json'), ...shape, '--out', file('kept.json')];
    const { code, message } = await run(...plan, '--transfers', '/dev/full');
    expect(code).toBe(2);
    expect(message).toContain('/dev/full: cannot be written (ENOSPC');
    expect(await readFile(file('kept.json'), 'utf8')).toBe('kept');
    expect((await readdir(folder)).sort()).toEqual(before);
  });

  it('leaves links, pipes and devices what they are', async () => {
    await writeFile(file('old.json'), 'old');
    await symlink('old.json', file('link.json'));
    const plan = ['plan', '--loads', file('window.json'), ...shape];
    const { code } = await run(...plan, '--out', file('link.json'), '--transfers', '/dev/null');
    expect(code).toBe(0);
    expect(JSON.parse(await readFile(file('old.json'), 'utf8')).moe_layer_count).toBe(3);
    expect((await lstat(file('link.json'))).isSymbolicLink()).toBe(true);
    expect((await lstat('/dev/null')).isCharacterDevice()).toBe(true);
  });

  it('reads traces, top-k ids and counts per slot', async () => {
    expect((await run('plan', '--loads', file('trace.npy'), ...shape, '--policy', 'greedy')).out).toMatch(
      /^policy +greedy/,
    );
    const ids = Uint8Array.from({ length: 2 * 40 * 2 }, (_, index) => (index * 7 + (index >> 3)) % 6);
    await writeFile(file('ids.npy'), formatNpy([2, 40, 2], ids));
    const topk = await run(
      'plan',
      '--loads',
      file('ids.npy'),
      '--topk',
      '--experts',
      '6',
      '--step-tokens',
      '10',
      '--devices',
      '2',
      '--slots',
      '4',
      '--json',
    );
    expect(JSON.parse(topk.out)).toMatchObject({ layers: 2, devices: 2 });
    await run(
      'plan',
      '--loads',
      file('window.json'),
      ...shape,
      '--out',
      file('sglang.json'),
      '--format',
      'sglang',
    );
    await writeFile(
      file('slots.json'),
      JSON.stringify(
        [0, 1, 2].map((layer) => Array.from({ length: 36 }, (_, slot) => 10 + slot * (layer + 1))),
      ),
    );
    const physical = await run(
      'plan',
      '--loads',
      file('slots.json'),
      '--physical',
      '--current',
      file('sglang.json'),
      ...shape,
      '--max-moves',
      '3',
      '--json',
    );
    expect(physical.message).toBe('');
    expect(JSON.parse(physical.out).moves).toBeLessThanOrEqual(3);
    const shared = await run(
      'plan',
      '--loads',
      file('window.json'),
      '--devices',
      '4',
      '--slots',
      '10',
      '--shared',
      '1',
      '--shared-top-k',
      '8',
      '--json',
    );
    expect(new Set(JSON.parse(shared.out).placement[0].flat()).size).toBe(33);
  });

  it.each([
    [['--loads', 'none.npy', '--devices', '4', '--slots', '9'], 'none.npy: cannot be read'],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '7'],
      'window.json: expected at least 32 slots for 32 experts but received 4 devices x 7 slots',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '33'],
      'window.json: expected at most 32 slots per device',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--groups', '3'],
      'window.json: expected 32 routed experts to divide by groups but received 3',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--nodes', '3'],
      'expected devices to divide by 3 nodes but received 4',
    ],
    [
      ['--loads', '@window.json', '--devices', 'four', '--slots', '9'],
      "expected --devices to be an integer >= 1 but received 'four'",
    ],
    [['--loads', '@window.json', '--devices', '4'], "required option '--slots <n>' not specified"],
    [
      ['--loads', '@zero.json', '--devices', '4', '--slots', '9'],
      'zero.json: layer 1: expected some load but received all zero; --keep-degenerate leaves such layers',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--physical'],
      'expected --current with --physical',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--topk'],
      'expected --experts and --step-tokens',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--current', '@two.json'],
      'two.json: expected 3 layers',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--report', 'x.pdf'],
      'ending in .html or .svg but received x.pdf',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--experts', '32'],
      'expected --topk with --experts',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--shared', '0', '--shared-top-k', '8'],
      'expected --shared to be at least 1 with --shared-top-k',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--shared-placement', 'everyDevice'],
      'expected --shared with --shared-placement everyDevice',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--shared-placement', 'twice'],
      "expected --shared-placement to be free or everyDevice but received 'twice'",
    ],
    [
      [
        ...['--loads', '@window.json', '--devices', '4', '--slots', '9', '--physical', '--shared-top-k', '8'],
        ...['--current', '@eight.json'],
      ],
      'expected no --shared-top-k with --physical',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--current', '@eight.json'],
      'eight.json: layer 0: expected 4 devices but received 8',
    ],
    [
      ['--loads', '@window.json', '--devices', '8', '--slots', '9', '--current', '@eight.json'],
      'eight.json: expected 9 slots on every device (--slots) but received 5',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--report', '@nowhere/x.svg'],
      'nowhere/x.svg: cannot be written',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--transfers', '@nowhere/x.json'],
      'nowhere/x.json: cannot be written',
    ],
    [
      ['--loads', '@window.json', '--devices', '4', '--slots', '9', '--policy', 'best'],
      'policy to be one of adaptive',
    ],
  ])('refuses %j', async (args, message) => {
    const zero = [
      Array.from({ length: 32 }, (_, index) => index),
      new Array(32).fill(0),
      new Array(32).fill(1),
    ];
    await writeFile(file('zero.json'), JSON.stringify(zero));
    await writeFile(
      file('two.json'),
      JSON.stringify([0, 1].map(() => Array.from({ length: 36 }, (_, slot) => slot % 32))),
    );
    const eight = [0, 1, 2].map(() =>
      Array.from({ length: 8 }, (_, device) => [0, 1, 2, 3, 4].map((slot) => (device * 5 + slot) % 32)),
    );
    await writeFile(file('eight.json'), JSON.stringify({ placement: eight }));
    const before = (await readdir(folder)).sort();
    const result = await run(
      'plan',
      ...args.map((arg) => (arg.startsWith('@') ? file(arg.slice(1)) : arg)),
      '--out',
      file('never.json'),
    );
    expect(result.code).toBe(2);
    expect(result.message).toContain(message);
    expect((await readdir(folder)).sort()).toEqual(before);
  });
});

describe('moe-kernels simulate', () => {
  it('prints the documented JSON for every policy', async () => {
    const { out } = await run('simulate', '--trace', file('trace.npy'), ...shape, '--window', '8', '--json');
    const { policies: rows } = JSON.parse(out) as { policies: Record<string, number | string>[] };
    expect(rows.map((row) => row.name)).toEqual([...policies.keys()]);
    const numbers = ['parSame', 'parNext', 'parStepSame', 'parStepNext', 'moves', 'layersTouched', 'ms'];
    for (const row of rows) {
      expect(Object.keys(row)).toEqual(['name', ...numbers]);
      for (const field of numbers) expect(typeof row[field], field).toBe('number');
    }
  });

  it('names a policy once however often it is asked for, and tells of every plan when asked', async () => {
    const asked = ['--policies', 'greedy, linear,greedy', '--json', '--by-plan'];
    const { out } = await run(
      ...['simulate', '--trace', file('trace.npy'), ...shape, '--window', '8', ...asked],
    );
    const { policies: rows } = JSON.parse(out);
    expect(rows.map(({ name }: { name: string }) => name)).toEqual(['greedy', 'linear']);
    expect(rows[0].movesByPlan.length).toBe(2);
    expect(rows[0].movesByPlan[0]).toBe(rows[0].movesFirst);
    expect(rows[0].parStepNextByWindow.length).toBe(2);
  });

  it('says in which steps there is no load to plan on, before the first plan', async () => {
    const trace = generateTrace({ kind: 'steady', steps: 9, layers: 2, experts: 8, seed: 3 });
    trace.counts.fill(0, 2 * 16 + 8, 4 * 16 + 8); // layer 1 of steps 2 and 3, layer 0 of steps 3 and 4
    await writeFile(file('gap.npy'), formatNpy([9, 2, 8], trace.counts));
    const gap = ['simulate', '--trace', file('gap.npy'), '--devices', '2', '--slots', '5', '--window', '2'];
    const { message, out } = await run(...gap, '--policies', 'greedy');
    expect(message).toContain('gap.npy: steps 2..3: layer 1: expected some load but received all zero');
    expect(out).toBe('');
    expect((await run(...gap, '--policies', 'greedy', '--keep-degenerate')).code).toBe(0);
  });

  it('prints a table, and what a server would have seen', async () => {
    const { out } = await run(
      'simulate',
      '--trace',
      file('trace.npy'),
      ...shape,
      '--window',
      '8',
      '--policies',
      'adaptive,linear',
      '--max-moves',
      '6',
      '--plan-steps',
      '2',
    );
    const [table, legend] = out.trimEnd().split('\n\n');
    expect(legend).toContain('1 is perfect');
    const lines = table!.split('\n');
    expect(lines[0]).toMatch(/^policy +same +next +same_step +next_step +moves1 +moves +layers +ms +served$/);
    expect(lines.slice(1).map((line) => line.split(' ')[0])).toEqual(['adaptive', 'linear']);
  });

  it('serves shared experts that are on every device', async () => {
    const { out, message } = await run(
      ...['simulate', '--trace', file('trace.npy'), '--devices', '4', '--slots', '10', '--window', '8'],
      ...['--shared-top-k', '8', '--shared-placement', 'everyDevice', '--policies', 'linear'],
      ...['--plan-steps', '1', '--json'],
    );
    expect(message).toBe('');
    const [row] = JSON.parse(out).policies;
    expect(row).toMatchObject({ name: 'linear', moves: 0 });
    // Linear never moves, so it is served as it starts, in every step
    const trace = (await readLoads(file('trace.npy'))).withShared(1, 8);
    const start = startPlacements(3, 33, 4, 10, 1);
    expect(row.parServed).toBeCloseTo(stepPar(trace, start).mean, 12);
  });

  it('refuses unknown policies and windows without a successor', async () => {
    expect(
      (
        await run(
          'simulate',
          '--trace',
          file('trace.npy'),
          ...shape,
          '--window',
          '8',
          '--policies',
          'adaptive,x',
        )
      ).message,
    ).toContain("received 'x'");
    expect((await run('simulate', '--trace', file('trace.npy'), ...shape, '--window', '13')).message).toMatch(
      /trace\.npy: expected a window of at most 12 steps/,
    );
  });

  it.each([
    [['--step-tokens', '4'], 'expected --topk with --experts and --step-tokens'],
    [['--layers-per-step', '2'], 'expected --plan-steps with --layers-per-step'],
    [['--report', 'x.pdf'], 'ending in .html or .svg'],
    [['--by-plan'], 'expected --json with --by-plan'],
  ])('refuses %j, which would do nothing', async (args, message) => {
    const simulate = ['simulate', '--trace', file('trace.npy'), ...shape, '--window', '8'];
    expect(await run(...simulate, ...args)).toMatchObject({
      out: '',
      message: expect.stringContaining(message),
    });
  });
});
