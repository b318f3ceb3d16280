// Writes the bytes that torch.save writes for {key: tensor} (an uncompressed zip of a protocol-2 pickle and one raw
// buffer), opcode by opcode, so that the reader can be tested without torch.

const ascii = (text: string): number[] => [...new TextEncoder().encode(text)];
const u16 = (value: number): number[] => [value & 255, (value >> 8) & 255];
const u32 = (value: number): number[] => [...u16(value & 65535), ...u16(value >>> 16)];
const unicode = (text: string): number[] => [0x58, ...u32(ascii(text).length), ...ascii(text)];
const integer = (value: number): number[] => (value < 256 ? [0x4b, value] : [0x4a, ...u32(value)]);
const global = (module: string, name: string): number[] => [0x63, ...ascii(`${module}\n${name}\n`)];

function pickleOf(key: string, shape: readonly number[], elements: number): Uint8Array {
  const stride = shape.map((_, axis) => shape.slice(axis + 1).reduce((product, size) => product * size, 1));
  const tuple = (values: readonly number[]): number[] => [0x28, ...values.flatMap(integer), 0x74];
  return Uint8Array.from([
    ...[0x80, 2, 0x7d, 0x71, 0, 0x28],
    ...[...unicode(key), 0x71, 1],
    ...global('torch._utils', '_rebuild_tensor_v2'),
    0x28,
    // persistent id: ('storage', torch.LongStorage, '0', 'cpu', elements)
    ...[
      0x28,
      ...unicode('storage'),
      ...global('torch', 'LongStorage'),
      ...unicode('0'),
      ...unicode('cpu'),
      ...integer(elements),
      0x74,
      0x51,
    ],
    ...[...integer(0), ...tuple(shape), ...tuple(stride), 0x89],
    ...[...global('collections', 'OrderedDict'), 0x29, 0x52],
    ...[0x74, 0x52, 0x75, 0x2e],
  ]);
}

/** The bytes of torch.save({[key]: int64 tensor}). */
export function torchArchive(key: string, shape: readonly number[], values: Float64Array): Uint8Array {
  const raw = new Uint8Array(BigInt64Array.from(values, BigInt).buffer);
  const entries: [string, Uint8Array][] = [
    ['archive/data.pkl', pickleOf(key, shape, values.length)],
    ['archive/data/0', raw],
    ['archive/version', Uint8Array.from(ascii('3\n'))],
  ];
  const body: number[] = [];
  const directory: number[] = [];
  for (const [name, data] of entries) {
    const common = [
      ...u16(0),
      ...u16(0),
      ...u16(0),
      ...u16(0),
      ...u32(0),
      ...u32(data.length),
      ...u32(data.length),
      ...u16(name.length),
    ];
    directory.push(
      ...u32(0x02014b50),
      ...u16(0),
      ...u16(0),
      ...common,
      ...u16(0),
      ...u16(0),
      ...u16(0),
      ...u16(0),
      ...u32(0),
      ...u32(body.length),
      ...ascii(name),
    );
    body.push(...u32(0x04034b50), ...u16(0), ...common, ...u16(0), ...ascii(name), ...data);
  }
  const end = [
    ...u32(0x06054b50),
    ...u16(0),
    ...u16(0),
    ...u16(entries.length),
    ...u16(entries.length),
    ...u32(directory.length),
    ...u32(body.length),
    ...u16(0),
  ];
  return Uint8Array.from([...body, ...directory, ...end]);
}
