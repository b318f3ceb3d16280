// Bytes that should be text: decoded, or described in the words of an error message.

/** The text of UTF-8 bytes (a byte order mark is dropped); undefined where they are something else. */
export function decodeUtf8(bytes: Uint8Array): string | undefined {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    return undefined;
  }
}

/** What a file holds, as far as its first bytes tell: `a zip archive`, `bytes that start with 89 50 4e 47`. */
export function describeBytes(bytes: Uint8Array): string {
  const start = bytes.subarray(0, 4);
  const hex = Array.from(start, (byte) => byte.toString(16).padStart(2, '0')).join(' ');
  if (hex === '') return 'an empty file';
  if (hex === '50 4b 03 04') return 'a zip archive';
  if (hex === '93 4e 55 4d') return 'an npy file';
  return start.every((byte) => byte >= 32 && byte < 127)
    ? `text that starts with '${new TextDecoder().decode(start)}'`
    : `bytes that start with ${hex}`;
}

/** What JSON.parse says of a text, on one line: it quotes the text. */
export function jsonFault(error: unknown): string {
  return (error as Error).message.replace(/\s+/g, ' ');
}
