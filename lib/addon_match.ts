// Whether an addon and this copy of lib/ belong together. Calls pass between them as numbers whose meaning both know
// from their own sources, so an addon that was left over from other sources would compute something else.
import type { BackendName } from './backend/backend.js';
import { errorCodes } from './errors.js';
import { definedOps } from './op.js';
import { packageManifest } from './package.js';
import { dtypes } from './tensor.js';

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

/** Why an addon is not the one of this backend and version; undefined where it is. */
export function mismatch(backend: BackendName, addon: AddonDescription): string | undefined {
  if (addon.backend !== backend) return `it is the addon of the ${addon.backend} backend`;
  const { name, version } = packageManifest();
  if (addon.version !== version) return `it is of ${name} ${addon.version}, this is ${name} ${version}`;
  const difference =
    differing(
      'dtypes',
      addon.dtypes.map(dtypeLine),
      Object.entries(dtypes).map(([name, { bytes }]) => dtypeLine({ name, bytes })),
    ) ??
    differing('error codes', addon.errors, Object.keys(errorCodes)) ??
    // One that lacks an op refuses its calls; one that has more of them is never asked.
    addon.ops
      .map(({ name, fields }) => differing(name, fields, definedOps.get(name)?.fields ?? fields))
      .find((each) => each !== undefined);
  return difference && `it was built from other sources than this ${name} ${version}: ${difference}`;
}

const dtypeLine = ({ name, bytes }: { name: string; bytes: number }) => `${name} of ${bytes} bytes`;

function differing(what: string, has: readonly string[], expected: readonly string[]): string | undefined {
  for (let i = 0; i < Math.max(has.length, expected.length); i++) {
    if (has[i] !== expected[i]) return `${what}: ${quote(has[i])} instead of ${quote(expected[i])}`;
  }
  return undefined;
}

const quote = (line: string | undefined) => (line === undefined ? 'nothing' : `'${line}'`);
