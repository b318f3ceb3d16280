// Memory that one object owns and gives back: what tensors and expert weights have in common.
import type { Context } from './context.js';
import { MoeError } from './errors.js';
import { describeValue } from './options.js';
import type { Handle } from './tensor.js';

export abstract class OwnedMemory {
  readonly context: Context;
  #handle: Handle;
  #disposed = false;

  /** @internal */
  constructor(context: Context, handle: Handle) {
    this.context = context;
    this.#handle = handle;
  }

  /** True for objects of this very copy of a class, whatever else claims to be one. */
  static [Symbol.hasInstance](value: unknown): boolean {
    if (typeof value !== 'object' || value === null || !(#handle in value)) return false;
    // biome-ignore lint/complexity/noThisInStatic: the class that is asked about
    return Object.prototype.isPrototypeOf.call(this.prototype, value);
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  /** @internal The backend's handle; throws when there is none any more. */
  handle(op: string, arg: string): Handle {
    if (this.#disposed) {
      throw new MoeError('ERR_MOE_DISPOSED', `expected ${arg} to be live but it was disposed`, { op, arg });
    }
    return this.#handle;
  }

  /** Gives the memory back once the work in flight is done. Disposing twice is harmless. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.context.release(this, this.#handle);
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  abstract toString(): string;
}

/** An argument as an error message shows it: tensors and expert weights with their shapes. */
export const describeArgument = (value: unknown): string =>
  value instanceof OwnedMemory ? value.toString() : describeValue(value);
