// Writes the bytes that torch.save writes (an uncompressed zip of a protocol-2 pickle and one raw buffer for every
// tensor), opcode by opcode, so that the reader can be tested without torch.

/** A tensor to save: int64 unless `kind` says int32. */
export interface SavedTensor {
  shape: readonly number[];
  values: ArrayLike<number>;
  kind?: 'LongStorage' | 'IntStorage';
}

export type Saved = number | string | null | SavedTensor | Saved[] | Map<string, Saved>;

const ascii = (text: string): number[] => [...new TextEncoder().encode(text)];
const u16 = (value: number): number[] => [value & 255, (value >> 8) & 255];
const u32 = (value: number): number[] => [...u16(value & 65535), ...u16(value >>> 16)];
const unicode = (text: string): number[] => [0x58, ...u32(ascii(text).length), ...ascii(text)];
const integer = (value: number): number[] =>
  value >= 0 && value < 256 ? [0x4b, value] : [0x4a, ...u32(value)];
const global = (module: string, name: string): number[] => [0x63, ...ascii(`${module}\n${name}\n`)];
const tuple = (values: readonly number[]): number[] => [0x28, ...values.flatMap(integer), 0x74];

function tensorPickle({ shape, values, kind = 'LongStorage' }: SavedTensor, key: number): number[] {
  const stride = shape.map((_, axis) => shape.slice(axis + 1).reduce((product, size) => product * size, 1));
  return [
    ...global('torch._utils', '_rebuild_tensor_v2'),
    0x28,
    // persistent id: ('storage', torch.<kind>, key, 'cpu', elements)
    ...[0x28, ...unicode('storage'), ...global('torch', kind), ...unicode(String(key)), ...unicode('cpu')],
    ...[...integer(values.length), 0x74, 0x51],
    ...[...integer(0), ...tuple(shape), ...tuple(stride), 0x89],
    ...[...global('collections', 'OrderedDict'), 0x29, 0x52],
    ...[0x74, 0x52],
  ];
}

const rawBytes = ({ values, kind = 'LongStorage' }: SavedTensor): Uint8Array =>
  new Uint8Array(
    kind === 'LongStorage'
      ? BigInt64Array.from(Array.from(values), BigInt).buffer
      : Int32Array.from(values).buffer,
  );

/** The bytes of torch.save(value). */
export function torchSave(value: Saved): Uint8Array {
  const tensors: SavedTensor[] = [];
  const pickle = (item: Saved): number[] => {
    if (item === null) return [0x4e];
    if (typeof item === 'number') return integer(item);
    if (typeof item === 'string') return unicode(item);
    if (Array.isArray(item)) return [0x5d, 0x28, ...item.flatMap(pickle), 0x65];
    if (item instanceof Map)
      return [0x7d, 0x28, ...[...item].flatMap(([key, field]) => [...unicode(key), ...pickle(field)]), 0x75];
    tensors.push(item);
    return tensorPickle(item, tensors.length - 1);
  };
  const pickled = Uint8Array.from([0x80, 2, ...pickle(value), 0x2e]);
  return zip([
    ['archive/data.pkl', pickled],
    ...tensors.map((tensor, key): [string, Uint8Array] => [`archive/data/${key}`, rawBytes(tensor)]),
    ['archive/version', Uint8Array.from(ascii('3\n'))],
  ]);
}

/** The bytes of torch.save({[key]: int64 tensor}). */
export const torchArchive = (key: string, shape: readonly number[], values: Float64Array): Uint8Array =>
  torchSave(new Map([[key, { shape, values }]]));

function zip(entries: readonly [string, Uint8Array][]): Uint8Array {
  const body: number[] = [];
  const directory: number[] = [];
  for (const [name, data] of entries) {
    const common = [
      ...[...u16(0), ...u16(0), ...u16(0), ...u16(0), ...u32(0)],
      ...[...u32(data.length), ...u32(data.length), ...u16(name.length)],
    ];
    directory.push(
      ...[...u32(0x02014b50), ...u16(0), ...u16(0), ...common, ...u16(0), ...u16(0), ...u16(0), ...u16(0)],
      ...[...u32(0), ...u32(body.length), ...ascii(name)],
    );
    body.push(...u32(0x04034b50), ...u16(0), ...common, ...u16(0), ...ascii(name), ...data);
  }
  const end = [
    ...[...u32(0x06054b50), ...u16(0), ...u16(0), ...u16(entries.length), ...u16(entries.length)],
    ...[...u32(directory.length), ...u32(body.length), ...u16(0)],
  ];
  return Uint8Array.from([...body, ...directory, ...end]);
}
