// Reads the tensors of a torch.save file, the form in which SGLang's recorder dumps its counts. The file is a zip of
// uncompressed entries: a pickle and one raw buffer per storage. The pickle machine below knows the few opcodes that
// dicts, lists, numbers, strings and tensors need and builds nothing else: no class of the file is ever looked up or
// called.
import { MoeError } from '../errors.js';

/** A tensor of the file: its shape and, read when asked for, its row-major values. */
export class TorchTensor {
  readonly #read: () => Float64Array;

  constructor(
    readonly shape: number[],
    read: () => Float64Array,
  ) {
    this.#read = read;
  }

  get data(): Float64Array {
    return this.#read();
  }
}

/** True if the bytes start like a zip, which torch.save has written since version 1.6. */
export const isZip = (bytes: Uint8Array): boolean =>
  bytes[0] === 0x50 && bytes[1] === 0x4b && bytes[2] === 3 && bytes[3] === 4;

class Global {
  constructor(readonly name: string) {}
}

interface Storage {
  key: string;
  kind: string;
}

const elementSize: Record<string, number> = {
  LongStorage: 8,
  IntStorage: 4,
  ShortStorage: 2,
  CharStorage: 1,
  ByteStorage: 1,
  BoolStorage: 1,
  FloatStorage: 4,
  DoubleStorage: 8,
};

const element = (view: DataView, kind: string, index: number): number => {
  switch (kind) {
    case 'LongStorage':
      return Number(view.getBigInt64(index * 8, true));
    case 'IntStorage':
      return view.getInt32(index * 4, true);
    case 'ShortStorage':
      return view.getInt16(index * 2, true);
    case 'CharStorage':
      return view.getInt8(index);
    case 'FloatStorage':
      return view.getFloat32(index * 4, true);
    case 'DoubleStorage':
      return view.getFloat64(index * 8, true);
    default:
      return view.getUint8(index);
  }
};

/** The object of a torch.save file: dicts as Map, lists and tuples as arrays, tensors as TorchTensor. */
export function parseTorch(bytes: Uint8Array, file = 'torch file'): unknown {
  const bad = (message: string): MoeError =>
    new MoeError('ERR_MOE_CHECKPOINT', `${file}: ${message}`, { op: 'torch_file', arg: 'file' });
  const entries = zipEntries(bytes, bad);
  const pickle = [...entries].find(([name]) => name.endsWith('/data.pkl'));
  if (pickle === undefined)
    throw bad(`expected data.pkl in the archive but received ${[...entries.keys()].slice(0, 5)}`);
  const folder = pickle[0].slice(0, -'data.pkl'.length);
  const order = entries.get(`${folder}byteorder`);
  if (order !== undefined && new TextDecoder().decode(order) !== 'little')
    throw bad(`expected little-endian storages but received byteorder ${new TextDecoder().decode(order)}`);
  const room = (elements: number, shape: readonly number[]): Float64Array => {
    try {
      return new Float64Array(elements);
    } catch {
      throw bad(`expected a tensor that fits in memory but received shape [${shape}]`);
    }
  };
  const build: BuildTensor = ({ key, kind }, offset, shape, stride) => {
    const raw = entries.get(`${folder}data/${key}`);
    const size = elementSize[kind];
    if (raw === undefined || size === undefined)
      throw bad(`expected a storage of a known type but received ${kind} ${key}`);
    const view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
    const elements = shape.reduce((product, length) => product * length, 1);
    const last = shape.reduce((sum, length, axis) => sum + (length - 1) * stride[axis]!, offset);
    const whole = [offset, ...shape, ...stride].every((number) => Number.isInteger(number) && number >= 0);
    if (!whole || shape.length !== stride.length || (elements > 0 && (last + 1) * size > raw.byteLength))
      throw bad(`expected storage ${key} to hold shape [${shape}] but it has ${raw.byteLength} bytes`);
    return new TorchTensor(shape, () => {
      const data = room(elements, shape);
      const place = new Array<number>(shape.length).fill(0);
      let at = offset;
      for (let index = 0; index < elements; index++) {
        data[index] = element(view, kind, at);
        for (let axis = shape.length - 1; axis >= 0; axis--) {
          at += stride[axis]!;
          if (++place[axis]! < shape[axis]!) break;
          at -= shape[axis]! * stride[axis]!;
          place[axis] = 0;
        }
      }
      return data;
    });
  };
  try {
    return unpickle(pickle[1], bad, build);
  } catch (cause) {
    if (cause instanceof MoeError) throw cause;
    throw bad(`expected a whole pickle but its opcodes do not fit together (${(cause as Error).message})`);
  }
}

function zipEntries(bytes: Uint8Array, bad: (message: string) => MoeError): Map<string, Uint8Array> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw bad('expected a whole zip archive but its directory is missing');
  let at = view.getUint32(end + 16, true);
  const count = view.getUint16(end + 10, true);
  const entries = new Map<string, Uint8Array>();
  for (let entry = 0; entry < count; entry++) {
    if (at + 46 > bytes.length || view.getUint32(at, true) !== 0x02014b50)
      throw bad(`expected directory entry ${entry} of the archive but its bytes are something else`);
    const method = view.getUint16(at + 10, true);
    const size = view.getUint32(at + 24, true);
    const nameLength = view.getUint16(at + 28, true);
    const local = view.getUint32(at + 42, true);
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    if (method !== 0)
      throw bad(`expected uncompressed entries, as torch.save writes, but ${name} is compressed`);
    if (local + 30 > bytes.length)
      throw bad(`expected ${name} inside the file but it starts at byte ${local}`);
    const data = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    if (data + size > bytes.length) throw bad(`expected ${size} bytes of ${name} but the file ends before`);
    entries.set(name, bytes.subarray(data, data + size));
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return entries;
}

type BuildTensor = (storage: Storage, offset: number, shape: number[], stride: number[]) => TorchTensor;

function unpickle(bytes: Uint8Array, bad: (message: string) => MoeError, tensor: BuildTensor): unknown {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const stack: unknown[] = [];
  const marks: number[] = [];
  const memo = new Map<number, unknown>();
  let at = 0;
  const text = (length: number): string => {
    at += length;
    return new TextDecoder().decode(bytes.subarray(at - length, at));
  };
  const line = (): string => {
    const stop = bytes.indexOf(10, at);
    const value = text((stop < 0 ? bytes.length : stop) - at);
    at++;
    return value;
  };
  const fromMark = (): unknown[] => stack.splice(marks.pop() ?? 0);
  const reduce = (callable: unknown, args: unknown[]): unknown => {
    const name = callable instanceof Global ? callable.name : '';
    if (name === 'torch._utils _rebuild_tensor_v2') {
      const [storage, offset, shape, stride] = args as [Storage, number, number[], number[]];
      return tensor(storage, offset, shape, stride);
    }
    if (name === 'collections OrderedDict') return new Map();
    throw bad(`expected only tensors, dicts, lists, numbers and strings but the file builds ${name}`);
  };
  const setItems = (target: unknown, items: unknown[]): void => {
    if (!(target instanceof Map)) throw bad('expected a dict to set items of');
    for (let index = 0; index < items.length; index += 2) target.set(items[index], items[index + 1]);
  };
  while (at < bytes.length) {
    const opcode = String.fromCharCode(bytes[at++]!);
    switch (opcode) {
      case '\x80':
        at += 1;
        break; // PROTO
      case '\x95':
        at += 8;
        break; // FRAME
      case '.':
        return stack.pop();
      case '(':
        marks.push(stack.length);
        break;
      case '}':
        stack.push(new Map());
        break;
      case ']':
        stack.push([]);
        break;
      case ')':
        stack.push([]);
        break;
      case 'N':
        stack.push(null);
        break;
      case '\x88':
        stack.push(true);
        break;
      case '\x89':
        stack.push(false);
        break;
      case 'K':
        stack.push(bytes[at++]!);
        break;
      case 'M':
        stack.push(view.getUint16(at, true));
        at += 2;
        break;
      case 'J':
        stack.push(view.getInt32(at, true));
        at += 4;
        break;
      case 'G':
        stack.push(view.getFloat64(at, false));
        at += 8;
        break;
      case '\x8a': {
        // LONG1
        const length = bytes[at++]!;
        let value = 0n;
        for (let byte = length - 1; byte >= 0; byte--) value = (value << 8n) | BigInt(bytes[at + byte]!);
        if (length > 0 && bytes[at + length - 1]! & 128) value -= 1n << BigInt(8 * length);
        stack.push(Number(value));
        at += length;
        break;
      }
      case 'X': {
        const length = view.getUint32(at, true);
        at += 4;
        stack.push(text(length));
        break;
      }
      case '\x8c': {
        const length = bytes[at++]!;
        stack.push(text(length));
        break;
      }
      case 'q':
        memo.set(bytes[at++]!, stack.at(-1));
        break;
      case 'r':
        memo.set(view.getUint32(at, true), stack.at(-1));
        at += 4;
        break;
      case '\x94':
        memo.set(memo.size, stack.at(-1));
        break;
      case 'h':
        stack.push(memo.get(bytes[at++]!));
        break;
      case 'j':
        stack.push(memo.get(view.getUint32(at, true)));
        at += 4;
        break;
      case 'c': {
        const module = line();
        stack.push(new Global(`${module} ${line()}`));
        break;
      }
      case '\x93': {
        const name = stack.pop();
        stack.push(new Global(`${stack.pop()} ${name}`));
        break;
      }
      case 't':
        stack.push(fromMark());
        break;
      case 'l':
        stack.push(fromMark());
        break;
      case '\x85':
        stack.push(stack.splice(-1));
        break;
      case '\x86':
        stack.push(stack.splice(-2));
        break;
      case '\x87':
        stack.push(stack.splice(-3));
        break;
      case 'a': {
        const value = stack.pop();
        (stack.at(-1) as unknown[]).push(value);
        break;
      }
      case 'e': {
        const values = fromMark();
        (stack.at(-1) as unknown[]).push(...values);
        break;
      }
      case 's': {
        const items = stack.splice(-2);
        setItems(stack.at(-1), items);
        break;
      }
      case 'u': {
        const items = fromMark();
        setItems(stack.at(-1), items);
        break;
      }
      case 'Q': {
        // BINPERSID: ('storage', type, key, location, elements)
        const [, type, key] = stack.pop() as [string, Global, string];
        stack.push({ key, kind: type.name.split(' ')[1]! } satisfies Storage);
        break;
      }
      case 'R': {
        const args = stack.pop() as unknown[];
        stack.push(reduce(stack.pop(), args));
        break;
      }
      default:
        throw bad(
          `expected a pickle of tensors, dicts and lists but received opcode 0x${opcode.charCodeAt(0).toString(16)}`,
        );
    }
  }
  throw bad('expected a whole pickle but it ends early');
}
