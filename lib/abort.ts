// AbortSignals: checked at the call, listened to only while something is waited for, and let go of afterwards.
import { MoeError } from './errors.js';
import { describeValue } from './options.js';

export interface WaitOptions {
  /** Ends the wait with ERR_MOE_ABORTED, whose `cause` is the reason of the signal. */
  signal?: AbortSignal;
}

/** The signal of a call's options, or the error that says what is wrong with it. */
export function signalOf(op: string, options: WaitOptions | undefined): AbortSignal | undefined {
  if (options === undefined) return undefined;
  if (typeof options !== 'object' || options === null) throw invalid(op, 'options', 'an object', options);
  const unknown = Object.keys(options).find((name) => name !== 'signal');
  if (unknown !== undefined) {
    throw new MoeError('ERR_MOE_INVALID_ARG', `unknown option '${unknown}'; the options are: signal`, {
      op,
      arg: unknown,
    });
  }
  return checkSignal(op, options.signal);
}

export function checkSignal(op: string, signal: unknown): AbortSignal | undefined {
  if (signal === undefined || signal instanceof AbortSignal) return signal;
  throw invalid(op, 'signal', 'an AbortSignal', signal);
}

export function throwIfAborted(op: string, signal: AbortSignal | undefined, what: string): void {
  if (signal?.aborted) throw aborted(op, signal, what);
}

/** What `wait` gives, unless the signal comes first: then `onAbort` runs and the result is ERR_MOE_ABORTED. */
export function unlessAborted<T>(
  op: string,
  wait: Promise<T>,
  signal: AbortSignal | undefined,
  what: string,
  onAbort: () => void = () => {},
): Promise<T> {
  if (signal === undefined) return wait;
  return new Promise<T>((resolve, reject) => {
    const stop = (): void => {
      signal.removeEventListener('abort', stop);
      reject(aborted(op, signal, what)); // before anything that onAbort settles
      onAbort();
    };
    wait.then(resolve, reject).finally(() => signal.removeEventListener('abort', stop));
    if (signal.aborted) stop();
    else signal.addEventListener('abort', stop);
  });
}

const aborted = (op: string, { reason }: AbortSignal, what: string): MoeError =>
  new MoeError('ERR_MOE_ABORTED', `${what} was cancelled`, { op, cause: reason });

const invalid = (op: string, arg: string, expected: string, received: unknown): MoeError =>
  new MoeError(
    'ERR_MOE_INVALID_ARG',
    `expected ${arg}: ${expected} but received ${describeValue(received)}`,
    {
      op,
      arg,
    },
  );
