// Errors about what a file holds name the file: the planners know layers and experts, only the command knows the file.
import { MoeError } from '../errors.js';

const aboutContent = new Set(['loads', 'metrics']);

/** Arguments of a plan that do not fit the shape of the loads: misuse, but of which loads has to be said. */
const aboutShape = new Set(['slots', 'shared', 'groups']);

function withFile(file: string, error: unknown): unknown {
  if (!(error instanceof MoeError) || error.code !== 'ERR_MOE_INVALID_ARG') return error;
  const op = error.op ?? '';
  const message = `${file}: ${error.message.replace(/^\[\w+\] /, '')}`;
  if (aboutContent.has(op))
    return new MoeError('ERR_MOE_CHECKPOINT', message, { op, arg: 'file', cause: error });
  if (op === 'plan' && aboutShape.has(error.arg ?? ''))
    return new MoeError(error.code, message, { op, arg: error.arg!, cause: error });
  return error;
}

/**
 * Runs `act`; an error about loads becomes ERR_MOE_CHECKPOINT with the file's name in front, one about sizes that do not
 * fit them gets the name too.
 */
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
