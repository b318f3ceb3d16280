// What a context asks of its backend. There are two implementations: native.ts for every addon, oracle.ts for
// pure TypeScript.
import type { ExpertsLayout } from '../experts.js';
import type { Call } from '../op.js';
import type { DType, Handle, RawArray } from '../tensor.js';

export type BackendName = 'cuda' | 'ascend' | 'cpu' | 'oracle';

export interface MemoryInfo {
  /** Bytes held by live tensors, packed experts, captures and work in flight. */
  readonly used: number;
  /** Bytes taken from the system, `used` included. */
  readonly reserved: number;
}

/** How to read a tensor: 'raw' bits, or 'values' with narrow floats widened to f32. */
export type ReadAs = 'raw' | 'values';

export type Lane = 'beside' | 'main' | 'join';

/** Memory, an in-order queue, and recordings of it. Nothing but read, synchronize and close waits. */
export interface Backend {
  readonly name: BackendName;
  /** What the work runs on, for people. */
  readonly device: string;

  /** Memory of undefined content. */
  allocate(dtype: DType, elements: number): Handle;
  allocateExperts(layout: ExpertsLayout): { handle: Handle; bytes: number };
  /** Gives memory back when the work in flight is done. */
  release(handle: Handle): void;

  /** Enqueues a copy of host data, taken before the call returns; without data, zeros. */
  write(handle: Handle, dtype: DType, data: RawArray | undefined): void;
  read(handle: Handle, dtype: DType, as: ReadAs): Promise<RawArray>;
  readSync(handle: Handle, dtype: DType, as: ReadAs): RawArray;

  run(call: Call): void;
  synchronize(): Promise<void>;
  synchronizeSync(): void;

  /** From here to endCapture, work is recorded instead of run. */
  beginCapture(): void;
  endCapture(): Handle;
  /** Forgets the recording that is under way. */
  abortCapture(): void;
  replay(capture: Handle): void;
  releaseCapture(capture: Handle): void;

  /**
   * 'beside': what is enqueued from now on may run beside what is enqueued after 'main'; everything after 'join' comes
   * after both. Backends that run one thing at a time ignore it.
   */
  takeLane(lane: Lane): void;

  memory(): MemoryInfo;
  /** Which kernel each op took last. */
  paths(): Record<string, string>;
  /** Finishes queued work, then gives everything back. */
  close(): Promise<void>;
}
