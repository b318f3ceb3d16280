import { existsSync } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { type Browser, chromium, type Locator } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { planSync } from '../../lib/eplb/plan.js';
import { simulate } from '../../lib/eplb/simulate.js';
import { generateTrace } from '../../lib/eplb/trace.js';
import { planReport } from '../../lib/report/plan_report.js';
import { writeReport } from '../../lib/report/report_file.js';
import { simulationReport } from '../../lib/report/simulation_report.js';

const executablePath = '/usr/bin/chromium';
const installed = existsSync(executablePath);
if (!installed) console.warn(`skipped: the browser tests need ${executablePath} (Debian package chromium)`);

const loads = generateTrace({ kind: 'bursty', steps: 24, layers: 6, experts: 64, seed: 2 });
const plan = planSync({ loads, devices: 8, slots: 9 });
const others = ['greedy', 'linear'].map((policy) => planSync({ loads, devices: 8, slots: 9, policy }));
const oneStep = loads.window(0, 1);
const step = planSync({ loads: oneStep, devices: 8, slots: 9 });
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'moe-report-'));
  const report = planReport({ loads, plan, others, title: 'a <trace> & "more"' });
  await writeReport(join(folder, 'plan.html'), report);
  await writeReport(join(folder, 'plan.svg'), report);
  await writeReport(
    join(folder, 'step.html'),
    planReport({ loads: oneStep, plan: step, others, title: 'one' }),
  );
  const asked = { devices: 8, slots: 9, policies: ['adaptive', 'greedy', 'linear'] };
  const figures = await simulate(loads, { ...asked, window: 6 });
  const given = [['most moves', '7']] as const;
  await writeReport(join(folder, 'simulation.html'), simulationReport({ figures, title: 'trace', given }));
  const once = await simulate(loads, { ...asked, window: 12 });
  await writeReport(join(folder, 'once.html'), simulationReport({ figures: once, title: 'one plan' }));
  const [alone, far] = await simulate(loads, { ...asked, policies: ['adaptive', 'linear'], window: 6 });
  await writeReport(
    join(folder, 'alone.html'),
    simulationReport({ figures: [alone!, far!], title: 'one good policy' }),
  );
  const long = generateTrace({ kind: 'steady', steps: 500, layers: 2, experts: 16, seed: 2 });
  const still = planSync({ loads: long, devices: 4, slots: 5, maxMoves: 0 });
  await writeReport(
    join(folder, 'still.html'),
    planReport({ loads: long, plan: still, title: 'nothing moves', given: [['most moves', '0']] }),
  );
});
afterAll(() => rm(folder, { recursive: true }));

describe('report files', () => {
  it('are self-contained: nothing is loaded and no script runs', async () => {
    for (const name of ['plan.html', 'simulation.html', 'plan.svg']) {
      const text = await readFile(join(folder, name), 'utf8');
      expect(text).not.toMatch(/<script|<link|<img|url\(http|src=|href="http/);
      expect(text).toContain('</svg>');
    }
    expect(await readFile(join(folder, 'plan.html'), 'utf8')).toContain(
      'a &#60;trace&#62; &#38; &#34;more&#34;',
    );
  });

  it('are refused under other names', async () => {
    await expect(
      writeReport(join(folder, 'plan.txt'), planReport({ loads, plan, title: '' })),
    ).rejects.toThrow('ending in .html or .svg');
    await expect(
      writeReport('/nowhere/plan.html', planReport({ loads, plan, title: '' })),
    ).rejects.toMatchObject({ code: 'ERR_MOE_CHECKPOINT' });
  });
});

describe.skipIf(!installed)('in a browser', () => {
  let browser: Browser;
  beforeAll(async () => {
    browser = await chromium.launch({
      executablePath,
      args: [
        '--no-sandbox',
        '--disable-gpu',
        '--disable-quic',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
      ],
    });
  }, 30_000);
  afterAll(() => browser?.close());

  const show = async (name: string) => {
    const page = await browser.newPage({ viewport: { width: 1100, height: 900 } });
    const problems: string[] = [];
    page.on('console', (message) => message.type() === 'error' && problems.push(message.text()));
    page.on('pageerror', (error) => problems.push(error.message));
    page.on('request', (request) => request.url().startsWith('file:') || problems.push(request.url()));
    await page.goto(pathToFileURL(join(folder, name)).href);
    return { page, problems };
  };

  it('the plan report shows its pictures, its figures and no error', async () => {
    const { page, problems } = await show('plan.html');
    expect(await page.title()).toBe('Expert placement plan: a <trace> & "more"');
    expect(await page.locator('h2').allTextContents()).toEqual([
      'Heat of experts by layer',
      'Device load, before and after',
      'Peak over average by layer',
      'PAR over time',
      'Moves by layer',
      'Figures',
    ]);
    const svgs = page.locator('figure > svg');
    expect(await svgs.count()).toBe(5);
    for (let index = 0; index < 5; index++) {
      const box = (await svgs.nth(index).boundingBox())!;
      expect(box.width).toBeGreaterThan(200);
      expect(box.height).toBeGreaterThan(80);
      expect(box.x + box.width).toBeLessThanOrEqual(1100);
    }
    // One rectangle for each cell: experts x layers, then devices x layers before and after
    expect(await svgs.nth(0).locator('g.mark-rect.role-mark path').count()).toBe(64 * 6);
    expect(await svgs.nth(1).locator('g.mark-rect.role-mark path').count()).toBe(2 * 8 * 6);
    const colours = await svgs
      .nth(0)
      .locator('g.mark-rect.role-mark path')
      .evaluateAll((cells) => new Set(cells.map((cell) => getComputedStyle(cell).fill)).size);
    expect(colours).toBeGreaterThan(20);
    expect(await svgs.nth(4).locator('g.mark-rect.role-mark path').count()).toBe(6);
    // All four, and below them the two near the best
    expect(await svgs.nth(3).locator('g.mark-line path').count()).toBe(4 + 2);
    // The plan's own line lies on top, and is the thickest
    const widths = await svgs
      .nth(3)
      .locator('g.mark-line path')
      .evaluateAll((lines) => lines.map((line) => Number(line.getAttribute('stroke-width'))));
    expect(widths.slice(0, 4)).toEqual([2, 2, 2, 4]);
    const rows = await page.locator('#figures tbody tr').allTextContents();
    expect(rows.length).toBe(6);
    expect(await page.locator('#figures tbody tr:first-child td:nth-child(3)').textContent()).toBe(
      plan.par.after.layers[0]!.toFixed(4),
    );
    expect(await page.locator('#summary').textContent()).toContain(`${plan.moves} in 6 layers`);
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(1100);
    expect(problems).toEqual([]);
    await page.close();
  });

  it('the report of loads without steps has a bar for every policy instead of lines over time', async () => {
    const { page, problems } = await show('step.html');
    expect(await page.locator('h2').nth(3).textContent()).toBe('PAR by policy');
    expect(await page.locator('#summary').textContent()).toContain('1 step of load');
    const picture = page.locator('figure > svg').nth(3);
    expect(await picture.locator('g.mark-rect.role-mark path').count()).toBe(4);
    const labels = await picture.locator('g.mark-text.role-mark text').allTextContents();
    expect(labels[1]).toBe(step.par.after.mean.toFixed(4));
    expect(problems).toEqual([]);
    await page.close();
  });

  it('the simulation report draws a line for every policy', async () => {
    const { page, problems } = await show('simulation.html');
    expect(await page.locator('figure > svg').count()).toBe(2);
    expect(await page.locator('figure > svg').nth(0).locator('g.mark-line path').count()).toBe(3 + 2);
    const labels = await page
      .locator('figure > svg')
      .nth(1)
      .locator('g.mark-text.role-mark text')
      .allTextContents();
    // All three, and below them the two near the best
    expect(labels.sort()).toEqual(['adaptive', 'adaptive', 'greedy', 'greedy', 'linear']);
    expect(await page.textContent('body')).toMatch(/1 is perfect[\s\S]*Same: PAR of the window/);
    expect(problems).toEqual([]);
    await page.close();
  });

  const labels = (picture: Locator) => picture.locator('g.role-axis-label text').allTextContents();

  it('a plan that moves nothing over many steps has whole axes', async () => {
    const { page, problems } = await show('still.html');
    const summary = await page.locator('#summary').textContent();
    expect(summary).toMatch(/most moves\s*0[\s\S]*transfers\s*none/);
    // Steps are numbered as in the loads though neighbours are averaged
    const steps = await labels(page.locator('figure > svg').nth(3));
    expect(Math.max(...steps.map(Number))).toBeGreaterThan(400);
    const moves = await labels(page.locator('figure > svg').nth(4));
    expect(moves).toEqual(['0', '1', '0', '1']);
    expect(problems).toEqual([]);
    await page.close();
  });

  it('a simulation of one plan has bars, and one good policy is drawn once', async () => {
    const { page } = await show('once.html');
    expect(await page.locator('h2').nth(0).textContent()).toBe('PAR by policy');
    expect(await page.locator('figure > svg').nth(0).locator('g.mark-rect.role-mark path').count()).toBe(3);
    await page.close();
    const other = (await show('alone.html')).page;
    expect(await other.locator('figure > svg').nth(0).locator('g.mark-line path').count()).toBe(2);
    await other.close();
  });

  it('pictures keep the size of their labels in a narrow window', async () => {
    const { page } = await show('plan.html');
    await page.setViewportSize({ width: 480, height: 800 });
    const { width } = (await page.locator('figure > svg').nth(0).boundingBox())!;
    expect(width).toBeGreaterThan(900);
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(480);
    await page.close();
  });

  it('the SVG opens on its own', async () => {
    const { page, problems } = await show('plan.svg');
    const box = await page.evaluate(() => {
      const { width, height } = document.documentElement.getBoundingClientRect();
      return {
        width,
        height,
        nested: document.querySelectorAll('svg svg').length,
        name: document.documentElement.nodeName,
      };
    });
    expect(box).toMatchObject({ name: 'svg', nested: 5 });
    expect(box.width).toBeGreaterThan(700);
    const words = await page.evaluate(() => document.documentElement.textContent);
    expect(words).toContain('Expert placement plan: a <trace> & "more"');
    expect(words).toContain(`${plan.moves} in 6 layers`);
    expect(words).toContain('tokens split evenly over replicas. White is balanced.');
    expect(problems).toEqual([]);
    await page.close();
  });
});
