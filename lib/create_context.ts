// Which backend a context gets: the only place that chooses one.
import { availableParallelism } from 'node:os';
import type { BackendName } from './backend/backend.js';
import { NativeBackend } from './backend/native.js';
import { OracleBackend } from './backend/oracle.js';
import { Context } from './context.js';
import { env } from './env.js';
import { MoeError } from './errors.js';
import { type BackendStatus, describeStatus, loadBackend, nativeBackends, requireBackend } from './native.js';
import { choice, integer, resolveOptions } from './options.js';
import { constructionKey } from './tensor.js';

/** Every backend, in the order that 'auto' tries them. */
export const backendNames = [...nativeBackends, 'oracle'] as const;
const MAX_THREADS = 1024;
const isas = ['avx512', 'avx2', 'neon', 'scalar'] as const;

export interface ContextOptions {
  /** 'auto' (default) takes the first of cuda, ascend, cpu that is ready, else the pure TypeScript oracle. */
  backend?: 'auto' | BackendName;
  /** Which device of the backend. Default 0. */
  device?: number;
  /** Threads of the CPU backend. Default: the parallelism available to the process. */
  threads?: number;
  /**
   * Instruction set of the CPU backend's kernels. 'auto' (default) takes the best that the processor runs; one that
   * it does not run is refused with ERR_MOE_UNSUPPORTED. `describe().paths` says what each op took.
   */
  isa?: 'auto' | (typeof isas)[number];
}

/**
 * Opens a context. Only here, and only for 'auto', may one backend stand in for another; `context.backend` and
 * `context.describe()` say which was taken and why the others were not.
 * @throws MoeError ERR_MOE_BACKEND where the backend asked for cannot be used, with everything that was tried.
 */
export async function createContext(options: ContextOptions = {}): Promise<Context> {
  const op = 'createContext';
  const resolved = resolveOptions(
    op,
    {
      backend: choice(['auto', ...backendNames], 'auto'),
      device: integer({ min: 0, max: 1023, default: 0 }),
      threads: integer({ min: 1, max: MAX_THREADS, default: () => threadsOf(op) }),
      isa: choice(['auto', ...isas], () => isaOf(op)),
    },
    options,
    { given: new Set(), dim: () => 0 },
  ) as Required<ContextOptions>;
  const { backend: requested } = resolved;
  const passedOver: { backend: BackendName; reason: string }[] = [];
  const name = requested === 'auto' ? (preferred(op) ?? firstReady(passedOver)) : requested;
  if (name === 'oracle' && resolved.device !== 0) {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected device: 0 (the oracle is one) but received ${resolved.device}`,
      {
        op,
        arg: 'device',
      },
    );
  }
  const backend =
    name === 'oracle' ? new OracleBackend() : new NativeBackend(name, requireBackend(name), resolved);
  return new Context(constructionKey, backend, requested, passedOver);
}

/** The threads of a context that does not say. */
function threadsOf(op: string): number {
  const text = env.threads.read();
  const threads = text === undefined ? availableParallelism() : Number(text);
  if (Number.isInteger(threads) && threads >= 1 && threads <= MAX_THREADS) return threads;
  throw new MoeError(
    'ERR_MOE_INVALID_ARG',
    `expected ${env.threads.name}: an integer from 1 to ${MAX_THREADS} but received '${text}'`,
    { op, arg: env.threads.name },
  );
}

/** The instruction set of a context that does not say. */
function isaOf(op: string): 'auto' | (typeof isas)[number] {
  const name = env.isa.read();
  if (name === undefined || name === 'auto') return 'auto';
  const isa = isas.find((each) => each === name);
  if (isa !== undefined) return isa;
  throw new MoeError(
    'ERR_MOE_INVALID_ARG',
    `expected ${env.isa.name}: one of auto, ${isas.join(', ')} but received '${name}'`,
    { op, arg: env.isa.name },
  );
}

function preferred(op: string): BackendName | undefined {
  const name = env.backend.read();
  if (name === undefined || name === 'auto') return undefined;
  if (!backendNames.includes(name as BackendName)) {
    throw new MoeError(
      'ERR_MOE_INVALID_ARG',
      `expected ${env.backend.name}: one of auto, ${backendNames.join(', ')} but received '${name}'`,
      { op, arg: env.backend.name },
    );
  }
  return name as BackendName;
}

function firstReady(passedOver: { backend: BackendName; reason: string }[]): BackendName {
  for (const backend of nativeBackends) {
    const { status } = loadBackend(backend);
    if (status.state === 'ready') return backend;
    passedOver.push({ backend, reason: describeStatus(status) });
  }
  return 'oracle';
}

/** The state of every backend on this machine; loads the addons to find out. */
export function backendStatuses(): BackendStatus[] {
  return nativeBackends.map((backend) => loadBackend(backend).status);
}
