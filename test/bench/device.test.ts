// The device bench without a device: every case has what its row needs, small cases of every kind go the whole way on the
// CPU backend, and controls that cannot run say why.
import { describe, expect, it } from 'vitest';
import { type DeviceCase, floorOf } from '../../bench/device/case.js';
import { controlFigures, readControl, runControl } from '../../bench/device/controls.js';
import { gateCase, gateShapes } from '../../bench/device/gate_cases.js';
import { uniformIds } from '../../bench/device/inputs.js';
import { expertsCase, routerCase, sharedCase } from '../../bench/device/matrix_cases.js';
import { combineCase, dispatchCase } from '../../bench/device/move_cases.js';
import { deviceReport } from '../../bench/device/picture.js';
import { deviceTables, runDeviceBench } from '../../bench/device/run.js';
import { createContext } from '../../lib/index.js';
import { renderReportSvg } from '../../lib/report/report_file.js';

const ceilings = { copyBytesPerSecond: 4e12, readBytesPerSecond: 4.1e12, emptyNodeMicroseconds: 0.6 };
const cases = Object.values(deviceTables).flatMap((table) => table.cases);
const find = (name: string, tokens: number): DeviceCase =>
  cases.find((each) => each.name === name && each.tokens === tokens)!;

describe('the tables of the device bench', () => {
  it('begin with 5,000 to 40,000 tokens and name every case once', () => {
    expect(Object.keys(deviceTables)[0]).toBe('sweep');
    const sweep = deviceTables.sweep.cases;
    for (const dtype of ['bf16', 'f32']) {
      const tokens = sweep.filter(({ name }) => name.endsWith(dtype)).map((each) => each.tokens);
      expect(tokens).toEqual([1, 2, 3, 4, 5, 6, 7, 8].map((step) => 5000 * step));
    }
    const names = cases.map(({ op, name, tokens }) => `${op} ${name} ${tokens}`);
    expect(new Set(names).size).toBe(names.length);
  });

  it('have floors of bytes, of matrix products and never under a node of a graph', () => {
    for (const each of cases) {
      const { floorMicroseconds } = floorOf(each, ceilings);
      expect(floorMicroseconds, each.name).toBeGreaterThanOrEqual(1);
      expect(floorMicroseconds, each.name).toBeLessThan(5000);
    }
    const gate = find('256/8/4/8 sigmoid bf16', 40000);
    expect([gate.reads, gate.writes]).toEqual([40000 * 512 + 1024, 40000 * 64]);
    expect(floorOf(gate, ceilings).floor).toBe('bytes');
    const bytes = (reads: number, writes: number) => floorOf({ reads, writes }, ceilings).floorMicroseconds;
    expect(bytes(8e9, 8e9)).toBeCloseTo(4000); // a copy
    expect(bytes(8.2e9, 0)).toBeCloseTo(2000); // a read
    expect(
      floorOf({ reads: 1, writes: 1 }, { ...ceilings, emptyNodeMicroseconds: 1.4 }).floorMicroseconds,
    ).toBe(1.4);
    const product = floorOf({ reads: 1, writes: 1, flops: 8e9 }, { ...ceilings, matmulFlopsPerSecond: 8e14 });
    expect(product).toEqual({ floor: 'matrix product', floorMicroseconds: 10 });
    // 10 rows of 7168 bf16 for every token, as the recorded floors have it
    const permute = find('257 experts, 9 columns, no blocks, rows of 7168 bf16', 4096);
    expect((permute.reads + permute.writes) / 4.27e6).toBeCloseTo(137.7, 0);
    expect(find('256/8/4/8 sigmoid f16', 4096).recorded).toEqual({});
  });

  it('set recorded figures of the same dtype and shape beside each row', () => {
    expect(find('256/8/4/8 sigmoid bf16', 40000).recorded).toEqual({
      'sgl bf16': 64.67,
      'vllm bf16': 103.17,
      'fi bf16': 97.95,
      'cake bf16': 57.62,
    });
    expect(find('256/8/4/8 sigmoid f32', 40000).recorded).toMatchObject({
      'sgl f32': 109.88,
      'torch.compile f32': 1321,
    });
    expect(find('256/8/4/8 sigmoid, 1 shared f32', 4096).recorded).toEqual({ 'sgl f32 +1shared': 25.18 });
    expect(find('384/1/1/8 sigmoid f32', 40000).recorded).toMatchObject({ 'sgl_kimi f32': 113.29 });
    const blocks = find('257 experts, 9 columns, blocks of 128', 40000);
    expect(blocks.recorded).toEqual({ 'sglang align': 208.2, 'vLLM align': 233.84 });
    expect(find('9 columns of 7168 bf16', 4096).recorded).toEqual({ 'vLLM moe_unpermute': 146.6 });
    const experts = cases.filter(({ op }) => op === 'fused_moe');
    expect(experts.length).toBe(21);
    for (const each of experts) expect(Object.keys(each.recorded).length).toBe(7);
  });

  it('route uniformly to different experts in a row, the shared ones last', () => {
    const ids = uniformIds({ tokens: 8192, topK: 8, experts: 256, shared: 1 }, 3);
    const counts = new Int32Array(257);
    for (let t = 0; t < 8192; t++) {
      const row = ids.subarray(9 * t, 9 * t + 9);
      expect(new Set(row).size).toBe(9);
      expect(row[8]).toBe(256);
      for (const id of row) counts[id]++;
    }
    for (const count of counts.subarray(0, 256)) expect(Math.abs(count - 256)).toBeLessThan(6 * 16);
  });
});

describe('a run', () => {
  const small = {
    gates: {
      title: 'Gates',
      cases: [
        ...Object.values(gateShapes).map((shape) => gateCase(shape, 3, 'bf16')),
        gateCase(gateShapes.v3, 5, 'f32'),
      ],
    },
    sweep: {
      title: 'Rows',
      cases: [
        dispatchCase({ tokens: 5, topK: 2, experts: 6, shared: 1, blockSize: 4 }),
        dispatchCase({ tokens: 5, topK: 2, experts: 6, hidden: 16 }),
        combineCase({ tokens: 5, topK: 2, experts: 6, hidden: 16, dtype: 'bf16' }),
        routerCase(3, 32, 8, 'bf16'),
        sharedCase(3, 32, 16),
        expertsCase({ name: 'small', hidden: 32, intermediate: 16, experts: 6, shared: 1, topK: 2 }, 3),
        { ...routerCase(3, 32, 8, 'f32'), name: 'broken', prepare: () => () => expect.fail('on purpose') },
      ],
    },
  };

  it('times every case, keeps what failed with its reason, and saves after every table', async () => {
    const printed: string[] = [];
    const saved: string[][] = [];
    const line = { work: 'experts small', tokens: 3, implementation: 'torch', microseconds: 12 };
    const report = await runDeviceBench({
      names: ['gates', 'sweep', 'calls'],
      command: 'test',
      open: () => createContext({ backend: 'cpu' }),
      tables: small,
      timing: { flushBytes: 1 << 18, turnMilliseconds: 0.1, setBytes: 1 << 12 },
      measureCeilings: () => ceilings,
      runControl: (script) => ({ script, about: { torch: '9', matmulFlopsPerSecond: 7e14 }, lines: [line] }),
      print: (text) => printed.push(text),
      progress: () => {},
      save: ({ tables }) => saved.push(Object.keys(tables)),
    });
    expect(saved).toEqual([['gates'], ['gates', 'sweep'], ['gates', 'sweep'], ['gates', 'sweep']]);
    expect(report.ceilings.before.matmulFlopsPerSecond).toBe(7e14);
    const { gates, sweep } = report.tables;
    expect(gates.failures).toEqual([]);
    expect(gates.results.map(({ case: name }) => name)).toEqual(small.gates.cases.map(({ name }) => name));
    for (const result of [...gates.results, ...sweep.results]) {
      expect(Number.isFinite(result.microseconds)).toBe(true);
      expect(result.launches).toBeGreaterThanOrEqual(2);
      expect(result.path).toMatch(/\w/);
    }
    expect(sweep.results.length).toBe(6);
    expect(sweep.results.at(-1)!.controls).toEqual({ torch: 12 });
    expect(sweep.failures).toMatchObject([{ case: 'broken', reason: 'on purpose' }]);
    const text = printed.join('\n');
    for (const { name } of [...small.gates.cases, ...small.sweep.cases]) expect(text).toContain(name);
    expect(text).toContain('Ceilings before: copy 4.00 TB/s');
    expect(text).toContain('this run: torch 12.00');
    expect(JSON.parse(JSON.stringify(report))).toMatchObject({ command: 'test' });

    // Drawn from the file that was saved
    const { pictures } = deviceReport(JSON.parse(JSON.stringify(report)));
    expect(pictures.map(({ heading }) => heading)).toEqual([
      expect.stringContaining('Gate: 256 experts'),
      expect.stringContaining('small: H 32'),
    ]);
    const svg = await renderReportSvg(deviceReport(report));
    for (const series of ['moe-kernels bf16', 'moe-kernels f32', 'floor', 'torch (this run)']) {
      expect(svg).toContain(series);
    }
  });
});

describe('a control', () => {
  it('is read line by line, whatever its end', () => {
    const stdout = [
      '{"torch": "2.11"}',
      'a warning',
      '{"work": "gate", "tokens": 5, "implementation": "eager", "microseconds": 3.5}',
      '{"work": "gate", "tok',
    ].join('\n');
    const control = { script: 'x', ...readControl(stdout, { status: null, stderr: '', error: timeout }) };
    expect(control).toMatchObject({ about: { torch: '2.11' }, note: 'stopped at its time limit' });
    expect(controlFigures([control], 'gate', 5)).toEqual({ eager: 3.5 });
    expect(controlFigures([control], undefined, 5)).toEqual({});
    expect(readControl('', { status: 1, stderr: 'Traceback\nValueError: no' }).note).toBe(
      'failed (1): ValueError: no',
    );
  });

  it.each(['torch_gate.py', 'torch_experts.py'])('%s tells why it has no times, or has some', (script) => {
    const { lines, note } = runControl(script, 20);
    expect(lines.length > 0 || note !== undefined).toBe(true);
    if (note !== undefined) expect(note).toMatch(/no PyTorch|no CUDA device|no python3|time limit|:/);
    expect(note ?? '').not.toMatch(/SyntaxError|^failed/);
  });
});

const timeout = Object.assign(new Error('spawnSync python3 ETIMEDOUT'), { code: 'ETIMEDOUT' });
