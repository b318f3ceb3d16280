// Expert-map files of the serving systems, read and written. One function each way and one table of formats: the
// format is recognised by its fields, never by the file's name. A file is read whole or refused: every layer is
// validated before any placement is returned.
import { readFile, writeFile } from 'node:fs/promises';
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import { decodeUtf8, describeBytes, jsonFault } from '../text_file.js';
import { Placement } from './placement.js';

/** The formats of expert-map files, the default first. */
export const expertMapFormats = ['vllm-ascend', 'sglang', 'vllm'] as const;

/** 'vllm-ascend': device lists per layer. 'sglang' and 'vllm': physical_to_logical_map, [layers][physical]. */
export type ExpertMapFormat = (typeof expertMapFormats)[number];

export interface ReadExpertMapOptions {
  /** Number of experts, shared ones included; default: the highest id in the file plus one. */
  experts?: number;
  /** Needed for the physical_to_logical_map formats, which do not say it; checked for vllm-ascend's. */
  devices?: number;
  /** Name used in messages when parsing text that did not come from a file. */
  file?: string;
}

const check = new Arguments('expert_map');

const bad = (file: string, message: string, cause?: unknown): MoeError =>
  new MoeError('ERR_MOE_CHECKPOINT', `${file}: ${message}`, { op: 'expert_map', arg: 'file', cause });

const show = (value: unknown): string => {
  const text = JSON.stringify(value);
  return text === undefined ? String(value) : text.length > 40 ? `${text.slice(0, 40)}...` : text;
};

const list = (file: string, value: unknown, field: string): unknown[] => {
  if (!Array.isArray(value)) throw bad(file, `expected ${field} to be a list but received ${show(value)}`);
  return value;
};

const record = (file: string, value: unknown, field: string): Record<string, unknown> => {
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw bad(file, `expected ${field} to be an object but received ${show(value)}`);
  return value as Record<string, unknown>;
};

const ids = (file: string, value: unknown, field: string): number[] =>
  list(file, value, field).map((id, index) => {
    if (typeof id !== 'number' || !Number.isInteger(id) || id < 0)
      throw bad(file, `expected ${field}[${index}] to be an expert id but received ${show(id)}`);
    return id;
  });

const placed = (file: string, layer: number, build: () => Placement): Placement => {
  try {
    return build();
  } catch (error) {
    if (error instanceof MoeError)
      throw bad(file, `layer ${layer}: ${error.message.replace(/^\[placement\] /, '')}`, error);
    throw error;
  }
};

const checkDevices = (file: string, layer: number, devices: number, wanted: ReadExpertMapOptions): void => {
  if (wanted.devices !== undefined && devices !== wanted.devices)
    throw bad(file, `layer ${layer}: expected ${wanted.devices} devices but received ${devices}`);
};

const sameEverywhere = (file: string, placements: Placement[]): Placement[] => {
  const [first] = placements;
  if (first === undefined) throw bad(file, 'expected at least one layer but received none');
  for (const [layer, placement] of placements.entries())
    for (const field of ['experts', 'devices', 'slots'] as const)
      if (placement[field] !== first[field])
        throw bad(
          file,
          `layer ${layer}: expected ${first[field]} ${field} (as in layer 0) but received ${placement[field]}`,
        );
  return placements;
};

function parseAscend(
  root: Record<string, unknown>,
  file: string,
  options: ReadExpertMapOptions,
): Placement[] {
  const layers = list(file, root.layer_list, 'layer_list');
  if (root.moe_layer_count !== layers.length)
    throw bad(
      file,
      `expected moe_layer_count to equal the ${layers.length} entries of layer_list but received ${show(root.moe_layer_count)}`,
    );
  const result = layers.map((entry, layer) => {
    const field = `layer_list[${layer}]`;
    const { layer_id, device_count, device_list } = record(file, entry, field);
    if (layer_id !== layer)
      throw bad(file, `expected ${field}.layer_id to be ${layer} but received ${show(layer_id)}`);
    const devices = list(file, device_list, `${field}.device_list`);
    if (device_count !== devices.length)
      throw bad(
        file,
        `layer ${layer}: expected device_count to equal the ${devices.length} entries of device_list but received ${show(device_count)}`,
      );
    checkDevices(file, layer, devices.length, options);
    const rows = devices.map((device, index) => {
      const at = `${field}.device_list[${index}]`;
      const { device_id, device_expert } = record(file, device, at);
      if (device_id !== index)
        throw bad(file, `expected ${at}.device_id to be ${index} but received ${show(device_id)}`);
      return ids(file, device_expert, `${at}.device_expert`);
    });
    return placed(file, layer, () =>
      Placement.fromRows(rows, { ...(options.experts === undefined ? {} : { experts: options.experts }) }),
    );
  });
  return sameEverywhere(file, result);
}

function parsePhysical(map: unknown, file: string, options: ReadExpertMapOptions): Placement[] {
  const { devices, experts } = options;
  if (devices === undefined)
    throw bad(
      file,
      'expected the option devices: physical_to_logical_map does not say how many devices there are',
    );
  const rows = list(file, map, 'physical_to_logical_map').map((row, layer) =>
    ids(file, row, `physical_to_logical_map[${layer}]`),
  );
  const result = rows.map((row, layer) =>
    placed(file, layer, () =>
      Placement.fromPhysical(row, devices, {
        duplicates: 'allow',
        ...(experts === undefined ? {} : { experts }),
      }),
    ),
  );
  return sameEverywhere(file, result);
}

/** Parses the text of an expert-map file. Throws ERR_MOE_CHECKPOINT naming file, layer and field. */
export function parseExpertMap(text: string, options: ReadExpertMapOptions = {}): Placement[] {
  check.text('text', text);
  const file = check.object('options', options, ['experts', 'devices', 'file']).file ?? 'expert map';
  let root: unknown;
  try {
    root = JSON.parse(text);
  } catch (cause) {
    throw bad(file, `expected JSON but received text that does not parse (${jsonFault(cause)})`, cause);
  }
  if (Array.isArray(root)) return parsePhysical(root, file, options);
  const fields = record(file, root, 'the file');
  const maps = ['layer_list', 'physical_to_logical_map', 'placement'].filter((name) => name in fields);
  if (maps.length > 1)
    throw bad(file, `expected one map but received ${maps.join(' and ')}, which may contradict each other`);
  if ('layer_list' in fields) return parseAscend(fields, file, options);
  if ('physical_to_logical_map' in fields)
    return parsePhysical(fields.physical_to_logical_map, file, options);
  if ('placement' in fields) {
    const layers = list(file, fields.placement, 'placement').map((rows, layer) =>
      list(file, rows, `placement[${layer}]`).map((row, device) =>
        ids(file, row, `placement[${layer}][${device}]`),
      ),
    );
    return sameEverywhere(
      file,
      layers.map((rows, layer) => {
        checkDevices(file, layer, rows.length, options);
        return placed(file, layer, () =>
          Placement.fromRows(rows, {
            duplicates: 'allow',
            ...(options.experts === undefined ? {} : { experts: options.experts }),
          }),
        );
      }),
    );
  }
  throw bad(
    file,
    `expected layer_list (vllm-ascend) or physical_to_logical_map (SGLang, vLLM) but received the fields ${show(Object.keys(fields))}`,
  );
}

/** Reads an expert-map file: one placement per layer. Throws ERR_MOE_CHECKPOINT naming file, layer and field. */
export async function readExpertMap(file: string, options: ReadExpertMapOptions = {}): Promise<Placement[]> {
  check.text('file', file);
  check.object('options', options, ['experts', 'devices', 'file']);
  let bytes: Uint8Array;
  try {
    bytes = await readFile(file);
  } catch (cause) {
    throw bad(file, `cannot be read (${(cause as Error).message})`, cause);
  }
  const text = decodeUtf8(bytes);
  if (text === undefined) throw bad(file, `expected JSON but received ${describeBytes(bytes)}`);
  return parseExpertMap(text, { ...options, file });
}

/**
 * The text of an expert-map file. 'vllm-ascend' refuses placements that hold an expert twice on a device
 * (ERR_MOE_UNSUPPORTED), because its map has one slot per expert and device.
 */
export function formatExpertMap(placements: readonly Placement[], format: ExpertMapFormat): string {
  check.instances('placements', placements, Placement);
  if (!expertMapFormats.includes(format))
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected format: one of ${expertMapFormats.join(', ')} but received ${describeValue(format)}`,
      { op: 'expert_map', arg: 'format' },
    );
  if (placements.length === 0)
    throw new MoeError('ERR_MOE_INVALID_ARG', 'expected at least one layer but received none', {
      op: 'expert_map',
      arg: 'placements',
    });
  if (format === 'vllm' || format === 'sglang') {
    const slots = placements.map((placement) => placement.slots);
    if (slots.some((value) => value !== slots[0]))
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${slots[0]} slots in every layer but received ${slots}`,
        {
          op: 'expert_map',
          arg: 'placements',
        },
      );
    const map = placements.map((placement) => Array.from(placement.physicalToLogical));
    return `${JSON.stringify({ physical_to_logical_map: map })}\n`;
  }
  const layer_list = placements.map((placement, layer_id) => {
    void placement.slots; // refuses ragged placements
    const device_list = placement.toRows().map((device_expert, device_id) => {
      if (new Set(device_expert).size !== device_expert.length)
        throw new MoeError(
          'ERR_MOE_UNSUPPORTED',
          `layer ${layer_id}: expected no expert twice on a device but device ${device_id} holds one twice; write 'vllm' or 'sglang' instead`,
          { op: 'expert_map', arg: 'placements' },
        );
      return { device_id, device_expert };
    });
    return { layer_id, device_count: placement.devices, device_list };
  });
  return `${JSON.stringify({ moe_layer_count: placements.length, layer_list }, null, 4)}\n`;
}

/** Writes an expert-map file (see `formatExpertMap`). */
export async function writeExpertMap(
  file: string,
  placements: readonly Placement[],
  format: ExpertMapFormat = 'vllm-ascend',
): Promise<void> {
  const text = formatExpertMap(placements, format);
  try {
    await writeFile(file, text);
  } catch (cause) {
    throw bad(file, `cannot be written (${(cause as Error).message})`, cause);
  }
}
