// Recognises quantised checkpoints, so that they are refused by name instead of being read as if they were not.
import type { SafetensorsReader } from './safetensors.js';

/** Tensors that only quantised formats have beside (or instead of) a weight. */
const companions =
  /\.(weight_scale_inv|weight_scale|weight_offset|weight_zero_point|weight_packed|weight_shape|weight_g_idx|input_scale|input_offset|scales|qweight|qzeros|g_idx|absmax|quant_map|quant_bias|deq_scale)$|(_blocks|_scales|_scale_inv|_weight_scale)$/;

type Values = Readonly<Record<string, unknown>>;

/** What a layer's weights are quantised as, in words for an error; undefined for plain floats. */
export async function describeQuantisation(
  whole: Values,
  text: Values,
  tensors: SafetensorsReader,
  block: string,
  names: Iterable<string>,
): Promise<string | undefined> {
  for (const key of ['quantization_config', 'compression_config', 'quantization']) {
    const config = whole[key] ?? text[key];
    if (typeof config === 'object' && config !== null) return byConfig(key, config as Values);
  }
  const companion = [...names].find((name) => companions.test(name));
  let sample: string | undefined;
  for (const name of names) {
    if (/\.experts?\..*(weight|proj|blocks)$/.test(name.slice(block.length))) sample ??= name;
  }
  const dtype = sample === undefined ? undefined : (await tensors.info(sample)).dtype;
  const beside = companion === undefined ? '' : `, with '${companion}' beside them`;
  if (dtype === 'f8_e4m3') {
    const kind = companion?.endsWith('scale_inv') ? 'fp8 block-quantised' : 'fp8-quantised';
    return `the weights are ${kind} (f8_e4m3${beside})`;
  }
  if (dtype === 'i8') return `the weights are w8a8 int8 (i8${beside})`;
  if (dtype === 'u8' || dtype === 'i32') return `the weights are packed (${dtype}${beside})`;
  return companion === undefined
    ? undefined
    : `the weights are quantised: they have '${companion}' beside them`;
}

function byConfig(key: string, config: Values): string {
  const method = config.quant_method ?? config.quant_algo;
  if (method === undefined) return `the weights are quantised (config.json has ${key})`;
  return `the weights are ${nameOf(String(method).toLowerCase(), config)} (${key}.quant_method = '${method}')`;
}

function nameOf(method: string, config: Values): string {
  if (method === 'fp8') {
    const block = config.weight_block_size;
    return Array.isArray(block) ? `fp8 block-quantised, blocks of ${block.join(' x ')}` : 'fp8-quantised';
  }
  if (method === 'ascend') {
    const type = String(config.model_quant_type ?? 'unknown type');
    return /^w8a8/i.test(type) ? `w8a8 int8 (${type})` : `quantised for Ascend (${type})`;
  }
  if (method === 'compressed-tensors')
    return `quantised as compressed-tensors (${config.format ?? 'unknown format'})`;
  return `quantised as ${method}`;
}
