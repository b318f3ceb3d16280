import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import { gatherHeat, groupCounts, RankHeat } from '../../lib/eplb/heat.js';
import { parseLoads, readLoads } from '../../lib/eplb/load_file.js';
import { Loads } from '../../lib/eplb/loads.js';
import { formatNpy, parseNpy } from '../../lib/eplb/npy.js';
import { Placement } from '../../lib/placement/placement.js';
import { type Saved, torchArchive, torchSave } from '../cases/loads_torch.js';

const text = (value: string) => new TextEncoder().encode(value);
const png = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);

describe('Loads', () => {
  it('takes nested arrays with or without steps', () => {
    expect(
      Loads.fromArrays([
        [1, 2],
        [3, 4],
      ]),
    ).toMatchObject({ steps: 1, layers: 2, experts: 2 });
    const trace = Loads.fromArrays([[[1, 2]], [[3, 4]], [[5, 6]]]);
    expect(trace).toMatchObject({ steps: 3, layers: 1, experts: 2 });
    expect([...trace.total(0)]).toEqual([9, 12]);
    expect(trace.tokens(0, 0) + trace.tokens(1, 0) + trace.tokens(2, 0)).toBe(21);
    expect(() => trace.tokens(3, 0)).toThrow('expected step to be an integer in 0..2');
    expect([...trace.window(1, 2).total(0)]).toEqual([8, 10]);
    expect(trace.windows(2).length).toBe(1);
    expect(trace.episodes(0, 2)).toEqual({ blocks: 1, counts: Float64Array.of(8, 10) });
  });

  it.each([
    [
      [
        [1, Number.NaN],
        [3, 4],
      ],
      'layer 0: expected a finite count >= 0 for expert 1 in step 0 but received NaN',
    ],
    [
      [
        [1, 2],
        [-3, 4],
      ],
      'layer 1: expected a finite count >= 0 for expert 0 in step 0 but received -3',
    ],
    [[[1, 2], [3]], 'layer 1: expected 2 experts (as in layer 0) in step 0 but received 1'],
    [
      [
        [[1, 2]],
        [
          [3, 4],
          [5, 6],
        ],
      ],
      'step 1: expected 1 layers (as in step 0) but received 2',
    ],
    [
      [
        [1, null],
        [3, 4],
      ],
      'layer 0: expected a count for expert 1 in step 0 but received null',
    ],
    [[1, 2], 'an empty or flat list'],
  ])('refuses %j', (nested, message) => {
    expect(() => Loads.fromArrays(nested)).toThrow(message);
  });

  it('takes what `load` of moeFusedGate reads as', () => {
    const loads = new Loads({ steps: 1, layers: 1, experts: 3 }, BigInt64Array.of(3n, 0n, 2n ** 40n));
    expect([...loads.counts]).toEqual([3, 0, 2 ** 40]);
    expect(() => new Loads({ steps: 1, layers: 1, experts: 1 }, BigInt64Array.of(-1n))).toThrow(
      'received -1',
    );
  });

  it('refuses counts that sums of would not be exact', () => {
    expect(() => new Loads({ steps: 1, layers: 1, experts: 2 }, [1, 2 ** 53])).toThrow(
      'layer 0: expected a count below 2^53 for expert 1 in step 0 but received 9007199254740992',
    );
    expect([...new Loads({ steps: 1, layers: 1, experts: 2 }, [-0, 2 ** 53 - 1]).counts]).toEqual([
      -0,
      2 ** 53 - 1,
    ]);
  });

  it('counts top-k ids by step, without padding', () => {
    const ids = [0, 1, 1, 2, -1, -1, 2, 0, /* layer 1 */ 2, 1, 0, 1, -1, -1, 0, 1];
    const loads = Loads.fromTopk(ids, { layers: 2, tokens: 4, topK: 2 }, { experts: 3, stepTokens: 2 });
    expect([...loads.counts]).toEqual([1, 2, 1, 1, 2, 1, 1, 0, 1, 1, 1, 0]);
    const valid = Loads.fromTopk(
      ids,
      { layers: 2, tokens: 4, topK: 2 },
      { experts: 3, stepTokens: 1, validTokens: 2 },
    );
    expect(valid.steps).toBe(2);
    expect(() =>
      Loads.fromTopk(ids, { layers: 2, tokens: 4, topK: 2 }, { experts: 2, stepTokens: 2 }),
    ).toThrow('layer 0: expected expert ids in 0..1 or -1 but received 2 for token 1');
  });

  it('turns counts per slot into counts per expert and back to the same sums', () => {
    const placement = Placement.fromRows([
      [0, 1],
      [2, 0],
    ]);
    const physical = new Loads({ steps: 2, layers: 1, experts: 4 }, [5, 1, 2, 7, 1, 0, 0, 1]);
    const logical = Loads.fromPhysical(physical, [placement]);
    expect([...logical.counts]).toEqual([12, 1, 2, 2, 0, 0]);
    expect(() => Loads.fromPhysical(physical, [Placement.fromRows([[0], [1]])])).toThrow(
      'layer 0: expected counts of 2 slots but received 4',
    );
  });

  it('adds shared experts that every token chooses', () => {
    expect([...new Loads({ steps: 1, layers: 1, experts: 3 }, [4, 8, 4]).withShared(2, 8).counts]).toEqual([
      4, 8, 4, 2, 2,
    ]);
  });
});

describe('heat', () => {
  it('reads cumulative and counted group lists alike', () => {
    expect([...groupCounts([2, 2, 7, 9], 'cumulative')]).toEqual([2, 0, 5, 2]);
    expect([...groupCounts([2, 0, 5, 2], 'counts')]).toEqual([2, 0, 5, 2]);
    expect(() => groupCounts([3, 2], 'cumulative')).toThrow('slot 1 has -1 tokens');
  });

  it('keeps the last steps of a ring and never counts a row twice or a dummy step', () => {
    const heat = new RankHeat(2, 3);
    for (let step = 1; step <= 5; step++) heat.record([step, 0], 'counts');
    heat.record([100, 100], 'counts', { dummy: true });
    expect([...heat.stepCounts()]).toEqual([3, 0, 4, 0, 5, 0]);
    expect([...heat.accumulated]).toEqual([15, 0]);
    heat.clear();
    expect([heat.steps, ...heat.accumulated]).toEqual([0, 0, 0]);
  });

  it('gathers ranks into [steps, layers, ranks x slots]', () => {
    const rank = (base: number) =>
      [0, 1].map((layer) => {
        const heat = new RankHeat(2, 2);
        heat.record([base, layer], 'counts');
        heat.record([base + 1, base + layer + 2], 'cumulative');
        return heat;
      });
    const loads = gatherHeat([rank(10), rank(20)]);
    expect(loads).toMatchObject({ steps: 2, layers: 2, experts: 4 });
    expect([...loads.at(0, 1)]).toEqual([10, 1, 20, 1]);
    const uneven = rank(5);
    uneven[1]!.record([1, 1], 'counts');
    uneven[1]!.clear();
    expect(() => gatherHeat([rank(10), uneven])).toThrow('layer 1: expected 2 steps of 2 slots on rank 1');
  });
});

describe('load files', () => {
  const shape = { steps: 2, layers: 2, experts: 3 };
  const counts = Float64Array.from({ length: 12 }, (_, index) => index * 3);
  const same = (loads: Loads) => {
    expect(loads).toMatchObject(shape);
    expect([...loads.counts]).toEqual([...counts]);
  };

  it('reads npy of every layout', () => {
    same(parseLoads(formatNpy([2, 2, 3], counts), 'a.npy'));
    same(parseLoads(formatNpy([2, 2, 3], Int32Array.from(counts)), 'a.npy'));
    same(parseLoads(formatNpy([2, 2, 3], Uint8Array.from(counts)), 'a.npy'));
    const header = (descr: string, order: string, dims: string) => {
      const dict = `{'descr': '${descr}', 'fortran_order': ${order}, 'shape': (${dims}), }`
        .padEnd(117)
        .concat('\n');
      return Uint8Array.from([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, dict.length, 0, ...text(dict)]);
    };
    const file = (head: Uint8Array, data: Uint8Array) => Uint8Array.from([...head, ...data]);
    const bigEndian = new DataView(new ArrayBuffer(12));
    for (const [index, value] of [7, 8, 9].entries()) bigEndian.setInt32(4 * index, value);
    expect([...parseNpy(file(header('>i4', 'False', '3,'), new Uint8Array(bigEndian.buffer))).data]).toEqual([
      7, 8, 9,
    ]);
    expect([...parseNpy(file(header('|u1', 'True', '2, 3'), Uint8Array.of(1, 2, 3, 4, 5, 6))).data]).toEqual([
      1, 3, 5, 2, 4, 6,
    ]);
    const long = new BigInt64Array([1n, 2n ** 40n]);
    expect([...parseNpy(file(header('<i8', 'False', '2,'), new Uint8Array(long.buffer))).data]).toEqual([
      1,
      2 ** 40,
    ]);
    expect([...parseNpy(file(header('<f2', 'False', '2,'), Uint8Array.of(0, 0x3c, 0, 0xc0))).data]).toEqual([
      1, -2,
    ]);
    expect(() => parseNpy(file(header('<i4', 'False', '3,'), Uint8Array.of(1, 2)), 'x.npy')).toThrow(
      'x.npy: expected 12 bytes of data for shape [3] but received 2',
    );
    expect(() => parseNpy(file(header('<c8', 'False', '3,'), Uint8Array.of(1, 2)), 'x.npy')).toThrow('descr');
    expect(() => parseLoads(formatNpy([12], counts), 'x.npy')).toThrow(
      'expected shape [layers, experts] or [steps, layers, experts] but received shape [12]',
    );
  });

  it('reads JSON, CSV and recorder dumps', () => {
    const nested = [0, 1].map((step) =>
      [0, 1].map((layer) => [0, 1, 2].map((expert) => counts[(step * 2 + layer) * 3 + expert]!)),
    );
    same(parseLoads(text(JSON.stringify(nested)), 'a.json'));
    same(parseLoads(text(JSON.stringify({ logical_count: nested })), 'a.json'));
    const lines = nested.flatMap((rows, step) =>
      rows.flatMap((row, layer) => row.map((count, expert) => `${step},${layer},${expert},${count}`)),
    );
    same(parseLoads(text(['step,layer,expert,count', ...lines].join('\n')), 'a.csv'));
    const quoted = ['step,layer,expert,count', ...lines].map((line) => line.replace(/\w+/g, '"$&"'));
    same(parseLoads(text(`\ufeff${quoted.join('\r\n')}`), 'a.csv'));
    same(
      parseLoads(
        text(['Step;Layer;Expert;Count', ...lines.map((line) => line.replaceAll(',', ';'))].join('\n')),
        'a.csv',
      ),
    );
    expect(parseLoads(text('1,2,3\n4,5,6\n'), 'a.csv')).toMatchObject({ steps: 1, layers: 2, experts: 3 });
    same(parseLoads(torchArchive('logical_count', [2, 2, 3], counts), 'a.pt'));
  });

  it('refuses a recorder dump of a big-endian machine, whose numbers would read as others', async () => {
    const whole = await readFile('test/fixtures/recorder/stat.pt');
    const at = whole.indexOf('little');
    expect(at).toBeGreaterThan(0);
    const other = Uint8Array.from([...whole.subarray(0, at), ...text('bigbig'), ...whole.subarray(at + 6)]);
    expect(() => parseLoads(other, 'a.pt')).toThrow('a.pt: expected little-endian storages');
  });

  it.each(['stat', 'per_pass', 'per_token'])('reads what torch.save wrote in mode %s', async (mode) => {
    const folder = 'test/fixtures/recorder';
    const logical: number[][][] = JSON.parse(await readFile(`${folder}/logical.json`, 'utf8'));
    const filled = logical.filter((step) => step.flat().some((count) => count > 0));
    expect([logical.length, filled.length]).toEqual([5, 4]);
    const loads = await readLoads(`${folder}/${mode}.pt`);
    expect(loads).toMatchObject({ steps: 4, layers: 3, experts: 8 });
    expect([...loads.counts]).toEqual(filled.flat(2));
  });

  describe('recorder dumps of single passes', () => {
    // Two layers of four physical experts that hold three logical ones
    const map = { shape: [2, 4], values: [0, 1, 2, 0, 2, 1, 0, 1] };
    const record = (pass: number, fields: [string, Saved][], rank = 0): Saved =>
      new Map<string, Saved>([
        ['forward_pass_id', pass],
        ['rank', rank],
        ['gatherer_key', 'primary'],
        ['input_ids', [7, 70000]],
        ['extend_seq_lens', null],
        ...fields,
      ]);
    const dump = (...records: Saved[]): Uint8Array =>
      torchSave(
        new Map<string, Saved>([
          ['records', records],
          ['last_physical_to_logical_map', map],
        ]),
      );
    const counted = (values: number[]): [string, Saved][] => [
      ['global_physical_count', { shape: [2, 4], values, kind: 'IntStorage' }],
    ];
    const routed = (values: number[]): [string, Saved][] => [
      ['topk_ids_of_layer', { shape: [2, 2, 2], values, kind: 'IntStorage' }],
      ['misc_objects', []],
    ];

    it('counts logical experts pass by pass, in their order, empty passes left out', () => {
      const bytes = dump(
        record(12, counted([1, 2, 3, 4, 5, 6, 7, 8])),
        record(11, routed([0, 3, 1, -1, 0, 1, 2, 3])),
        record(13, counted([0, 0, 0, 0, 0, 0, 0, 0])),
      );
      const loads = parseLoads(bytes, 'a.pt');
      expect(loads).toMatchObject({ steps: 2, layers: 2, experts: 3 });
      expect([...loads.counts]).toEqual([2, 1, 0, 1, 2, 1, 5, 2, 3, 7, 14, 5]);
    });

    it.each([
      [dump(), 'a.pt: expected at least one record'],
      [dump(record(1, [])), 'a.pt: record 0: expected global_physical_count or topk_ids_of_layer'],
      [
        dump(record(1, routed([0, 0, 0, 0, 0, 0, 0, 0])), record(2, routed([0, 0, 0, 0, 0, 0, 0, 9]))),
        'a.pt: record 1: layer 1: expected physical expert ids in 0..3 or -1 but received 9',
      ],
      [
        dump(record(1, counted([1, 0, 0, 0, 0, 0, 0, 1])), record(1, counted([1, 0, 0, 0, 0, 0, 0, 1]), 1)),
        'a.pt: record 1: expected records of rank 0 (as record 0) but received rank 1',
      ],
      [dump(record(1, counted([0, 0, 0, 0, 0, 0, 0, 0]))), 'a.pt: expected a forward pass with tokens'],
      [torchSave(new Map<string, Saved>([['records', []]])), 'a.pt: expected last_physical_to_logical_map'],
    ])('refuses what it cannot count (%#)', (bytes, message) => {
      expect(() => parseLoads(bytes, 'a.pt')).toThrow(message);
    });
  });

  it('reads top-k ids', () => {
    const ids = Uint8Array.of(0, 1, 2, 0, 1, 1, 2, 2);
    const loads = parseLoads(formatNpy([1, 4, 2], ids), 'ids.npy', { topk: { experts: 3, stepTokens: 2 } });
    expect([...loads.counts]).toEqual([2, 1, 1, 0, 2, 2]);
    for (const [name, content] of Object.entries({
      'ids.json': '[[[0,1],[1,0]],"xx"]',
      'other.json': '{"logical_count": [[[0,1]]]}',
      'ids.csv': '0,1\n1,0',
    }))
      expect(() => parseLoads(text(content), name, { topk: { experts: 3, stepTokens: 1 } })).toThrow(
        expect.objectContaining({ code: 'ERR_MOE_CHECKPOINT', message: expect.stringContaining(name) }),
      );
    expect(() =>
      parseLoads(formatNpy([1, 4, 2], ids), 'ids.npy', { topk: { experts: 1e12, stepTokens: 2 } }),
    ).toThrow('ids.npy: expected counts that fit in memory');
    expect(() =>
      parseLoads(text('[[[0,1],[1]]]'), 'ids.json', { topk: { experts: 3, stepTokens: 1 } }),
    ).toThrow('ids.json: layer 0: expected 2 tokens x 2 ids');
  });

  it.each([
    [
      'a.npy',
      text('[[1,2]]'),
      "a.npy: expected the content its name says (.npy) but received text that starts with '[[1,'",
    ],
    [
      'a.npy',
      png,
      'a.npy: expected the content its name says (.npy) but received bytes that start with 89 50',
    ],
    ['a.json', png, 'a.json: expected the content its name says (.json) but received bytes that start with'],
    ['a.npy', new Uint8Array(), 'but received an empty file'],
    [
      'a.json',
      formatNpy([2, 2, 3], counts),
      'a.json: expected the content its name says (.json) but received an npy file',
    ],
    ['a.json', text('[[1,2'), 'a.json: expected JSON'],
    [
      'a.json',
      text('[[1,2],[3,NaN]]'),
      "a.json: layer 1: expected a count for expert 1 in step 0 but received 'NaN'",
    ],
    [
      'a.json',
      text('[[1,2],[3,1e300]]'),
      'a.json: layer 1: expected a count below 2^53 for expert 1 in step 0',
    ],
    [
      'a.json',
      text('{"counts": 3}'),
      'a.json: expected nested lists of counts or an object with logical_count',
    ],
    ['a.json', text('[[1,2],[3,-4]]'), 'a.json: layer 1: expected a finite count >= 0 for expert 1'],
    ['a.csv', text('1,2\n\n3,x'), "a.csv: line 3: layer 1: expected a number in column 2 but received 'x'"],
    [
      'a.csv',
      text('layer,expert,count\n0,0,1\n0,0,2'),
      'a.csv: layer 0: expected one line for expert 0 in step 0 but received two',
    ],
    [
      'a.csv',
      text('layer,expert,count\n0,0,1\n0,1,1\n1,0,2'),
      'a.csv: layer 1: expected one line for each of 1 steps x 2 layers x 2 experts but received none for expert 1',
    ],
    [
      'a.csv',
      text('layer,expert,count\n0,1e15,1'),
      'a.csv: expected one line for each of 1 steps x 1 layers x 1000000000000001 experts but received 1',
    ],
    [
      'a.csv',
      text('layer,expert,count\n0,0,1\n0,0,2\n1,1,2\n1,0,2'),
      'a.csv: layer 0: expected one line for expert 0 in step 0 but received two',
    ],
    ['a.csv', text('layer,expert\n0,1'), 'a.csv: expected a column count in the header'],
    [
      'a.pt',
      torchArchive('rank', [1], Float64Array.of(0)),
      'a.pt: expected a recorder dump with logical_count or records but received rank',
    ],
    [
      'a.pt',
      torchArchive('logical_count', [2, 2, 3], counts).slice(0, 300),
      'a.pt: expected a whole zip archive',
    ],
    ['a.bin', text('x'), 'a.bin: expected a name ending in .npy, .json, .csv or .pt'],
  ])('refuses a bad %s (%#)', (file, bytes, message) => {
    expect(() => parseLoads(bytes, file)).toThrow(message);
    expect(() => parseLoads(bytes, file)).toThrow(expect.objectContaining({ code: 'ERR_MOE_CHECKPOINT' }));
  });

  it('says so when a file is not there', async () => {
    await expect(readLoads('/nowhere/loads.npy')).rejects.toThrow('/nowhere/loads.npy: cannot be read');
  });
});
