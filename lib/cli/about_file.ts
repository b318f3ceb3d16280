// Errors about what a file holds name the file: the planners know layers and experts, only the command knows the file.
import { MoeError } from '../errors.js';

const aboutContent = new Set(['loads', 'metrics']);

const withFile = (file: string, error: unknown): unknown =>
  error instanceof MoeError && error.code === 'ERR_MOE_INVALID_ARG' && aboutContent.has(error.op ?? '')
    ? new MoeError('ERR_MOE_CHECKPOINT', `${file}: ${error.message.replace(/^\[\w+\] /, '')}`, {
        op: error.op!,
        arg: 'file',
        cause: error,
      })
    : error;

/** Runs `act`; an error about loads becomes ERR_MOE_CHECKPOINT with the file's name in front. */
export function aboutFile<T>(file: string, act: () => T): T {
  try {
    const result = act();
    return result instanceof Promise
      ? (result.catch((error: unknown) => {
          throw withFile(file, error);
        }) as T)
      : result;
  } catch (error) {
    throw withFile(file, error);
  }
}
