// Every planning policy by name: the list that the planner, the command line and the tests iterate over.
import { Arguments } from '../arguments.js';
import { adaptive } from './adaptive.js';
import { deepseek } from './deepseek.js';
import { flashlb } from './flashlb.js';
import { greedy } from './greedy.js';
import type { Policy } from './policy.js';
import { rebuild } from './rebuild.js';
import { linear } from './stay.js';
import { swift } from './swift.js';

const all = [adaptive, rebuild, deepseek, greedy, swift, flashlb, linear] as const;

/** All policies, our own default first. */
export const policies: ReadonlyMap<string, Policy> = new Map(all.map((policy) => [policy.name, policy]));

export const defaultPolicy = all[0].name;

/** Name and summary of every policy. */
export const policySummaries = (): [name: string, summary: string][] =>
  all.map(({ name, summary }) => [name, summary]);

/** The policy of a name. Throws ERR_MOE_INVALID_ARG listing the names there are. */
export function policyNamed(name: string): Policy {
  return (
    policies.get(name) ??
    new Arguments('plan').refuse('policy', `one of ${[...policies.keys()].join(', ')}`, name)
  );
}
