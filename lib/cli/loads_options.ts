// What the planning commands ask about the loads they read: one set of options and one reader, so that what plans also
// simulates.
import type { Command } from 'commander';
import { readLoads } from '../eplb/load_file.js';
import type { Loads } from '../eplb/loads.js';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import { integerOption } from './integer_option.js';

export interface LoadsFlags {
  shared?: number;
  sharedTopK?: number;
  sharedPlacement: string;
  groups?: number;
  nodes?: number;
  depth?: number;
  topk?: boolean;
  experts?: number;
  stepTokens?: number;
}

export function addLoadsOptions(command: Command): Command {
  return command
    .option('--shared <n>', 'shared experts: the last n columns of the loads', integerOption('--shared', 0))
    .option(
      '--shared-top-k <k>',
      'the loads have no columns for shared experts: append them, for a router that picks k',
      integerOption('--shared-top-k', 1),
    )
    .option(
      '--shared-placement <how>',
      'free (planned like any expert) or everyDevice (one replica on each)',
      'free',
    )
    .option('--groups <n>', 'expert groups, for hierarchical planners', integerOption('--groups', 1))
    .option('--nodes <n>', 'nodes, for hierarchical planners', integerOption('--nodes', 1))
    .option('--depth <n>', "blocks of flashlb's search (default 4)", integerOption('--depth', 1))
    .option('--topk', 'the loads are ids [layers, tokens, k]; needs --experts and --step-tokens')
    .option('--experts <n>', 'number of experts, for --topk', integerOption('--experts', 1))
    .option('--step-tokens <n>', 'tokens per step, for --topk', integerOption('--step-tokens', 1));
}

/** How many of the experts are shared. */
export const sharedOf = ({ shared, sharedTopK }: LoadsFlags): number =>
  shared ?? (sharedTopK === undefined ? 0 : 1);

/** The fields of a request that these options say. Throws ERR_MOE_INVALID_ARG for options that contradict. */
export function requestOf(op: string, flags: LoadsFlags) {
  const { sharedPlacement, groups, nodes, depth, topk, experts, stepTokens } = flags;
  const misuse = (message: string, arg: string): MoeError =>
    new MoeError('ERR_MOE_INVALID_ARG', message, { op, arg });
  if (sharedPlacement !== 'free' && sharedPlacement !== 'everyDevice')
    throw misuse(
      `expected --shared-placement to be free or everyDevice but received ${describeValue(sharedPlacement)}`,
      'shared-placement',
    );
  if (flags.sharedTopK !== undefined && flags.shared === 0)
    throw misuse('expected --shared to be at least 1 with --shared-top-k but received 0', 'shared');
  if (sharedPlacement === 'everyDevice' && sharedOf(flags) === 0)
    throw misuse('expected --shared with --shared-placement everyDevice', 'shared');
  if (topk === true && (experts === undefined || stepTokens === undefined))
    throw misuse(
      'expected --experts and --step-tokens with --topk',
      experts === undefined ? 'experts' : 'step-tokens',
    );
  if (topk !== true && (experts !== undefined || stepTokens !== undefined))
    throw misuse('expected --topk with --experts and --step-tokens', 'topk');
  return {
    shared: sharedOf(flags),
    sharedPlacement,
    ...(groups === undefined ? {} : { groups }),
    ...(nodes === undefined ? {} : { nodes }),
    ...(depth === undefined ? {} : { depth }),
  } as const;
}

/** The loads of a file as the options say they are, columns of shared experts appended where they ask for it. */
export async function readFlaggedLoads(file: string, flags: LoadsFlags): Promise<Loads> {
  const { topk, experts, stepTokens, sharedTopK } = flags;
  const ids = topk === true ? { topk: { experts: experts!, stepTokens: stepTokens! } } : {};
  const loads = await readLoads(file, ids);
  return sharedTopK === undefined ? loads : loads.withShared(sharedOf(flags), sharedTopK);
}
