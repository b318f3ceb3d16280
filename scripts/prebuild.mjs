// Makes prebuilds/<platform>-<arch>/moe_cpu.node, which the npm package carries and node-gyp-build loads.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { installedHeaders } from './build.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const [headers] = installedHeaders();
const env = { ...process.env };
if (headers !== undefined) env.npm_config_nodedir = headers.replace('--nodedir=', '');

// One N-API addon serves every Node version, so one target is enough: the one that runs this.
const args = ['--napi', '--strip', '--tag-libc', '--name', 'moe_cpu', '--target', process.version.slice(1)];
const prebuildify = join(root, 'node_modules', 'prebuildify', 'bin.js');
const { status } = spawnSync(process.execPath, [prebuildify, ...args], {
  cwd: root,
  env,
  stdio: ['ignore', 2, 2],
});
process.exit(status ?? 1);
