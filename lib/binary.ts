// What an addon's file says about itself, looked at before the system maps it: one that is cut short would end the
// process with SIGBUS, and one for another platform is better refused in words.
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';

/** Machines by their numbers in ELF headers. */
const elfMachines: Record<number, string> = { 3: 'ia32', 40: 'arm', 62: 'x64', 183: 'arm64', 243: 'riscv64' };
const HEADER = 64;

/** Why a file cannot be an addon for this machine; undefined where nothing speaks against it. */
export function binaryFault(
  path: string,
  platform = process.platform,
  arch = process.arch,
): string | undefined {
  const file = openSync(path, 'r');
  try {
    const { size } = fstatSync(file);
    const read = (position: number, length: number): DataView => {
      const bytes = new Uint8Array(length);
      const count = readSync(file, bytes, 0, length, position);
      return new DataView(bytes.buffer, 0, count);
    };
    const header = read(0, HEADER);
    if (header.byteLength < HEADER) return `the file is damaged: it has only ${size} bytes`;
    const kind = kindOf(header);
    const wanted = platform === 'darwin' ? 'Mach-O' : platform === 'win32' ? 'PE' : 'ELF';
    if (kind !== wanted)
      return `the file is damaged or for another platform: ${kind ?? 'no library'}, not ${wanted}`;
    return kind === 'ELF' ? elfFault(header, read, size, arch) : undefined;
  } finally {
    closeSync(file);
  }
}

function kindOf(header: DataView): 'ELF' | 'Mach-O' | 'PE' | undefined {
  const magic = header.getUint32(0);
  if (magic === 0x7f454c46) return 'ELF';
  if ([0xcffaedfe, 0xcefaedfe, 0xfeedfacf, 0xfeedface, 0xcafebabe].includes(magic)) return 'Mach-O';
  return magic >>> 16 === 0x4d5a ? 'PE' : undefined;
}

/** Not ELF of this machine's kind, or one whose parts do not all lie inside the file. */
function elfFault(
  header: DataView,
  read: (position: number, length: number) => DataView,
  size: number,
  arch: string,
): string | undefined {
  const little = header.getUint8(5) === 1;
  const machine = elfMachines[header.getUint16(18, little)] ?? 'an unknown machine';
  if (machine !== arch) return `the file is for another platform: ELF for ${machine}, not ${arch}`;
  if (header.getUint8(4) !== 2) return undefined; // the system's loader knows what to say of 32 bits
  const [start, entry, count] = [
    header.getBigUint64(32, little),
    header.getUint16(54, little),
    header.getUint16(56, little),
  ];
  // Nothing of the table of sections is mapped, but linkers put it last: without it the file is not whole
  const sections =
    header.getBigUint64(40, little) + BigInt(header.getUint16(58, little) * header.getUint16(60, little));
  const table = read(Number(start), entry * count);
  let end = BigInt(start) + BigInt(entry * count);
  if (sections > end) end = sections;
  for (let i = 0; i < count && table.byteLength === entry * count && entry >= 56; i++) {
    const last = table.getBigUint64(i * entry + 8, little) + table.getBigUint64(i * entry + 32, little);
    if (last > end) end = last;
  }
  return end > BigInt(size) ? `the file is damaged: it ends after ${size} of ${end} bytes` : undefined;
}
