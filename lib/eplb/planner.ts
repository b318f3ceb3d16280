// Planning off the main thread. One worker lives as long as the planner, so that its code stays warm between plans.
// A plan is whole or an error: abort ends the worker and rejects, the next plan starts a fresh one.
import { extname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { checkSignal, throwIfAborted, unlessAborted } from '../abort.js';
import { Arguments } from '../arguments.js';
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
  | { kind: 'plan'; plan: Omit<Plan, 'placements' | 'from'> & { placements: PlacementMessage[] } }
  | { kind: 'error'; code: MoeErrorCode; message: string; op?: string; arg?: string };

export const packPlacement = ({ experts, devices, physicalToLogical }: Placement): PlacementMessage => ({
  experts,
  devices,
  physicalToLogical,
});

export const unpackPlacement = ({ experts, devices, physicalToLogical }: PlacementMessage): Placement =>
  Placement.fromPhysical(physicalToLogical, devices, { experts, duplicates: 'allow' });

const check = new Arguments('plan');
const planOptions: readonly string[] = ['signal', 'onProgress'] satisfies (keyof PlanOptions)[];
const plannerOptions: readonly string[] = ['thread'] satisfies (keyof PlannerOptions)[];

export interface PlanOptions {
  signal?: AbortSignal;
  /** Called as layers are done. */
  onProgress?: (layersDone: number, layers: number) => void;
}

export interface PlannerOptions {
  /** 'worker' (default) plans on a thread of its own; 'main' on the calling one, between two turns of its loop. */
  thread?: 'worker' | 'main';
}

function errorOf({ code, message, op, arg }: ReplyMessage & { kind: 'error' }): MoeError {
  const prefix = op === undefined ? '' : `[${op}] `;
  const text = message.startsWith(prefix) ? message.slice(prefix.length) : message;
  return new MoeError(code, text, {
    ...(op === undefined ? {} : { op }),
    ...(arg === undefined ? {} : { arg }),
  });
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

  constructor(options: PlannerOptions = {}) {
    const { thread = 'worker' } = check.object('options', options, plannerOptions);
    check.oneOf('thread', thread, ['worker', 'main']);
    this.thread = thread;
  }

  /**
   * Makes a plan. Throws what `planSync` throws, ERR_MOE_ABORTED on abort, ERR_MOE_DISPOSED after close, and what
   * `onProgress` throws. Plans asked for at the same time are made one after the other.
   */
  async plan(request: PlanRequest, options: PlanOptions = {}): Promise<Plan> {
    const { signal, onProgress } = check.object('options', options, planOptions);
    checkSignal('plan', signal);
    check.callback('onProgress', onProgress);
    const before = this.#queue;
    const result = unlessAborted('plan', before, signal, 'the plan').then(() =>
      this.#one(request, signal, onProgress),
    );
    this.#queue = Promise.allSettled([before, result]);
    return result;
  }

  async #one(
    request: PlanRequest,
    signal: AbortSignal | undefined,
    onProgress: PlanOptions['onProgress'],
  ): Promise<Plan> {
    if (this.#closed) throw new MoeError('ERR_MOE_DISPOSED', 'the planner was closed before', { op: 'plan' });
    throwIfAborted('plan', signal, 'the plan');
    const { problem } = checkRequest(request);
    if (this.thread === 'main') {
      let done = 0;
      return planSync(request, () => {
        throwIfAborted('plan', signal, 'the plan');
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
    let stop = (): void => {};
    const planned = new Promise<Plan>((resolve, reject) => {
      const finish = (act: () => void): void => {
        worker.off('message', onMessage).off('error', onError).off('exit', onExit);
        worker.unref();
        act();
      };
      /** Ends the thread with the plan that it is making. */
      const giveUp = (error: unknown): void => {
        this.#worker = undefined;
        finish(() => reject(error));
        void worker.terminate();
      };
      const onMessage = (reply: ReplyMessage): void => {
        try {
          if (reply.kind === 'progress') onProgress?.(reply.done, reply.layers);
          else if (reply.kind === 'error') finish(() => reject(errorOf(reply)));
          else {
            const placements = reply.plan.placements.map(unpackPlacement);
            finish(() => resolve({ ...reply.plan, placements, from: problem.current }));
          }
        } catch (error) {
          giveUp(error);
        }
      };
      const lost = (cause: unknown): void => {
        const text = cause instanceof Error ? cause.message : `exit code ${cause}`;
        giveUp(
          new MoeError('ERR_MOE_INTERNAL', `the planning thread ended (${text})`, { op: 'plan', cause }),
        );
      };
      const onError = (error: Error): void => lost(error);
      const onExit = (code: number): void => lost(code);
      stop = () => giveUp(undefined); // whoever waits has been told
      worker.ref();
      worker.on('message', onMessage).on('error', onError).on('exit', onExit);
      try {
        worker.postMessage(message, [message.loads.counts.buffer as ArrayBuffer]);
      } catch (error) {
        // All but the memory has been checked
        giveUp(
          new MoeError(
            'ERR_MOE_INVALID_ARG',
            `expected memory to be what a plan gave, which can cross threads: ${(error as Error).message}`,
            { op: 'plan', arg: 'memory', cause: error },
          ),
        );
      }
    });
    return unlessAborted('plan', planned, signal, 'the plan', stop);
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
  const { thread, ...rest } = check.object('options', options, [...planOptions, ...plannerOptions]);
  const planner = new Planner(thread === undefined ? {} : { thread });
  try {
    return await planner.plan(request, rest);
  } finally {
    await planner.close();
  }
}
