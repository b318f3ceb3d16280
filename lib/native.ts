// The only file that loads a .node. Every attempt and its error is kept, so that `doctor` and a failed createContext
// can say what was tried, what happened and what would help. Nothing is loaded before somebody asks.
import { createRequire } from 'node:module';
import { basename, join, sep } from 'node:path';
import { type AddonDescription, mismatch } from './addon_match.js';
import type { BackendName, MemoryInfo, Roofline } from './backend/backend.js';
import { binaryFault } from './binary.js';
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
  /** 0 begins a second lane beside the main one, 1 goes on with the main one, 2 joins them. */
  takeLane(lane: 0 | 1 | 2): void;
  memory(): MemoryInfo;
  paths(): Record<string, string>;
  roofline(): Roofline;
  close(): Promise<void>;
  abandon(): void;
  /** Settles promises whose work is done; true while it should be called again soon. */
  poll(): boolean;
}

export interface AddonProbe {
  readonly state: 'ready' | 'no driver' | 'no device' | 'failed';
  readonly detail: string;
  readonly devices: readonly string[];
  readonly facts: Readonly<Record<string, string>>;
}

export interface Addon {
  describe(): AddonDescription;
  probe(): AddonProbe;
  /** Gives the addon the class of the errors it throws. */
  setErrorClass(errorClass: typeof MoeError): void;
  /** What V8 has been told of beside its heap; for tests. */
  externalMemory(): number;
  readonly Context: new (options: { device: number; threads: number; isa: string }) => NativeContext;
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
  /** Where node-gyp-build looks for the addon, in a clone and in an installed package: its builds and its prebuilds. */
  readonly folder: string;
  /** The npm script that makes it; absent where this version has no sources for it. */
  readonly build?: string;
}

const require = createRequire(import.meta.url);

/**
 * Backends that are addons, in the order that 'auto' tries them. Each has a folder of its own, because node-gyp-build
 * takes the first .node that it finds in one.
 */
const rows: Record<Exclude<BackendName, 'oracle'>, Row> = {
  cuda: { folder: 'out/cuda', build: 'build:cuda' },
  ascend: { folder: 'out/ascend' },
  cpu: { folder: '.', build: 'build' },
};

/** The addon's file, or the place that was looked at and what was wrong there. */
function locate(backend: keyof typeof rows): { path: string; error?: string } {
  const path = join(packageRoot, rows[backend].folder);
  const name = `moe_${backend}`;
  const none = `no ${name}.node in build/Release or prebuilds/${process.platform}-${process.arch}`;
  try {
    const found = (require('node-gyp-build') as { resolve(folder: string): string }).resolve(path);
    // It also looks beside the node that runs this, where there may be one of another backend
    return basename(found).startsWith(`${name}.`)
      ? { path: found }
      : { path, error: `${none}, only ${found}` };
  } catch {
    return { path, error: none };
  }
}

const FOREIGN = 'the addon does not belong to this package';
/** The platform that published packages carry addons for. */
const PREBUILT = 'linux-x64 (glibc)';
const installed = packageRoot.includes(`${sep}node_modules${sep}`);

/** The command that builds an addon here: in a clone, or in the package as others have installed it. */
function buildCommand(script: string): string {
  if (!installed) return `'npm run ${script}'`;
  // The published package carries the sources of the CPU addon only.
  return script === 'build' ? `'npm explore moe-kernels -- npm run build'` : `'npm run ${script}' in a clone`;
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
  const { build } = rows[backend];
  const none = { backend, attempts: [], devices: [], facts: {} };
  const { path, error } = locate(backend);
  if (error !== undefined) {
    const detail = build === undefined ? 'it is not in this version' : adviseWithout(build);
    return { status: { ...none, state: 'not built', detail, attempts: [{ path, error }] } };
  }
  try {
    const fault = binaryFault(path);
    if (fault !== undefined) throw new Error(fault);
    const addon = require(path) as Addon;
    const other = mismatch(backend, addon.describe());
    if (other !== undefined) throw new Error(`${FOREIGN}: ${other}`);
    addon.setErrorClass(MoeError);
    return { addon, status: { ...none, ...addon.probe(), loadedFrom: path } };
  } catch (error) {
    const message = (error as Error).message;
    const advice = build === undefined ? '' : `; ${adviseFor(message, buildCommand(build))}`;
    return {
      status: {
        ...none,
        state: 'failed',
        detail: `${message}${advice}`,
        attempts: [{ path, error: message }],
      },
    };
  }
}

/** How to get an addon that is not there. */
function adviseWithout(build: string): string {
  const none = `no addon for ${process.platform}-${process.arch}`;
  const made = `${buildCommand(build)} makes one from source`;
  return installed
    ? `${none} in this package: as published it has one for ${PREBUILT}; elsewhere ${made}`
    : `${none}; ${made}`;
}

/** A next step chosen by symptom. */
function adviseFor(message: string, command: string): string {
  if (/GLIBC|GLIBCXX|CXXABI/.test(message)) {
    return `the prebuilt addon needs a newer C library: ${command} makes one for this machine`;
  }
  if (message.startsWith(FOREIGN))
    return installed ? 'install the package again' : `${command} makes a new one`;
  if (/invalid ELF|wrong ELF class|not a mach-o|not a valid Win32|the file is /i.test(message)) {
    return `${command} makes a new one`;
  }
  return `${command} may mend it`;
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
