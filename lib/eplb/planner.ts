// Planning off the main thread. One worker lives as long as the planner, so that its code stays warm between plans.
// A plan is whole or an error: abort ends the worker and rejects, the next plan starts a fresh one.
import { extname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { MoeError, type MoeErrorCode } from '../errors.js';
import { Placement } from '../placement/placement.js';
import type { Loads } from './loads.js';
import { checkRequest, type Plan, type PlanRequest, planSync } from './plan.js';

/** A placement as it crosses threads. */
export interface PlacementMessage {
  experts: number;
  devices: number;
  physicalToLogical: Int32Array;
}

export type RequestMessage = Omit<PlanRequest, 'loads' | 'current'> & {
  loads: { steps: number; layers: number; experts: number; counts: Float64Array };
  current?: PlacementMessage[];
};

export type ReplyMessage =
  | { kind: 'progress'; done: number; layers: number }
  | { kind: 'plan'; plan: Omit<Plan, 'placements'> & { placements: PlacementMessage[] } }
  | { kind: 'error'; code: MoeErrorCode; message: string; op?: string; arg?: string };

export const packPlacement = ({ experts, devices, physicalToLogical }: Placement): PlacementMessage => ({
  experts,
  devices,
  physicalToLogical,
});

export const unpackPlacement = ({ experts, devices, physicalToLogical }: PlacementMessage): Placement =>
  Placement.fromPhysical(physicalToLogical, devices, { experts, duplicates: 'allow' });

export interface PlanOptions {
  signal?: AbortSignal;
  /** Called as layers are done. */
  onProgress?: (layersDone: number, layers: number) => void;
}

export interface PlannerOptions {
  /** 'worker' (default) plans on a thread of its own; 'main' on the calling one, between two turns of its loop. */
  thread?: 'worker' | 'main';
}

const packLoads = ({ steps, layers, experts, counts }: Loads): RequestMessage['loads'] => ({
  steps,
  layers,
  experts,
  counts: counts.slice(),
});

/** Plans one request after another. Close it when done; an unclosed idle planner does not keep the process alive. */
export class Planner {
  readonly thread: 'worker' | 'main';
  #worker: Worker | undefined;
  #queue: Promise<unknown> = Promise.resolve();
  #closed = false;

  constructor({ thread = 'worker' }: PlannerOptions = {}) {
    this.thread = thread;
  }

  /**
   * Makes a plan. Throws what `planSync` throws, ERR_MOE_ABORTED on abort, ERR_MOE_DISPOSED after close. Plans asked
   * for at the same time are made one after the other.
   */
  plan(request: PlanRequest, options: PlanOptions = {}): Promise<Plan> {
    const result = this.#queue.then(() => this.#one(request, options));
    this.#queue = result.catch(() => {});
    return result;
  }

  async #one(request: PlanRequest, { signal, onProgress }: PlanOptions): Promise<Plan> {
    const aborted = (): MoeError =>
      new MoeError('ERR_MOE_ABORTED', 'the plan was cancelled', { op: 'plan', cause: signal?.reason });
    if (this.#closed) throw new MoeError('ERR_MOE_DISPOSED', 'the planner was closed before', { op: 'plan' });
    if (signal?.aborted) throw aborted();
    checkRequest(request);
    if (this.thread === 'main') {
      let done = 0;
      return planSync(request, () => {
        if (signal?.aborted) throw aborted();
        onProgress?.(++done, request.loads.layers);
      });
    }
    const { loads, current, ...rest } = request;
    const message: RequestMessage = {
      ...rest,
      loads: packLoads(loads),
      ...(current === undefined ? {} : { current: current.map(packPlacement) }),
    };
    const worker = this.#start();
    return new Promise<Plan>((resolve, reject) => {
      const finish = (act: () => void): void => {
        worker.off('message', onMessage).off('error', onError).off('exit', onExit);
        signal?.removeEventListener('abort', onAbort);
        worker.unref();
        act();
      };
      const onMessage = (reply: ReplyMessage): void => {
        if (reply.kind === 'progress') onProgress?.(reply.done, reply.layers);
        else if (reply.kind === 'plan')
          finish(() => resolve({ ...reply.plan, placements: reply.plan.placements.map(unpackPlacement) }));
        else
          finish(() => {
            const prefix = reply.op === undefined ? '' : `[${reply.op}] `;
            const text = reply.message.startsWith(prefix)
              ? reply.message.slice(prefix.length)
              : reply.message;
            reject(
              new MoeError(reply.code, text, {
                ...(reply.op === undefined ? {} : { op: reply.op }),
                ...(reply.arg === undefined ? {} : { arg: reply.arg }),
              }),
            );
          });
      };
      const lost = (cause: unknown): void => {
        this.#worker = undefined;
        finish(() =>
          reject(
            new MoeError(
              'ERR_MOE_INTERNAL',
              `the planning thread ended (${cause instanceof Error ? cause.message : `exit code ${cause}`})`,
              { op: 'plan', cause },
            ),
          ),
        );
      };
      const onError = (error: Error): void => lost(error);
      const onExit = (code: number): void => lost(code);
      const onAbort = (): void => {
        this.#worker = undefined;
        finish(() => reject(aborted()));
        void worker.terminate();
      };
      worker.ref();
      worker.on('message', onMessage).on('error', onError).on('exit', onExit);
      signal?.addEventListener('abort', onAbort, { once: true });
      worker.postMessage(message, [message.loads.counts.buffer as ArrayBuffer]);
    });
  }

  #start(): Worker {
    if (this.#worker === undefined) {
      // The worker's file has the extension of this one: .js when built, .ts where a loader runs the sources
      const file = new URL(`./planner_worker${extname(fileURLToPath(import.meta.url))}`, import.meta.url);
      this.#worker = new Worker(file);
      this.#worker.unref();
    }
    return this.#worker;
  }

  /** Lets the plan under way finish, then ends the thread. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.#queue;
    const worker = this.#worker;
    this.#worker = undefined;
    await worker?.terminate();
  }
}

/** Makes one plan off the main thread (see `Planner`, which keeps its thread for further ones). */
export async function planExperts(
  request: PlanRequest,
  options: PlanOptions & PlannerOptions = {},
): Promise<Plan> {
  const planner = new Planner(options);
  try {
    return await planner.plan(request, options);
  } finally {
    await planner.close();
  }
}
