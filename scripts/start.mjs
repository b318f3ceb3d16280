// `npm start`: builds what is missing, then runs a DeepSeek-V3 MoE layer and checks it against transformers.
// A compiler that is missing or fails is no obstacle: the same command then runs in pure TypeScript and says so.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildAddon, buildTypescript } from './build.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
if (!buildTypescript({ missingOnly: true })) process.exit(1);
if (buildAddon({ missingOnly: true }) !== true) console.error('Going on in pure TypeScript.\n');

const layer = join(root, 'test', 'fixtures', 'hf', 'deepseek_v3_256');
const args = process.argv.slice(2);
const command = [join(root, 'dist', 'lib', 'cli', 'main.js'), ...(args.length > 0 ? args : ['run', layer])];
process.exit(spawnSync(process.execPath, command, { stdio: 'inherit' }).status ?? 1);
