// Recorded work.
import { MoeError } from './errors.js';
import { constructionKey } from './tensor.js';

/** A recorded sequence: `output` is what the recorded function returned; `replay()` enqueues the whole of it again. */
export class Capture<T> {
  readonly output: T;
  readonly #actions: { replay(): void; dispose(): void };
  #disposed = false;

  /** @internal Captures are made by context.capture. */
  constructor(secret: symbol, output: T, actions: { replay(): void; dispose(): void }) {
    if (secret !== constructionKey) {
      throw new MoeError('ERR_MOE_INVALID_ARG', 'captures are made by context.capture()', { op: 'Capture' });
    }
    this.output = output;
    this.#actions = actions;
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  /** Enqueues the recorded work. The tensors of `output` hold its results from then on. */
  replay(): void {
    if (this.#disposed) {
      throw new MoeError('ERR_MOE_DISPOSED', 'expected a live capture but it was disposed', { op: 'replay' });
    }
    this.#actions.replay();
  }

  /** Gives back the recording and every tensor made in it, once the replays in flight are done. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#actions.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
