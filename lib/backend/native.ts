// A context of a native addon behind the Backend interface: turns calls into the flat records that csrc/binding
// unpacks, and asks waits for a moment whether they are over. A record is one Float64Array: op number, then every field
// of the spec in order (handles are numbers).
import { setImmediate } from 'node:timers';
import { MoeError } from '../errors.js';
import type { ExpertsLayout } from '../experts.js';
import type { Addon, NativeContext } from '../native.js';
import type { Call } from '../op.js';
import { listOf } from '../options.js';
import { type DType, dtypeRow, dtypes, type Handle, type RawArray } from '../tensor.js';
import type { Backend, BackendName, Lane, MemoryInfo, ReadAs, Roofline } from './backend.js';

const RECORD_FIELDS = 64;

export class NativeBackend implements Backend {
  readonly name: BackendName;
  readonly device: string;
  readonly #context: NativeContext;
  readonly #ops: ReadonlyMap<string, number>;
  readonly #record = new Float64Array(RECORD_FIELDS);
  #polling = false;

  constructor(name: BackendName, addon: Addon, options: { device: number; threads: number; isa: string }) {
    this.name = name;
    const { device, threads, isa } = options;
    this.#context = new addon.Context({ device, threads, isa: isa === 'auto' ? '' : isa });
    this.device = this.#context.device();
    this.#ops = new Map(
      addon.describe().ops.flatMap((op, index) => (op.available ? [[op.name, index]] : [])),
    );
  }

  allocate(dtype: DType, elements: number): Handle {
    return this.#context.allocate(dtypeRow(dtype).code, elements);
  }

  allocateExperts(layout: ExpertsLayout): { handle: Handle; bytes: number } {
    const { slots, hidden, intermediate, dtype, biases, swiglu } = layout;
    const { alpha, beta, limit } = swiglu;
    const fields = [slots, hidden, intermediate, dtypes[dtype].code, Number(biases), alpha, beta, limit];
    const handle = this.#context.allocateExperts(Float64Array.from(fields));
    return { handle, bytes: this.#context.bytes(handle) };
  }

  release(handle: Handle): void {
    this.#context.release(handle as number);
  }

  write(handle: Handle, _dtype: DType, data: RawArray | undefined): void {
    this.#context.write(handle as number, data);
  }

  async read(handle: Handle, dtype: DType, as: ReadAs): Promise<RawArray> {
    return this.#typed(await this.#awaited(this.#context.read(handle as number, as === 'values')), dtype, as);
  }

  readSync(handle: Handle, dtype: DType, as: ReadAs): RawArray {
    return this.#typed(this.#context.readSync(handle as number, as === 'values'), dtype, as);
  }

  run({ op, dims, inputs, outputs, options }: Call): void {
    const index = this.#ops.get(op.name);
    if (index === undefined) {
      throw new MoeError(
        'ERR_MOE_UNSUPPORTED',
        `the ${this.name} backend does not have this op; the cpu and oracle backends do`,
        { op: op.name },
      );
    }
    const record = this.#record;
    let at = 0;
    record[at++] = index;
    for (const name of op.dims) record[at++] = dims.get(name) ?? 0;
    for (const { name, signature, value, count } of inputs) {
      record[at++] = value === undefined ? 0 : (value.handle(op.name, name) as number);
      if (signature.kind === 'count') record[at++] = count ?? dims.get(signature.dims[0][0].name!) ?? 0;
    }
    for (const output of outputs) record[at++] = output === undefined ? 0 : (output.handle as number);
    for (const [name, kind] of listOf(op.options)) record[at++] = kind.encode(options[name]);
    this.#context.enqueue(record, at);
  }

  synchronize(): Promise<void> {
    return this.#awaited(this.#context.synchronize());
  }
  synchronizeSync(): void {
    this.#context.synchronizeSync();
  }
  beginCapture(): void {
    this.#context.beginCapture();
  }
  endCapture(): Handle {
    return this.#context.endCapture();
  }
  abortCapture(): void {
    this.#context.abortCapture();
  }
  replay(capture: Handle): void {
    this.#context.replay(capture as number);
  }
  releaseCapture(capture: Handle): void {
    this.#context.releaseCapture(capture as number);
  }
  takeLane(lane: Lane): void {
    this.#context.takeLane(lane === 'beside' ? 0 : lane === 'main' ? 1 : 2);
  }
  memory(): MemoryInfo {
    return this.#context.memory();
  }
  paths(): Record<string, string> {
    return this.#context.paths();
  }
  roofline(): Roofline {
    return this.#context.roofline();
  }
  close(): Promise<void> {
    return this.#context.close();
  }
  abandon(): void {
    this.#context.abandon();
  }

  /** A wait that was begun: short ones are over before another thread would have woken up. */
  #awaited<T>(wait: Promise<T>): Promise<T> {
    if (!this.#polling) this.#poll();
    return wait;
  }

  #poll(): void {
    this.#polling = this.#context.poll();
    if (this.#polling) setImmediate(() => this.#poll());
  }

  #typed(buffer: ArrayBuffer, dtype: DType, as: ReadAs): RawArray {
    const row = dtypeRow(dtype);
    return new (as === 'values' ? row.values : row.raw)(buffer);
  }
}
