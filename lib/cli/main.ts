#!/usr/bin/env node
// The command line. One file per command; exit code 0 good, 1 a check failed, 2 misuse or bad input.
import { Command, CommanderError } from 'commander';
import { env } from '../env.js';
import { MoeError } from '../errors.js';
import { packageManifest } from '../package.js';
import { registerBench } from './bench.js';
import { registerDoctor } from './doctor.js';
import { definitions } from './help.js';
import { registerPlan } from './plan.js';
import { registerRun } from './run.js';
import { registerSimulate } from './simulate.js';

const MISUSE = 2;

async function main(): Promise<void> {
  const program = new Command('moe-kernels')
    .description(
      'Mixture-of-Experts kernels for Node: run a layer, look at the machine, measure, place experts.',
    )
    .version(packageManifest().version)
    .showHelpAfterError('(moe-kernels --help lists the commands)')
    .addHelpText(
      'after',
      definitions(
        'Environment',
        Object.values(env).map(({ name, help }) => [name, help]),
      ),
    )
    .exitOverride();
  registerRun(program);
  registerDoctor(program);
  registerBench(program);
  registerPlan(program);
  registerSimulate(program);
  for (const command of program.commands) {
    command.exitOverride().showHelpAfterError(`(moe-kernels ${command.name()} --help lists the options)`);
  }
  try {
    await program.parseAsync();
  } catch (error) {
    if (error instanceof CommanderError) {
      process.exitCode = error.exitCode === 0 ? 0 : MISUSE;
    } else if (error instanceof MoeError) {
      console.error(`${error.code}: ${error.message}`);
      process.exitCode = MISUSE;
    } else {
      console.error(error);
      process.exitCode = MISUSE;
    }
  }
}

// A reader that goes away (`| head`) is no failure of ours; a full disk is.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit();
  console.error(`the output cannot be written (${error.message})`);
  process.exit(MISUSE);
});

await main();
