// config.json as the table of architectures reads it: every value is checked where it is read, several spellings of a
// key count as one, and a value that the ops cannot do is refused by name. transformers 5 renamed or dropped some
// keys, so every reader lists the old and the new spelling.
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';
import { checkpointError } from './checkpoint_error.js';

/** Spellings of the same thing across families and versions of transformers. */
export const keys = {
  experts: ['n_routed_experts', 'num_local_experts', 'num_experts', 'moe_num_experts'],
  topK: ['num_experts_per_tok', 'experts_per_token', 'moe_topk', 'moe_k', 'num_experts_per_token'],
  sharedExperts: ['n_shared_experts', 'moe_num_shared_experts', 'num_shared_experts', 'num_shared_expert'],
  activation: ['hidden_act', 'hidden_activation', 'activation_function'],
  scoring: ['scoring_func', 'moe_router_score_function'],
  selection: ['topk_method'],
  groups: ['n_group', 'num_expert_group'],
  topGroups: ['topk_group', 'limited_topk_group'],
  renormalize: ['norm_topk_prob'],
  scalingFactor: ['routed_scaling_factor', 'moe_routed_scaling_factor'],
  zeroExperts: ['zero_expert_num'],
  swigluLimit: ['swiglu_limit'],
} as const satisfies Record<string, readonly string[]>;

type Names = readonly string[];

/** The values of a configuration as they hold for one layer: a list gives one value per layer. */
export class ModelConfig {
  readonly file: string;
  readonly values: Readonly<Record<string, unknown>>;
  readonly #layer: number;

  constructor(file: string, values: Readonly<Record<string, unknown>>, layer: number) {
    this.file = file;
    this.values = values;
    this.#layer = layer;
  }

  /** The value of the first spelling present; null is absent. Two spellings that disagree are an error. */
  #find(names: Names): { name: string; value: unknown } | undefined {
    let found: { name: string; value: unknown } | undefined;
    for (const name of names) {
      let value = Object.hasOwn(this.values, name) ? this.values[name] : undefined;
      if (Array.isArray(value)) value = this.#ofLayer(name, value);
      if (value === undefined || value === null) continue;
      if (found !== undefined && found.value !== value) {
        throw checkpointError(
          `${this.file}: ${found.name} = ${describeValue(found.value)} and ${name} = ${describeValue(value)} disagree`,
        );
      }
      found ??= { name, value };
    }
    return found;
  }

  #ofLayer(name: string, list: readonly unknown[]): unknown {
    if (list.length === 1) return list[0];
    if (this.#layer < list.length) return list[this.#layer];
    throw checkpointError(`${this.file}: ${name} has ${list.length} entries, none for layer ${this.#layer}`);
  }

  /** Whether a key is there at all, be it null. */
  mentions(names: Names): boolean {
    return names.some((name) => Object.hasOwn(this.values, name));
  }

  integer(names: Names, { min = 0, fallback }: { min?: number; fallback?: number } = {}): number {
    const found = this.#find(names);
    if (found === undefined) {
      if (fallback !== undefined) return fallback;
      throw checkpointError(`${this.file}: has none of ${names.join(', ')}`);
    }
    const { name, value } = found;
    if (!Number.isSafeInteger(value) || (value as number) < min) {
      throw checkpointError(
        `${this.file}: expected ${name}: an integer >= ${min} but it is ${describeValue(value)}`,
      );
    }
    return value as number;
  }

  optionalInteger(names: Names): number | undefined {
    return this.#find(names) === undefined ? undefined : this.integer(names);
  }

  positive(names: Names, fallback: number): number {
    const found = this.#find(names);
    if (found === undefined) return fallback;
    const { name, value } = found;
    if (typeof value !== 'number' || !Number.isFinite(value) || value <= 0) {
      throw checkpointError(
        `${this.file}: expected ${name}: a number above 0 but it is ${describeValue(value)}`,
      );
    }
    return value;
  }

  flag(names: Names, fallback: boolean): boolean {
    const found = this.#find(names);
    if (found === undefined) return fallback;
    if (typeof found.value !== 'boolean') {
      throw checkpointError(
        `${this.file}: expected ${found.name}: true or false but it is ${describeValue(found.value)}`,
      );
    }
    return found.value;
  }

  /** One of a closed set of words; another word is something this package cannot do. */
  word<T extends string>(names: Names, allowed: readonly T[], fallback: T): T {
    const found = this.#find(names);
    if (found === undefined) return fallback;
    if (!allowed.includes(found.value as T))
      throw this.#unsupported(found, allowed.map(describeValue).join(' or '));
    return found.value as T;
  }

  /**
   * Insists that a key which this architecture does not have is absent or says what the architecture does anyway.
   * `false` and 0 stand for "not used" in some configurations.
   */
  fixed(names: Names, expected: number | boolean): void {
    const found = this.#find(names);
    if (found === undefined || found.value === expected) return;
    if (typeof expected === 'number' && (found.value === false || found.value === 0)) return;
    throw this.#unsupported(found, String(expected));
  }

  #unsupported({ name, value }: { name: string; value: unknown }, supported: string): MoeError {
    const type = this.values.model_type;
    return new MoeError(
      'ERR_MOE_UNSUPPORTED',
      `${this.file}: ${name} = ${describeValue(value)} is not supported${typeof type === 'string' ? ` for ${type}` : ''}; ` +
        `supported: ${supported}`,
      { op: 'checkpoint', arg: name },
    );
  }
}
