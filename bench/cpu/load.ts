// What MoeLayer.load costs: a checkpoint of one OLMoE layer (64 experts of 2048 x 1024), written to a temporary folder
// and read from the page cache, and its floor: reading the file into one buffer, and the bytes that are then copied and
// packed over the read bandwidth of the run. Every load has a context of its own, whose memory is new: beside it stands
// what such memory costs by itself, which the floor does not count.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  allocateExperts,
  createContext,
  type FloatDType,
  MoeLayer,
  openSafetensors,
} from '../../lib/index.js';
import { type TensorToWrite, writeSafetensors } from '../../lib/model/safetensors_write.js';
import { encode } from '../../lib/tensor.js';
import { Random } from '../../test/cases/random.js';
import { dtypeBytes } from '../layers.js';

const shape = { experts: 64, hidden: 2048, intermediate: 1024 };
const CASES: readonly [stored: FloatDType, held: FloatDType][] = [
  ['bf16', 'bf16'],
  ['f32', 'f32'],
  ['f32', 'bf16'],
];
const RUNS = 5;

/** Every expert has the same numbers: what they are costs nothing. */
async function writeLayer(folder: string, dtype: FloatDType): Promise<void> {
  const { experts, hidden, intermediate } = shape;
  const data = encode(dtype, new Random(1).normals(hidden * intermediate, hidden ** -0.5));
  const tensors: Record<string, TensorToWrite> = {};
  const add = (name: string, rows: number, columns: number) => {
    const elements = rows * columns;
    tensors[`model.layers.0.mlp.${name}.weight`] = {
      dtype,
      shape: [rows, columns],
      data: data.subarray(0, elements) as typeof data,
    };
  };
  add('gate', experts, hidden);
  for (let expert = 0; expert < experts; expert++) {
    add(`experts.${expert}.gate_proj`, intermediate, hidden);
    add(`experts.${expert}.up_proj`, intermediate, hidden);
    add(`experts.${expert}.down_proj`, hidden, intermediate);
  }
  await writeSafetensors(join(folder, 'model.safetensors'), tensors);
  const config = {
    model_type: 'olmoe',
    architectures: ['OlmoeForCausalLM'],
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_experts: experts,
    num_experts_per_tok: 8,
    num_hidden_layers: 1,
    norm_topk_prob: false,
    hidden_act: 'silu',
  };
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config));
}

async function milliseconds(work: () => Promise<unknown>): Promise<number> {
  const begun = performance.now();
  await work();
  return performance.now() - begun;
}

const median = (values: number[]) => values.sort((a, b) => a - b)[values.length >> 1];
const round = (value: number) => Number(value.toPrecision(3));

/** Room for the experts alone, in a context of its own. */
async function allocate(dtype: FloatDType): Promise<void> {
  await using context = await createContext({ backend: 'cpu' });
  const { experts: slots, hidden, intermediate } = shape;
  using _ = allocateExperts(context, { slots, hidden, intermediate, dtype });
  await context.synchronize();
}

/** Every tensor of a checkpoint into one buffer. */
async function readAll(folder: string): Promise<void> {
  await using reader = await openSafetensors(folder);
  const into = new Uint8Array(shape.hidden * shape.intermediate * 4);
  for (const name of reader.names) await reader.read(name, { into });
}

export async function loads(readBandwidth: number) {
  const results = [];
  for (const [stored, held] of CASES) {
    const folder = mkdtempSync(join(tmpdir(), 'moe-kernels-load-'));
    try {
      await writeLayer(folder, stored);
      const weights = 3 * shape.experts * shape.hidden * shape.intermediate;
      const bytes = weights * dtypeBytes(stored);
      const packed = weights * dtypeBytes(held);
      const times: { load: number[]; read: number[]; memory: number[] } = { load: [], read: [], memory: [] };
      let beyond = 0;
      for (let run = 0; run < RUNS; run++) {
        times.read.push(await milliseconds(() => readAll(folder)));
        times.memory.push(await milliseconds(() => allocate(held)));
        await using context = await createContext({ backend: 'cpu' });
        const onProgress = () => {
          beyond = Math.max(beyond, context.memory().reserved - packed);
        };
        const load = async () => {
          using _ = await MoeLayer.load(folder, { layer: 0, context, dtype: held, onProgress });
        };
        times.load.push(await milliseconds(load));
      }
      const controller = new AbortController();
      let abortedAt = 0;
      const abort = ({ done, total }: { done: number; total: number }) => {
        if (done !== total >> 1) return;
        abortedAt = performance.now();
        controller.abort();
      };
      await using context = await createContext({ backend: 'cpu' });
      const options = { layer: 0, context, dtype: held, onProgress: abort, signal: controller.signal };
      await MoeLayer.load(folder, options).catch(() => {});
      const abortMs = performance.now() - abortedAt;
      const ms = median(times.load);
      const floorMs = median(times.read) + ((3 * bytes + packed) / readBandwidth) * 1e3;
      results.push({
        stored,
        held,
        megabytes: round(bytes / 1e6),
        ms: round(ms),
        gigabytesPerSecond: round(bytes / ms / 1e6),
        floorMs: round(floorMs),
        ofFloor: round(floorMs / ms),
        newMemoryMs: round(median(times.memory)),
        mostMegabytesBeyondWeights: round(beyond / 1e6),
        abortMs: round(abortMs),
      });
    } finally {
      rmSync(folder, { recursive: true });
    }
  }
  return results;
}
