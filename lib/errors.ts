// Every error this package throws on purpose is a MoeError whose `code` is one of the keys below.
// csrc/common/status.h numbers the same codes in the same order; the contract test compares the two.

/** Every error code, with what it means. The order is the number used across the native boundary. */
export const errorCodes = {
  ERR_MOE_INVALID_ARG: 'an argument has the wrong type, dtype, shape or value',
  ERR_MOE_UNSUPPORTED: 'this backend cannot do what was asked; the message names what would work',
  ERR_MOE_OOM: 'out of memory; the message says how much was asked for and how much there is',
  ERR_MOE_DISPOSED: 'the tensor, weights, capture or context was disposed or closed before',
  ERR_MOE_WRONG_CONTEXT: 'tensors of different contexts met in one call',
  ERR_MOE_CAPTURE: 'not allowed while a capture is being recorded, or the capture itself failed',
  ERR_MOE_DEVICE_LOST: 'the device failed and its context can no longer be used',
  ERR_MOE_BACKEND: 'the backend asked for cannot be used on this machine',
  ERR_MOE_CHECKPOINT: 'a checkpoint or input file is missing, malformed or of an unknown architecture',
  ERR_MOE_ABORTED: 'the work was cancelled through an AbortSignal',
  ERR_MOE_INTERNAL: 'a defect of this package; please report it',
  ERR_MOE_RANGE: 'a number in device memory, such as an id, was out of range; it was dropped, never followed',
} as const;

export type MoeErrorCode = keyof typeof errorCodes;

export interface MoeErrorDetails {
  /** The op, class or command that refused, in its snake_case or public name. */
  op?: string;
  /** The argument at fault. */
  arg?: string;
  cause?: unknown;
}

/** The one error class: `code` is stable, `op` and `arg` say where, `message` says what was expected and received. */
export class MoeError extends Error {
  override readonly name = 'MoeError';
  readonly code: MoeErrorCode;
  readonly op?: string;
  readonly arg?: string;

  constructor(code: MoeErrorCode, message: string, { op, arg, cause }: MoeErrorDetails = {}) {
    super(op === undefined ? message : `[${op}] ${message}`, cause === undefined ? undefined : { cause });
    this.code = code;
    if (op !== undefined) this.op = op;
    if (arg !== undefined) this.arg = arg;
  }
}
