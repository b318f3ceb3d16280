// Errors about what a file holds name the file: the planners know layers and experts, only the command knows the file.
import { MoeError } from '../errors.js';

/** What to do about layers that give a planner nothing to go by. */
export const keepDegenerate = '; --keep-degenerate leaves such layers as they are';

const aboutContent = new Set(['loads', 'metrics']);

/** Arguments that do not fit the shape of the loads: misuse, but of which loads has to be said. */
const aboutShape: Readonly<Record<string, readonly string[]>> = {
  plan: ['slots', 'shared', 'groups'],
  simulate: ['trace', 'window'],
};

function withFile(file: string, error: unknown, advice: string): unknown {
  if (!(error instanceof MoeError) || error.code !== 'ERR_MOE_INVALID_ARG') return error;
  const op = error.op ?? '';
  const message = `${file}: ${error.message.replace(/^\[\w+\] /, '')}`;
  if (aboutContent.has(op))
    return new MoeError('ERR_MOE_CHECKPOINT', message + advice, { op, arg: 'file', cause: error });
  if (aboutShape[op]?.includes(error.arg ?? ''))
    return new MoeError(error.code, message, { op, arg: error.arg!, cause: error });
  return error;
}

/**
 * Runs `act`; an error about loads becomes ERR_MOE_CHECKPOINT with the file's name in front, one about sizes that do not
 * fit them gets the name too. `advice` follows what is wrong with the loads.
 */
export function aboutFile<T>(file: string, act: () => T, advice = ''): T {
  try {
    const result = act();
    return result instanceof Promise
      ? (result.catch((error: unknown) => {
          throw withFile(file, error, advice);
        }) as T)
      : result;
  } catch (error) {
    throw withFile(file, error, advice);
  }
}
