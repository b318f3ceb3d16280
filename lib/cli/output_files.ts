// Writes the files that a command makes: all of them or none, and each of them whole. Texts go to files beside their
// targets first and are put in place when every one has been written, so that a full disk or a folder that is not there
// leaves everything as it was.
import { realpath, rename, rm, stat, writeFile } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { MoeError } from '../errors.js';

export interface OutputFile {
  file: string;
  text: string;
}

/** An option that names a file; undefined where it was not given. */
type FileOption = readonly [option: string, file: string | undefined];

/** Where a name leads, links followed; undefined for what takes any number of texts: a pipe or a device. */
async function placeOf(file: string): Promise<string | undefined> {
  const kind = await stat(file).catch(() => undefined);
  if (kind !== undefined) return kind.isFile() || kind.isDirectory() ? realpath(file) : undefined;
  const folder = resolve(dirname(file));
  return join(await realpath(folder).catch(() => folder), basename(file));
}

/** Throws ERR_MOE_INVALID_ARG where an output would overwrite an input or another output. */
export async function checkOutputs(
  op: string,
  inputs: readonly FileOption[],
  outputs: readonly FileOption[],
): Promise<void> {
  const taken = new Map<string, string>();
  for (const [at, options] of [inputs, outputs].entries())
    for (const [option, file] of options) {
      const place = file === undefined ? undefined : await placeOf(file);
      if (place === undefined) continue;
      const other = taken.get(place);
      if (at === 1 && other !== undefined)
        throw new MoeError(
          'ERR_MOE_INVALID_ARG',
          `expected ${option} to be another file than ${other} but both are ${file}`,
          { op, arg: option.replace(/^--/, '') },
        );
      taken.set(place, option);
    }
}

/** Throws ERR_MOE_CHECKPOINT naming the file that cannot be written. */
export async function writeFiles(op: string, outputs: readonly OutputFile[]): Promise<void> {
  const staged: { file: string; text: string; from: string; to: string }[] = [];
  let at = '';
  try {
    for (const { file, text } of outputs) {
      at = file;
      const kind = await stat(file).catch(() => undefined);
      if (kind?.isDirectory()) throw new Error('it is a folder');
      const to = kind === undefined ? file : await realpath(file); // a link stays one
      // A pipe or a device, such as /dev/stdout, cannot be put in place
      const from = kind === undefined || kind.isFile() ? `${to}.${process.pid}.part` : '';
      staged.push({ file, text, from, to });
      if (from !== '') await writeFile(from, text);
    }
    // What can still fail comes before what is seen
    for (const { file, text, from, to } of staged) {
      at = file;
      if (from === '') await writeFile(to, text);
    }
    for (const { file, from, to } of staged) {
      at = file;
      if (from !== '') await rename(from, to);
    }
  } catch (cause) {
    for (const { from } of staged) if (from !== '') await rm(from, { force: true });
    throw new MoeError('ERR_MOE_CHECKPOINT', `${at}: cannot be written (${(cause as Error).message})`, {
      op,
      arg: 'file',
      cause,
    });
  }
}
