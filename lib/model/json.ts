// JSON of a checkpoint's files.
import { describeValue } from '../options.js';
import { checkpointError } from './checkpoint_error.js';

/** A JSON object; `what` names it in messages. */
export function parseJson(file: string, bytes: Uint8Array, what: string): Record<string, unknown> {
  return parseObject(file, bytes, what).value;
}

/** A JSON object without duplicate keys: which of two a writer meant, nobody can tell. */
export function parseStrictJson(file: string, bytes: Uint8Array, what: string): Record<string, unknown> {
  const { value, text } = parseObject(file, bytes, what);
  const duplicate = findDuplicateKey(text);
  if (duplicate !== undefined) throw checkpointError(`${file}: ${what} has the key '${duplicate}' twice`);
  return value;
}

function parseObject(
  file: string,
  bytes: Uint8Array,
  what: string,
): { value: Record<string, unknown>; text: string } {
  let value: unknown;
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
    value = JSON.parse(text);
  } catch (cause) {
    throw checkpointError(`${file}: ${what} is not valid JSON (${(cause as Error).message})`, { cause });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw checkpointError(`${file}: ${what} is ${describeValue(value)}, not a JSON object`);
  }
  return { value: value as Record<string, unknown>, text };
}

/** The first key that an object of this (valid) JSON text has twice; JSON.parse silently keeps the last. */
function findDuplicateKey(json: string): string | undefined {
  const scopes: (Set<string> | undefined)[] = [];
  let keyNext = false;
  for (let i = 0; i < json.length; i++) {
    const char = json[i];
    if (char === '"') {
      let end = i + 1;
      while (json[end] !== '"') end += json[end] === '\\' ? 2 : 1;
      const scope = scopes.at(-1);
      if (keyNext && scope !== undefined) {
        const key = JSON.parse(json.slice(i, end + 1)) as string;
        if (scope.has(key)) return key;
        scope.add(key);
        keyNext = false;
      }
      i = end;
    } else if (char === '{') {
      scopes.push(new Set());
      keyNext = true;
    } else if (char === '[') {
      scopes.push(undefined);
      keyNext = false;
    } else if (char === '}' || char === ']') {
      scopes.pop();
    } else if (char === ',') {
      keyNext = scopes.at(-1) !== undefined;
    }
  }
  return undefined;
}
