// Writes the files that a command makes: all of them or none, and each of them whole. Texts go to files beside their
// targets first and are put in place when every one has been written, so that a full disk or a folder that is not there
// leaves everything as it was.
import { realpath, rename, rm, stat, writeFile } from 'node:fs/promises';
import { MoeError } from '../errors.js';

export interface OutputFile {
  file: string;
  text: string;
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
    for (const { file, text, from, to } of staged) {
      at = file;
      if (from === '') await writeFile(to, text);
      else await rename(from, to);
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
