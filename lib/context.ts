// A context: one backend, one in-order queue, the tensors on it.
import { signalOf, throwIfAborted, unlessAborted, type WaitOptions } from './abort.js';
import type { Backend, BackendName, MemoryInfo, ReadAs, Roofline } from './backend/backend.js';
import { Capture } from './capture.js';
import { MoeError } from './errors.js';
import { type ExpertsLayout, ExpertWeights } from './experts.js';
import type { Call } from './op.js';
import { describeValue } from './options.js';
import type { OwnedMemory } from './owned_memory.js';
import {
  checkData,
  checkShape,
  constructionKey,
  type DType,
  describeTensor,
  dtypes,
  elementsOf,
  type Handle,
  type RawArray,
  Tensor,
  type TensorData,
} from './tensor.js';

export interface ContextDescription {
  readonly backend: BackendName;
  /** What was asked for. */
  readonly requested: 'auto' | BackendName;
  /** What the work runs on. */
  readonly device: string;
  /** Every backend that 'auto' passed over, and why. */
  readonly passedOver: readonly { readonly backend: BackendName; readonly reason: string }[];
  /** The kernel that each op took last. */
  readonly paths: Readonly<Record<string, string>>;
}

/** Bytes that no machine has, and addons do not count. */
const ADDRESSABLE = 2 ** 50;
let contexts = 0;

/**
 * An in-order queue on one backend. Calling an op enqueues it and returns tensors at once; only `tensor.read()`,
 * `synchronize()` and `close()` wait. The oracle is the exception: it computes at the call.
 */
export class Context {
  readonly backend: BackendName;
  readonly #backend: Backend;
  readonly #requested: 'auto' | BackendName;
  readonly #passedOver: ContextDescription['passedOver'];
  readonly #id = ++contexts;
  /** Gives back what was never disposed. A net only: it runs when the collector pleases. */
  readonly #net: FinalizationRegistry<Handle>;
  #state: 'open' | 'closed' | 'lost' = 'open';
  #closing: Promise<void> | undefined;
  readonly #captureNet: FinalizationRegistry<Handle>;
  readonly #captureOf = new WeakMap<object, Capture<unknown>>();
  #overlapping = false;
  /** Tensors made while a capture is being recorded; they live and die with it. */
  #recorded: Set<{ dispose(): void }> | undefined;

  /** @internal Contexts are made by createContext. */
  constructor(
    secret: symbol,
    backend: Backend,
    requested: 'auto' | BackendName,
    passedOver: ContextDescription['passedOver'],
  ) {
    if (secret !== constructionKey) {
      throw new MoeError('ERR_MOE_INVALID_ARG', 'contexts are made by createContext()', { op: 'Context' });
    }
    this.backend = backend.name;
    this.#backend = backend;
    this.#requested = requested;
    this.#passedOver = passedOver;
    this.#net = new FinalizationRegistry((handle) => {
      if (this.#state === 'open') backend.release(handle);
    });
    this.#captureNet = new FinalizationRegistry((handle) => {
      if (this.#state === 'open') backend.releaseCapture(handle);
    });
  }

  /** True for contexts of this copy of the package, whatever else claims to be one. */
  static [Symbol.hasInstance](value: unknown): boolean {
    return typeof value === 'object' && value !== null && #backend in value;
  }

  get state(): 'open' | 'closed' | 'lost' {
    return this.#state;
  }

  /**
   * A tensor filled with `data` (zeros without): an array of the dtype, or for bf16 and f16 a Float32Array, rounded
   * to nearest even, or a Uint16Array of bits. The data is copied before the call returns.
   * @throws MoeError ERR_MOE_INVALID_ARG, ERR_MOE_OOM.
   */
  tensor<D extends DType>(dtype: D, shape: readonly number[], data?: TensorData<D>): Tensor<D> {
    const op = 'tensor';
    const dims = checkShape(op, dtype, shape); // may run code of the caller's
    this.assertUsable(op);
    if (data !== undefined) checkData(op, dtype, elementsOf(dims), data as RawArray);
    const tensor = this.allocate(op, 'tensor', dtype, dims);
    try {
      this.#noticing(() =>
        this.#backend.write(tensor.handle(op, 'tensor'), dtype, data as RawArray | undefined),
      );
    } catch (error) {
      tensor.dispose();
      throw error;
    }
    return tensor;
  }

  /**
   * Waits until everything enqueued so far is done; rejects when any of it failed, naming the op. A `signal` ends the
   * wait with ERR_MOE_ABORTED, not the work.
   */
  synchronize(options?: WaitOptions): Promise<void> {
    this.assertNotRecording('synchronize');
    return this.#synchronize(options);
  }

  async #synchronize(options: WaitOptions | undefined): Promise<void> {
    const signal = signalOf('synchronize', options); // may run code of the caller's
    this.assertUsable('synchronize');
    await this.#watch('synchronize', signal, () => this.#backend.synchronize());
  }

  /** `synchronize` that blocks the thread. For benchmarks and scripts. */
  synchronizeSync(): void {
    this.#assertMayWait('synchronizeSync');
    this.#noticing(() => this.#backend.synchronizeSync());
  }

  /**
   * Records the work that `record` enqueues, without running it, to be replayed at the cost of one call. Tensors
   * made inside belong to the capture; new input enters through `tensor.write`; host numbers are frozen.
   * @throws MoeError ERR_MOE_CAPTURE for reads, waits or another capture inside `record`, or an async `record`.
   */
  capture<T>(record: () => T): Capture<T> {
    this.assertUsable('capture');
    if (typeof record !== 'function') {
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected record: a function but received ${describeValue(record)}`,
        { op: 'capture', arg: 'record' },
      );
    }
    if (this.#recorded !== undefined) {
      throw new MoeError('ERR_MOE_CAPTURE', 'a capture is being recorded already', { op: 'capture' });
    }
    this.#assertOneLane('capture');
    this.#noticing(() => this.#backend.beginCapture());
    const recorded = new Set<{ dispose(): void }>();
    this.#recorded = recorded;
    let handle: Handle;
    try {
      const output = record();
      refusePromise('capture', 'record', output, 'in a capture');
      handle = this.#noticing(() => this.#backend.endCapture());
      this.#recorded = undefined;
      const capture: Capture<T> = new Capture(constructionKey, output, {
        replay: () => {
          this.assertUsable('replay');
          this.#assertOneLane('replay');
          if (this.#recorded !== undefined) {
            throw new MoeError('ERR_MOE_CAPTURE', 'a capture is being recorded', { op: 'replay' });
          }
          this.#noticing(() => this.#backend.replay(handle));
        },
        dispose: () => {
          this.#captureNet.unregister(recorded);
          for (const tensor of recorded) tensor.dispose();
          if (this.#state === 'open') this.#backend.releaseCapture(handle);
        },
      });
      // The tensors' memory may be the recording's own, so whoever holds one holds the capture.
      for (const tensor of recorded) this.#captureOf.set(tensor, capture);
      this.#captureNet.register(capture, handle, recorded);
      return capture;
    } catch (error) {
      if (this.#recorded !== undefined) {
        this.#recorded = undefined;
        this.#backend.abortCapture();
      }
      for (const tensor of recorded) tensor.dispose();
      throw error;
    }
  }

  /**
   * Runs two sequences of work beside each other: what `beside` enqueues may overlap with what `main` enqueues (on CUDA
   * it goes to a second stream), and everything enqueued later comes after both. Neither may write what the other one
   * reads or writes (by an op, `write`, a `load` or `packExperts` into the same weights), and `main` must not use what
   * `beside` made. Memory given back inside is free again only after both, so an overlap takes more memory than its two
   * parts one after the other. Where a backend runs one thing at a time, `beside` runs first. Can be captured.
   * @returns What the two functions returned.
   * @throws MoeError ERR_MOE_CAPTURE for reads, waits, captures or another overlap inside, or an async function.
   */
  overlap<A, B>(beside: () => A, main: () => B): [A, B] {
    const op = 'overlap';
    this.assertUsable(op);
    for (const [arg, work] of Object.entries({ beside, main })) {
      if (typeof work === 'function') continue;
      throw new MoeError(
        'ERR_MOE_INVALID_ARG',
        `expected ${arg}: a function but received ${describeValue(work)}`,
        { op, arg },
      );
    }
    this.#assertOneLane(op);
    const enqueue = <T>(arg: string, work: () => T): T => {
      const result = work();
      refusePromise(op, arg, result, 'in an overlap');
      return result;
    };
    this.#noticing(() => this.#backend.takeLane('beside'));
    this.#overlapping = true;
    let results: [A, B];
    try {
      const first = enqueue('beside', beside);
      this.#noticing(() => this.#backend.takeLane('main'));
      results = [first, enqueue('main', main)];
    } catch (error) {
      this.#overlapping = false;
      try {
        this.#backend.takeLane('join');
      } catch {} // what went wrong first is what is told
      throw error;
    }
    this.#overlapping = false;
    this.#noticing(() => this.#backend.takeLane('join'));
    return results;
  }

  /** Bytes in use and bytes taken from the system. */
  memory(): MemoryInfo {
    this.assertUsable('memory');
    return this.#backend.memory();
  }

  /** Which backend this is, why it was taken, and which kernels ran. */
  describe(): ContextDescription {
    return {
      backend: this.backend,
      requested: this.#requested,
      device: this.#backend.device,
      passedOver: this.#passedOver,
      paths: this.#state === 'open' ? this.#backend.paths() : {},
    };
  }

  /**
   * What the hardware gives to loops that only read or only multiply and add, measured now: the ceilings of benches.
   * Blocks the thread for about a second.
   * @throws MoeError ERR_MOE_UNSUPPORTED on a backend other than the CPU.
   */
  measureRoofline(): Roofline {
    this.#assertMayWait('measureRoofline');
    return this.#noticing(() => this.#backend.roofline());
  }

  /**
   * Finishes the work in flight and gives everything back; afterwards every call throws ERR_MOE_DISPOSED. A `signal`
   * is the end of patience: the work that is left is given up, and this and every wait for it reject with
   * ERR_MOE_ABORTED. The context is closed all the same.
   */
  close(options?: WaitOptions): Promise<void> {
    const signal = signalOf('close', options);
    const closing = this.#close();
    if (signal === undefined) return closing;
    return unlessAborted('close', closing, signal, 'the work in flight', () => {
      this.#closing = closing.catch(() => {}); // closed it is
      this.#backend.abandon();
    });
  }

  #close(): Promise<void> {
    if (this.#closing === undefined) {
      if (this.#recorded !== undefined) {
        throw new MoeError(
          'ERR_MOE_CAPTURE',
          'a context cannot be closed while a capture is being recorded',
          {
            op: 'close',
          },
        );
      }
      this.#assertOneLane('close');
      const lost = this.#state === 'lost';
      if (this.#state === 'open') this.#state = 'closed';
      this.#closing = this.#backend.close();
      if (lost) this.#closing = this.#closing.catch(() => {}); // told before: there is nothing more to finish
    }
    return this.#closing;
  }

  /** Starts `close()` without waiting for it. */
  [Symbol.dispose](): void {
    this.close().catch(() => {});
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  toString(): string {
    return `${this.backend} context ${this.#id}`;
  }

  /** @internal */
  assertUsable(op: string): void {
    if (this.#state === 'open') return;
    const lost = this.#state === 'lost';
    throw new MoeError(
      lost ? 'ERR_MOE_DEVICE_LOST' : 'ERR_MOE_DISPOSED',
      lost
        ? `the device of ${this} failed before; open a new context`
        : `expected an open context but ${this} is closed`,
      { op },
    );
  }

  /** @internal */
  allocate<D extends DType>(op: string, arg: string, dtype: D, shape: readonly number[]): Tensor<D> {
    return this.own({ dtype, shape, handle: this.reserve(op, arg, dtype, shape) });
  }

  /** @internal Memory of a tensor to be; until somebody owns it nothing but `unreserve` gives it back. */
  reserve(op: string, arg: string, dtype: DType, shape: readonly number[]): Handle {
    const elements = elementsOf(shape);
    if (!(elements * dtypes[dtype].bytes < ADDRESSABLE)) {
      throw new MoeError(
        'ERR_MOE_OOM',
        `out of memory: ${arg}: ${describeTensor({ dtype, shape })} has too many elements`,
        { op, arg },
      );
    }
    try {
      return this.#backend.allocate(dtype, elements);
    } catch (error) {
      throw this.#noRoom(error, op, arg, describeTensor({ dtype, shape }));
    }
  }

  /** @internal */
  unreserve(handle: Handle): void {
    if (this.#state === 'open') this.#backend.release(handle);
  }

  /** @internal The tensor of reserved memory; `shape` becomes its own. */
  own<D extends DType>(of: { dtype: D; shape: readonly number[]; handle: Handle }): Tensor<D> {
    return this.#own(new Tensor(constructionKey, this, of.dtype, of.shape, of.handle), of.handle);
  }

  /** @internal */
  allocateExperts(op: string, layout: ExpertsLayout): ExpertWeights {
    this.assertUsable(op);
    const { slots, hidden, intermediate, dtype } = layout;
    let made: ReturnType<Backend['allocateExperts']>;
    try {
      made = this.#backend.allocateExperts(layout);
    } catch (error) {
      const what = `experts ${dtype}[${slots}, ${hidden}, ${intermediate}]`;
      throw this.#noRoom(error, op, 'experts', what);
    }
    const { handle, bytes } = made;
    return this.#own(new ExpertWeights(constructionKey, this, layout, handle, bytes), handle);
  }

  /** An error that says for which argument there was no memory. */
  #noRoom(cause: unknown, op: string, arg: string, what: string): unknown {
    if (!(cause instanceof MoeError) || cause.code !== 'ERR_MOE_OOM') return this.#notice(cause);
    const text = cause.message.replace(/^\[\w+\] (out of memory: )?/, '');
    return new MoeError('ERR_MOE_OOM', `out of memory for ${arg}: ${what}: ${text}`, { op, arg, cause });
  }

  #own<T extends OwnedMemory>(owner: T, handle: Handle): T {
    this.#net.register(owner, handle, owner);
    this.#recorded?.add(owner);
    return owner;
  }

  /** @internal */
  release(owner: OwnedMemory, handle: Handle): void {
    this.#net.unregister(owner);
    this.unreserve(handle);
  }

  /** @internal */
  run(call: Call): void {
    try {
      this.#backend.run(call);
    } catch (error) {
      throw this.#notice(error);
    }
  }

  /** @internal */
  writeTensor(tensor: Tensor, data: RawArray): void {
    const op = 'write';
    this.assertUsable(op);
    const handle = tensor.handle(op, 'tensor');
    checkData(op, tensor.dtype, tensor.size, data);
    this.#noticing(() => this.#backend.write(handle, tensor.dtype, data));
  }

  /** @internal */
  async readTensor(tensor: Tensor, as: ReadAs, options?: WaitOptions): Promise<RawArray> {
    const signal = signalOf('read', options); // may run code of the caller's
    this.#assertMayWait('read');
    const handle = tensor.handle('read', 'tensor');
    return this.#watch('read', signal, () => this.#backend.read(handle, tensor.dtype, as));
  }

  /** @internal */
  readTensorSync(tensor: Tensor, as: ReadAs): RawArray {
    this.#assertMayWait('readSync');
    const handle = tensor.handle('readSync', 'tensor');
    return this.#noticing(() => this.#backend.readSync(handle, tensor.dtype, as));
  }

  #assertMayWait(op: string): void {
    this.assertUsable(op);
    this.assertNotRecording(op);
  }

  /** @internal Throws at the call, so that a recording fails although nobody awaits what it returns. */
  assertNotRecording(op: string): void {
    this.#assertOneLane(op);
    if (this.#recorded === undefined) return;
    throw new MoeError(
      'ERR_MOE_CAPTURE',
      'nothing can be read or awaited while a capture is being recorded',
      {
        op,
      },
    );
  }

  #assertOneLane(op: string): void {
    if (!this.#overlapping) return;
    throw new MoeError(
      'ERR_MOE_CAPTURE',
      'not possible inside of an overlap: work can only be enqueued there',
      { op },
    );
  }

  async #watch<T>(op: string, signal: AbortSignal | undefined, begin: () => Promise<T>): Promise<T> {
    throwIfAborted(op, signal, 'the wait');
    try {
      return await unlessAborted(op, begin(), signal, 'the wait');
    } catch (error) {
      throw this.#notice(error);
    }
  }

  #noticing<T>(work: () => T): T {
    try {
      return work();
    } catch (error) {
      throw this.#notice(error);
    }
  }

  /** After a lost device the context refuses everything. */
  #notice(error: unknown): unknown {
    const lost = error instanceof MoeError && error.code === 'ERR_MOE_DEVICE_LOST';
    if (lost && this.#state === 'open') this.#state = 'lost';
    return error;
  }
}

/** What is enqueued by a function has to be enqueued when it returns. */
function refusePromise(op: string, arg: string, result: unknown, where: string): void {
  const then: unknown = (result as PromiseLike<unknown> | null | undefined)?.then;
  if (typeof then !== 'function') return;
  if (result instanceof Promise) result.catch(() => {});
  throw new MoeError('ERR_MOE_CAPTURE', `expected a synchronous function: nothing can be awaited ${where}`, {
    op,
    arg,
  });
}
