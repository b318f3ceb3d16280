// Builds what npm does not ship: dist/ (tsc, and a bundle of it) and build/Release/moe_cpu.node (node-gyp).
//
//   node scripts/build.mjs                both; fails if either does
//   node scripts/build.mjs --missing      only what is older than its sources; without a compiler the addon is
//                                         skipped with a message, because the package works in TypeScript alone
//   node scripts/build.mjs --typescript   dist/ only
import { spawnSync } from 'node:child_process';
import {
  copyFileSync,
  existsSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  utimesSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const addon = join(root, 'build', 'Release', 'moe_cpu.node');

/** Newest change among files and folders. */
function newest(...paths) {
  let time = 0;
  for (const path of paths.map((path) => join(root, path))) {
    if (!existsSync(path)) continue;
    const stat = statSync(path);
    time = Math.max(time, stat.mtimeMs);
    if (stat.isDirectory()) {
      for (const name of readdirSync(path, { recursive: true })) {
        time = Math.max(time, statSync(join(path, String(name))).mtimeMs);
      }
    }
  }
  return time;
}

const builtAt = (path) => (existsSync(path) ? statSync(path).mtimeMs : 0);
const answers = (command, ...args) => spawnSync(command, args, { stdio: 'ignore' }).status === 0;

/** What a native build lacks on this machine, for people; empty when nothing does. */
export function missingTools() {
  if (process.platform === 'win32') return []; // node-gyp finds Visual Studio by itself
  const missing = [];
  const [compiler, ...prefix] = (process.env.CXX ?? 'c++').trim().split(/\s+/); // CXX="ccache g++" is usual
  if (!answers(compiler, ...prefix, '--version')) missing.push('a C++20 compiler (c++)');
  if (!answers('make', '--version')) missing.push('make');
  if (!answers(process.env.PYTHON ?? 'python3', '--version')) missing.push('python3');
  return missing;
}

/** Compiles lib/ to dist/. */
export function buildTypescript({ missingOnly = false } = {}) {
  const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc');
  if (!existsSync(tsc) && existsSync(join(root, 'dist'))) return true; // an installed package has dist/ already
  const stamp = join(root, 'dist', 'lib', 'index.js');
  if (missingOnly && builtAt(stamp) > newest('lib', 'bench', 'test/cases', 'tsconfig.json')) return true;
  rmSync(join(root, 'dist'), { recursive: true, force: true }); // no output of a source that is gone
  if (!run('TypeScript', process.execPath, [tsc, '-p', root]) || !bundle()) return false;
  copyFileSync(join(root, 'binding.gyp'), join(root, 'dist', 'binding.gyp'));
  return true;
}

/** Joins what `import 'moe-kernels'` loads into one file: resolving its modules one by one takes most of an import. */
function bundle() {
  const { dependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
  return run('the bundle', process.execPath, [
    join(root, 'node_modules', 'rolldown', 'bin', 'cli.mjs'),
    join(root, 'dist', 'lib', 'index.js'),
    join(root, 'dist', 'lib', 'eplb', 'planner_worker.js'), // started by its name, from beside whoever starts it
    ...[
      '--format',
      'esm',
      '--platform',
      'node',
      '--dir',
      join(root, 'dist', 'bundle'),
      '--log-level',
      'warn',
    ],
    ...Object.keys(dependencies).flatMap((name) => ['--external', name]),
  ]);
}

/** Compiles csrc/ to the CPU addon; 'skipped' where the tools for it are not there. */
export function buildAddon({ missingOnly = false } = {}) {
  // The addon tells the version that package.json has
  if (missingOnly && builtAt(addon) > newest('csrc', 'binding.gyp', 'package.json')) return true;
  const missing = missingTools();
  if (missing.length > 0) {
    console.error(`The CPU addon is not built: missing on this machine: ${missing.join(', ')}.`);
    return 'skipped';
  }
  const flags = [
    'configure',
    'build',
    '--release',
    '-j',
    'max',
    '--loglevel',
    'error',
    ...installedHeaders(),
  ];
  const nodeGyp = join(root, 'node_modules', 'node-gyp', 'bin', 'node-gyp.js');
  // npm puts a node-gyp of its own on the PATH of scripts, for packages that have none.
  const [command, ...args] = existsSync(nodeGyp)
    ? [process.execPath, nodeGyp, ...flags]
    : ['node-gyp', ...flags];
  if (!withBindingGyp(() => run('the CPU addon', command, args))) return false;
  utimesSync(addon, new Date(), new Date()); // sources may be newer without a difference
  return true;
}

/**
 * Runs `build` with a binding.gyp in place, which node-gyp insists on. The npm package keeps its own in dist/: package
 * managers take one beside package.json for an install script, and `npm ci` runs that whatever package.json says,
 * because lock files do not keep `gypfile`.
 */
function withBindingGyp(build) {
  const file = join(root, 'binding.gyp');
  if (existsSync(file)) return build();
  copyFileSync(join(root, 'dist', 'binding.gyp'), file);
  try {
    return build();
  } finally {
    rmSync(file);
  }
}

/** Node's own headers where they are installed beside it, so that node-gyp need not download them. */
export function installedHeaders() {
  if (process.env.npm_config_nodedir) return [];
  const prefix = join(dirname(realpathSync(process.execPath)), '..');
  return existsSync(join(prefix, 'include', 'node', 'common.gypi')) ? [`--nodedir=${prefix}`] : [];
}

function run(what, command, args) {
  const begun = Date.now();
  process.stderr.write(`Building ${what} ... `);
  const { status, stdout, stderr } = spawnSync(command, args, { cwd: root, encoding: 'utf8' });
  process.stderr.write(status === 0 ? `${((Date.now() - begun) / 1000).toFixed(1)} s\n` : 'failed\n');
  const output = `${stdout ?? ''}${stderr ?? ''}`;
  if (status !== 0 || /warning:/i.test(output)) process.stderr.write(output);
  return status === 0;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const missingOnly = process.argv.includes('--missing');
  const typescript = buildTypescript({ missingOnly });
  const native = process.argv.includes('--typescript') || buildAddon({ missingOnly });
  const failed = !typescript || !native || (native === 'skipped' && !missingOnly);
  process.exit(failed ? 1 : 0);
}
