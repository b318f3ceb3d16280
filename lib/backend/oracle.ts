// The pure TypeScript backend: computes on the JS thread at the call. The last fallback, and what every other backend
// is compared with, so it is plain rather than fast.
import { freemem } from 'node:os';
import { MoeError } from '../errors.js';
import type { ExpertsLayout } from '../experts.js';
import type { Call, CallInput } from '../op.js';
import type { OracleExperts, OracleTensor } from '../oracle/values.js';
import {
  type DType,
  decode,
  dtypeRow,
  elementsOf,
  encode,
  type Handle,
  type RawArray,
  Tensor,
} from '../tensor.js';
import type { Backend, MemoryInfo, ReadAs, Roofline } from './backend.js';

/** Below it, asking the system costs more than the array. */
const WORTH_ASKING = 32 * 2 ** 20;

interface Storage {
  raw: RawArray;
  /** Why the content is not to be trusted. */
  fault?: MoeError;
}

export class OracleBackend implements Backend {
  readonly name = 'oracle';
  readonly device = 'JavaScript thread';
  #recording: (() => void)[] | undefined;
  #used = 0;
  #paths: Record<string, string> = {};

  allocate(dtype: DType, elements: number): Storage {
    this.#afford(elements * dtypeRow(dtype).bytes);
    const raw = this.#array(dtypeRow(dtype).raw, elements);
    this.#used += raw.byteLength;
    if (this.#recording === undefined || elements === 0) return { raw };
    const text = 'expected a replay before the first read of what a capture made';
    return { raw, fault: new MoeError('ERR_MOE_CAPTURE', text, { op: 'capture' }) };
  }

  allocateExperts(layout: ExpertsLayout): { handle: OracleExperts; bytes: number } {
    const { slots, hidden, intermediate, dtype } = layout;
    const { format } = dtypeRow(dtype);
    const bytes = 4 * slots * (3 * intermediate * hidden + 2 * intermediate + hidden);
    this.#afford(bytes);
    const perSlot = (elements: number) =>
      Array.from({ length: slots }, () => this.#array(Float32Array, elements) as Float32Array);
    const handle: OracleExperts = {
      slots,
      hidden,
      intermediate,
      swiglu: layout.swiglu,
      biases: layout.biases,
      w13: perSlot(2 * intermediate * hidden),
      w2: perSlot(hidden * intermediate),
      b13: perSlot(2 * intermediate),
      b2: perSlot(hidden),
      round: format === undefined ? Math.fround : (value) => format.decode(format.encode(value)),
    };
    this.#used += bytes;
    return { handle, bytes };
  }

  release(handle: Handle): void {
    if ((handle as Storage).raw !== undefined) this.#used -= (handle as Storage).raw.byteLength;
    else this.#used -= 4 * expertElements(handle as OracleExperts);
  }

  write(handle: Handle, dtype: DType, data: RawArray | undefined): void {
    const storage = handle as Storage;
    const bits = data === undefined ? undefined : (encode(dtype, data as never) as RawArray);
    this.#enqueue(() => {
      if (bits === undefined) new Uint8Array(storage.raw.buffer).fill(0);
      else storage.raw.set(bits as never);
      delete storage.fault;
    });
  }

  readSync(handle: Handle, dtype: DType, as: ReadAs): RawArray {
    const { raw, fault } = handle as Storage;
    if (fault !== undefined) throw fault;
    return as === 'raw' || dtypeRow(dtype).format === undefined ? raw.slice() : decode(dtype, raw as never);
  }

  async read(handle: Handle, dtype: DType, as: ReadAs): Promise<RawArray> {
    return this.readSync(handle, dtype, as);
  }

  run(call: Call): void {
    const { op, inputs, outputs, options, dims } = call;
    // Handles are looked up now: tensors may be disposed while a recording still uses their memory.
    const handles = new Map<CallInput, Handle>();
    for (const input of inputs) {
      if (input.value !== undefined) handles.set(input, input.value.handle(op.name, input.name));
    }
    this.#enqueue(() => {
      const results = outputs.flatMap((output) => {
        if (output === undefined) return [];
        const { name, dtype, shape, handle } = output;
        const data = this.#array(dtypeRow(dtype).values, elementsOf(shape));
        return [{ name, dtype, tensor: { shape, data }, storage: handle as Storage }];
      });
      try {
        const given = Object.fromEntries(
          inputs.map((input) => [input.name, this.#argument(input, handles.get(input), dims)]),
        );
        op.spec.oracle(given, options, Object.fromEntries(results.map(({ name, tensor }) => [name, tensor])));
      } catch (error) {
        // What depends on failed work fails too, and nothing else does.
        for (const { storage } of results) storage.fault = error as MoeError;
        throw error;
      }
      for (const { dtype, tensor, storage } of results) {
        storage.raw.set(encode(dtype, tensor.data as never) as never);
        delete storage.fault;
      }
      this.#paths[op.name] = 'typescript';
    });
  }

  async synchronize(): Promise<void> {}
  synchronizeSync(): void {}

  beginCapture(): void {
    this.#recording = [];
  }
  endCapture(): Handle {
    const steps = this.#recording;
    this.#recording = undefined;
    return steps;
  }
  abortCapture(): void {
    this.#recording = undefined;
  }
  replay(capture: Handle): void {
    const failures: unknown[] = [];
    for (const step of capture as (() => void)[]) {
      try {
        step();
      } catch (error) {
        failures.push(error);
      }
    }
    if (failures.length > 0) throw failures[0];
  }
  releaseCapture(): void {}

  takeLane(): void {} // it has computed at the call

  memory(): MemoryInfo {
    return { used: this.#used, reserved: this.#used };
  }
  roofline(): Roofline {
    throw new MoeError('ERR_MOE_UNSUPPORTED', 'the oracle has no roofline', { op: 'measureRoofline' });
  }
  paths(): Record<string, string> {
    return { ...this.#paths };
  }
  async close(): Promise<void> {}
  abandon(): void {}

  #enqueue(step: () => void): void {
    if (this.#recording === undefined) step();
    else this.#recording.push(step);
  }

  /** What an oracle gets for an argument: widened values, experts as they are, a count as a number. */
  #argument(
    { signature, value, count }: CallInput,
    handle: Handle,
    dims: ReadonlyMap<string, number>,
  ): unknown {
    if (signature.kind === 'count') {
      const limit = dims.get(signature.dims[0][0].name!) ?? 0;
      const given = value === undefined ? (count ?? limit) : ((handle as Storage).raw as Int32Array)[0];
      return Math.min(Math.max(given, 0), limit);
    }
    if (!(value instanceof Tensor)) return handle;
    const { raw, fault } = handle as Storage;
    if (fault !== undefined) throw fault;
    const data = signature.inout ? raw : (decode(value.dtype, raw as never) as RawArray);
    return { shape: value.shape, data } satisfies OracleTensor<RawArray>;
  }

  /** V8 hands out pages that the system does not have, and the process dies when they are touched. */
  #afford(bytes: number): void {
    if (bytes < WORTH_ASKING) return;
    const available = freemem();
    if (bytes <= available) return;
    throw new MoeError(
      'ERR_MOE_OOM',
      `out of memory: requested ${bytes} bytes, ${available} bytes available`,
      {
        op: 'oracle',
      },
    );
  }

  #array(
    type: { new (length: number): RawArray; readonly BYTES_PER_ELEMENT: number },
    elements: number,
  ): RawArray {
    try {
      return new type(elements);
    } catch (cause) {
      throw new MoeError(
        'ERR_MOE_OOM',
        `out of memory: requested ${elements * type.BYTES_PER_ELEMENT} bytes in one typed array, ${this.#used} in use`,
        { op: 'oracle', cause },
      );
    }
  }
}

const expertElements = ({ slots, hidden, intermediate }: OracleExperts): number =>
  slots * (3 * intermediate * hidden + 2 * intermediate + hidden);
