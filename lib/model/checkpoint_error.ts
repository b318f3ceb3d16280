import { MoeError } from '../errors.js';

export function checkpointError(message: string, details: { arg?: string; cause?: unknown } = {}): MoeError {
  return new MoeError('ERR_MOE_CHECKPOINT', message, { op: 'checkpoint', ...details });
}
