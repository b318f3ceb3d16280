import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  formatExpertMap,
  parseExpertMap,
  readExpertMap,
  writeExpertMap,
} from '../../lib/placement/expert_map_file.js';
import { Placement } from '../../lib/placement/placement.js';

const layers = [
  Placement.fromRows([
    [7, 2, 0, 3, 5],
    [6, 1, 4, 7, 2],
  ]),
  Placement.fromRows([
    [0, 1, 2, 3, 4],
    [5, 6, 7, 0, 1],
  ]),
];
const ascend = () => JSON.parse(formatExpertMap(layers, 'vllm-ascend'));

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'expert-map-'));
});
afterAll(() => rm(folder, { recursive: true }));

describe('expert-map files', () => {
  it('writes the vllm-ascend form of the published example', () => {
    expect(JSON.parse(formatExpertMap(layers.slice(0, 1), 'vllm-ascend'))).toEqual({
      moe_layer_count: 1,
      layer_list: [
        {
          layer_id: 0,
          device_count: 2,
          device_list: [
            { device_id: 0, device_expert: [7, 2, 0, 3, 5] },
            { device_id: 1, device_expert: [6, 1, 4, 7, 2] },
          ],
        },
      ],
    });
    expect(formatExpertMap(layers, 'vllm-ascend')).toContain('\n    "moe_layer_count"'.trim());
  });

  it('reads back what it wrote, in every format', async () => {
    for (const format of ['vllm-ascend', 'sglang', 'vllm'] as const) {
      const file = join(folder, `${format}.json`);
      await writeExpertMap(file, layers, format);
      const read = await readExpertMap(file, { devices: 2, experts: 8 });
      expect(read.map((layer) => layer.toRows())).toEqual(layers.map((layer) => layer.toRows()));
    }
  });

  it('takes the bare [layers][physical] list and the placement of a plan', () => {
    const bare = JSON.stringify(layers.map((layer) => [...layer.physicalToLogical]));
    expect(parseExpertMap(bare, { devices: 2 }).every((layer, index) => layer.equals(layers[index]!))).toBe(
      true,
    );
    const plan = JSON.stringify({ placement: layers.map((layer) => layer.toRows()) });
    expect(parseExpertMap(plan)[1]!.equals(layers[1]!)).toBe(true);
  });

  it('names file, layer and field of what is wrong', async () => {
    const broken = (change: (map: ReturnType<typeof ascend>) => void) => {
      const map = ascend();
      change(map);
      return () => parseExpertMap(JSON.stringify(map), { file: 'map.json' });
    };
    expect(
      broken((map) => {
        map.moe_layer_count = 3;
      }),
    ).toThrow('map.json: expected moe_layer_count to equal the 2 entries');
    expect(
      broken((map) => {
        map.layer_list[1].layer_id = 0;
      }),
    ).toThrow('layer_list[1].layer_id to be 1 but received 0');
    expect(
      broken((map) => {
        map.layer_list[1].device_count = 4;
      }),
    ).toThrow('layer 1: expected device_count');
    expect(broken((map) => void map.layer_list[1].device_list[0].device_expert.pop())).toThrow(
      /map.json: layer 1: .*5 on device 1|slots on every device/,
    );
    expect(
      broken((map) => {
        map.layer_list[0].device_list[0].device_expert[1] = 7;
      }),
    ).toThrow(
      'layer 0: expected every expert at most once on a device but received expert 7 twice on device 0',
    );
    expect(
      broken((map) => {
        map.layer_list[0].device_list[1].device_expert[0] = 'six';
      }),
    ).toThrow('device_list[1].device_expert[0]');
    expect(
      broken((map) => {
        map.layer_list[0].device_list[1].device_id = 9;
      }),
    ).toThrow('device_id to be 1 but received 9');
    expect(
      broken((map) => {
        map.physical_to_logical_map = [];
      }),
    ).toThrow('map.json: expected one map but received layer_list and physical_to_logical_map');
    expect(() => parseExpertMap('{"a": 1}', { file: 'map.json' })).toThrow('expected layer_list');
    expect(() => parseExpertMap('PK\u0003', { file: 'map.json' })).toThrow('map.json: expected JSON');
    expect(() => parseExpertMap('[[0,1]]')).toThrow('the option devices');
    await writeFile(join(folder, 'bad.json'), '[[0,1,2,2],[0,1,2]]');
    await expect(readExpertMap(join(folder, 'bad.json'), { devices: 2 })).rejects.toMatchObject({
      code: 'ERR_MOE_CHECKPOINT',
    });
    await expect(readExpertMap(join(folder, 'none.json'))).rejects.toThrow('cannot be read');
  });

  it('writes a doubled expert only where the format can say it', () => {
    const doubled = [
      Placement.fromRows(
        [
          [0, 0],
          [1, 2],
        ],
        { duplicates: 'allow' },
      ),
    ];
    expect(() => formatExpertMap(doubled, 'vllm-ascend')).toThrow('device 0 holds one twice');
    expect(parseExpertMap(formatExpertMap(doubled, 'sglang'), { devices: 2 })[0]!.toRows()).toEqual([
      [0, 0],
      [1, 2],
    ]);
  });
});
