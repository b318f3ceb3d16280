// The only file that loads a .node. Every attempt and its error is kept, so that `doctor` and a failed createContext
// can say what was tried, what happened and what would help. Nothing is loaded before somebody asks.
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import type { BackendName, MemoryInfo } from './backend/backend.js';
import { MoeError } from './errors.js';
import { packageRoot } from './package.js';

/** What csrc/binding exports; numbers are handles, byte counts or codes. */
export interface NativeContext {
  device(): string;
  allocate(dtype: number, elements: number): number;
  allocateExperts(layout: Float64Array): number;
  bytes(handle: number): number;
  release(handle: number): void;
  write(handle: number, data: ArrayBufferView | undefined): void;
  read(handle: number, values: boolean): Promise<ArrayBuffer>;
  readSync(handle: number, values: boolean): ArrayBuffer;
  enqueue(record: Float64Array, length: number): void;
  synchronize(): Promise<void>;
  synchronizeSync(): void;
  beginCapture(): void;
  endCapture(): number;
  abortCapture(): void;
  replay(capture: number): void;
  releaseCapture(capture: number): void;
  memory(): MemoryInfo;
  paths(): Record<string, string>;
  close(): Promise<void>;
  /** Settles promises whose work is done; true while it should be called again soon. */
  poll(): boolean;
}

export interface AddonProbe {
  readonly state: 'ready' | 'no driver' | 'no device' | 'failed';
  readonly detail: string;
  readonly devices: readonly string[];
  readonly facts: Readonly<Record<string, string>>;
}

export interface AddonDescription {
  readonly backend: string;
  readonly version: string;
  readonly dtypes: readonly { readonly name: string; readonly bytes: number }[];
  readonly errors: readonly string[];
  readonly ops: readonly {
    readonly name: string;
    readonly available: boolean;
    readonly fields: readonly string[];
  }[];
}

export interface Addon {
  describe(): AddonDescription;
  probe(): AddonProbe;
  /** Gives the addon the class of the errors it throws. */
  setErrorClass(errorClass: typeof MoeError): void;
  readonly Context: new (options: { device: number; threads: number }) => NativeContext;
}

export interface Attempt {
  readonly path: string;
  readonly error: string;
}

/** What became of loading a backend. */
export interface BackendStatus {
  readonly backend: BackendName;
  readonly state: 'ready' | 'not built' | 'no driver' | 'no device' | 'failed';
  readonly detail: string;
  readonly loadedFrom?: string;
  readonly attempts: readonly Attempt[];
  readonly devices: readonly string[];
  readonly facts: Readonly<Record<string, string>>;
}

interface Row {
  /** Where the .node may be, best first; a thrown error is an attempt that failed. */
  readonly find: () => string;
  readonly build: string;
}

const require = createRequire(import.meta.url);

/** Backends that are addons, in the order that 'auto' tries them. */
const rows: Record<Exclude<BackendName, 'oracle'>, Row> = {
  cuda: { find: () => inOut('cuda'), build: 'npm run build:cuda' },
  ascend: { find: () => inOut('ascend'), build: 'npm run build:ascend' },
  cpu: {
    find: () => (require('node-gyp-build') as { resolve(folder: string): string }).resolve(packageRoot),
    build: 'npm run build',
  },
};

/** CMake builds live outside build/, which node-gyp and prebuildify clear. */
function inOut(backend: string): string {
  const path = join(packageRoot, 'out', backend, `moe_${backend}.node`);
  if (!existsSync(path)) throw new Error(`no such file: ${path}`);
  return path;
}

export const nativeBackends = Object.keys(rows) as (keyof typeof rows)[];

interface Loaded {
  readonly addon?: Addon;
  readonly status: BackendStatus;
}
const loaded = new Map<BackendName, Loaded>();

/** Loads a backend's addon once and says what happened; never throws. */
export function loadBackend(backend: keyof typeof rows): Loaded {
  let result = loaded.get(backend);
  if (result === undefined) {
    result = load(backend);
    loaded.set(backend, result);
  }
  return result;
}

function load(backend: keyof typeof rows): Loaded {
  const { find, build } = rows[backend];
  const none = { attempts: [], devices: [], facts: {} };
  let path: string;
  try {
    path = find();
  } catch (error) {
    const detail = `no addon for ${process.platform}-${process.arch}; '${build}' makes one from source`;
    const attempts = [{ path: packageRoot, error: (error as Error).message.split('\n')[0] }];
    return { status: { ...none, backend, state: 'not built', detail, attempts } };
  }
  try {
    const addon = require(path) as Addon;
    addon.setErrorClass(MoeError);
    const { state, detail, devices, facts } = addon.probe();
    return { addon, status: { backend, state, detail, loadedFrom: path, attempts: [], devices, facts } };
  } catch (error) {
    const message = (error as Error).message;
    const detail = `${message}; ${adviseFor(message, build)}`;
    return { status: { ...none, backend, state: 'failed', detail, attempts: [{ path, error: message }] } };
  }
}

/** A next step chosen by symptom. */
function adviseFor(message: string, build: string): string {
  if (/GLIBC|GLIBCXX|CXXABI/.test(message))
    return `the prebuilt addon needs a newer C library: '${build}' makes one for this machine`;
  if (/invalid ELF|wrong ELF class|not a mach-o|not a valid Win32/i.test(message))
    return `the addon is for another platform or damaged: '${build}' makes a new one`;
  return `'${build}' may mend it`;
}

/** The addon of a backend that is ready, or the error that says what was tried. */
export function requireBackend(backend: keyof typeof rows): Addon {
  const { addon, status } = loadBackend(backend);
  if (addon !== undefined && status.state === 'ready') return addon;
  throw new MoeError('ERR_MOE_BACKEND', `the ${backend} backend is ${describeStatus(status)}`, {
    op: 'createContext',
    arg: 'backend',
  });
}

export function describeStatus({ state, detail, attempts }: BackendStatus): string {
  const tried = attempts.map(({ path, error }) => `${path}: ${error}`).join('; ');
  return `${state}: ${detail}${tried === '' ? '' : ` (tried ${tried})`}`;
}
