// Where the experts of one layer live. Loading, dispatch, logging and planning all read this one object, so that
// they cannot disagree (the bug class of a loader that assumes linear ids under a round-robin map).
// Invariant: immutable; every expert 0..experts-1 has at least one slot, every slot holds exactly one expert, and
// globalOf(ownerOf(e), slotOf(e)) === e. A physical id is slotOffsets[device] + slot, which is device * slots + slot
// whenever all devices have the same number of slots.
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { describeValue } from '../options.js';

export interface PlacementOptions {
  /** Number of experts, shared ones included; default: the highest id present plus one. */
  experts?: number;
  /**
   * 'reject' (default): an expert may stand at most once on a device, as vllm-ascend's maps require.
   * 'allow': slot-addressed maps (vLLM, SGLang, DeepSeek EPLB) may hold an expert twice on one device.
   */
  duplicates?: 'reject' | 'allow';
  /** 'equal' (default): every device has the same number of slots. 'ragged': only for layouts without redundancy. */
  slots?: 'equal' | 'ragged';
  /** Put in front of error messages, e.g. "map.json: layer 3". */
  where?: string;
}

const invalid = (where: string | undefined, message: string, arg: string): never => {
  throw new MoeError('ERR_MOE_INVALID_ARG', where === undefined ? message : `${where}: ${message}`, {
    op: 'placement',
    arg,
  });
};

const check = new Arguments('placement');
const optionNames: readonly string[] = ['experts', 'duplicates', 'slots', 'where'];

/** The experts of one MoE layer on `devices` devices. Build one with `Placement.fromRows`, a strategy or a map file. */
export class Placement {
  /** Logical experts, shared ones included: ids 0..experts-1. */
  readonly experts: number;
  readonly devices: number;
  /** i32[physical]: the logical id in every slot, device after device. Do not write to it. */
  readonly physicalToLogical: Int32Array;
  /** i32[devices + 1]: the first physical id of each device, then the total. */
  readonly slotOffsets: Int32Array;
  /** i32[experts + 1] and i32[physical]: the physical ids of every expert, ascending. */
  readonly #replicaOffsets: Int32Array;
  readonly #replicas: Int32Array;
  readonly #deviceOf: Int32Array;

  private constructor(experts: number, slotOffsets: Int32Array, physicalToLogical: Int32Array) {
    this.experts = experts;
    this.devices = slotOffsets.length - 1;
    this.slotOffsets = slotOffsets;
    this.physicalToLogical = physicalToLogical;
    this.#deviceOf = new Int32Array(physicalToLogical.length);
    for (let device = 0; device < this.devices; device++)
      this.#deviceOf.fill(device, slotOffsets[device], slotOffsets[device + 1]);
    this.#replicaOffsets = new Int32Array(experts + 1);
    for (const expert of physicalToLogical) this.#replicaOffsets[expert + 1]!++;
    for (let expert = 0; expert < experts; expert++)
      this.#replicaOffsets[expert + 1]! += this.#replicaOffsets[expert]!;
    this.#replicas = new Int32Array(physicalToLogical.length);
    const next = this.#replicaOffsets.slice();
    for (let physical = 0; physical < physicalToLogical.length; physical++)
      this.#replicas[next[physicalToLogical[physical]!]!++] = physical;
  }

  /**
   * rows[device][slot] = logical id. Throws ERR_MOE_INVALID_ARG for ragged rows, ids out of range, experts that are
   * nowhere, and (unless allowed) an expert twice on one device.
   */
  static fromRows(rows: ArrayLike<ArrayLike<number>>, options: PlacementOptions = {}): Placement {
    const { where } = check.object('options', options);
    if (check.list('rows', rows as unknown[]).length === 0)
      invalid(where, 'expected at least one device but received none', 'rows');
    const offsets = new Int32Array(rows.length + 1);
    for (let device = 0; device < rows.length; device++) {
      const slots = check.numbers(`rows[${device}]`, rows[device]!).length;
      if (options.slots !== 'ragged' && slots !== rows[0]!.length)
        invalid(
          where,
          `expected ${rows[0]!.length} slots on every device (as on device 0) but received ${slots} on device ${device}`,
          'rows',
        );
      offsets[device + 1] = offsets[device]! + slots;
    }
    const flat: number[] = [];
    for (let device = 0; device < rows.length; device++)
      for (let slot = 0; slot < rows[device]!.length; slot++) flat.push(rows[device]![slot]!);
    return Placement.#checked(flat, offsets, options);
  }

  /** physicalToLogical[device * slots + slot] = logical id, the flat form of vLLM and SGLang. */
  static fromPhysical(
    physicalToLogical: ArrayLike<number>,
    devices: number,
    options: PlacementOptions = {},
  ): Placement {
    check.object('options', options);
    check.integer('devices', devices, 1);
    const physical = check.numbers('physicalToLogical', physicalToLogical).length;
    if (physical === 0 || physical % devices !== 0)
      invalid(
        options.where,
        `expected a number of physical experts divisible by ${devices} devices but received ${physical}`,
        'physicalToLogical',
      );
    const offsets = Int32Array.from({ length: devices + 1 }, (_, device) => (device * physical) / devices);
    return Placement.#checked(Array.from(physicalToLogical), offsets, options);
  }

  static #checked(flat: number[], offsets: Int32Array, options: PlacementOptions): Placement {
    const { where } = check.object('options', options, optionNames);
    check.oneOf('duplicates', options.duplicates ?? 'reject', ['reject', 'allow']);
    check.oneOf('slots', options.slots ?? 'equal', ['equal', 'ragged']);
    if (options.experts !== undefined && !(Number.isInteger(options.experts) && options.experts >= 1))
      invalid(
        where,
        `expected experts to be a positive integer but received ${describeValue(options.experts)}`,
        'experts',
      );
    if (flat.length === 0) invalid(where, 'expected at least one slot but received none', 'rows');
    let highest = -1;
    for (const [physical, expert] of flat.entries()) {
      if (
        !Number.isInteger(expert) ||
        expert < 0 ||
        (options.experts !== undefined && expert >= options.experts)
      )
        invalid(
          where,
          `expected an expert id in 0..${(options.experts ?? 2 ** 31) - 1} in physical slot ${physical} ` +
            `but received ${describeValue(expert)}`,
          'rows',
        );
      if (expert > highest) highest = expert;
    }
    const experts = options.experts ?? highest + 1;
    if (flat.length < experts)
      invalid(
        where,
        `expected at least ${experts} slots for ${experts} experts but received ${flat.length}`,
        'rows',
      );
    const seenOn = new Int32Array(experts).fill(-1);
    for (let device = 0; device + 1 < offsets.length; device++)
      for (let physical = offsets[device]!; physical < offsets[device + 1]!; physical++) {
        const expert = flat[physical]!;
        if (seenOn[expert] === device && options.duplicates !== 'allow')
          invalid(
            where,
            `expected every expert at most once on a device but received expert ${expert} twice on device ${device}`,
            'rows',
          );
        seenOn[expert] = device;
      }
    const missing = seenOn.indexOf(-1);
    if (missing >= 0)
      invalid(
        where,
        `expected every expert 0..${experts - 1} on some device but expert ${missing} is nowhere`,
        'rows',
      );
    return new Placement(experts, offsets, Int32Array.from(flat));
  }

  /** Slots on every device. Throws ERR_MOE_INVALID_ARG when the devices differ (linear with a remainder). */
  get slots(): number {
    const slots = this.slotOffsets[1]!;
    for (let device = 1; device < this.devices; device++)
      if (this.slotOffsets[device + 1]! - this.slotOffsets[device]! !== slots)
        invalid(
          undefined,
          'expected the same number of slots on every device but received a ragged placement',
          'slots',
        );
    return slots;
  }

  /** Number of slots, all devices together. */
  get physicalExperts(): number {
    return this.physicalToLogical.length;
  }

  /** Slots beyond one per expert: the sum over experts of (replicas - 1). Computed, never assumed. */
  get redundant(): number {
    return this.physicalToLogical.length - this.experts;
  }

  #expert(expert: number): number {
    if (!Number.isInteger(expert) || expert < 0 || expert >= this.experts)
      invalid(undefined, `expected an expert id in 0..${this.experts - 1} but received ${expert}`, 'expert');
    return expert;
  }

  #device(device: number): number {
    if (!Number.isInteger(device) || device < 0 || device >= this.devices)
      invalid(undefined, `expected a device in 0..${this.devices - 1} but received ${device}`, 'device');
    return device;
  }

  /** How many slots hold this expert. */
  replicaCount(expert: number): number {
    return this.#replicaOffsets[this.#expert(expert) + 1]! - this.#replicaOffsets[expert]!;
  }

  /** The physical ids that hold this expert, ascending. A view: do not write to it. */
  replicasOf(expert: number): Int32Array {
    return this.#replicas.subarray(
      this.#replicaOffsets[this.#expert(expert)],
      this.#replicaOffsets[expert + 1],
    );
  }

  /** The device of the expert's replica (default: its first, the lowest physical id). */
  ownerOf(expert: number, replica = 0): number {
    return this.#deviceOf[this.physicalOf(expert, replica)]!;
  }

  /** The slot of the expert on `device` (default: on its owner), or -1 if that device does not hold it. */
  slotOf(expert: number, device?: number): number {
    const on = device === undefined ? this.ownerOf(expert) : this.#device(device);
    for (const physical of this.replicasOf(expert))
      if (this.#deviceOf[physical] === on) return physical - this.slotOffsets[on]!;
    return -1;
  }

  /** The physical id of a replica. */
  physicalOf(expert: number, replica = 0): number {
    const replicas = this.replicasOf(expert);
    if (!Number.isInteger(replica) || replica < 0 || replica >= replicas.length)
      invalid(
        undefined,
        `expected a replica of expert ${expert} in 0..${replicas.length - 1} but received ${replica}`,
        'replica',
      );
    return replicas[replica]!;
  }

  /** The logical id in a slot of a device. */
  globalOf(device: number, slot: number): number {
    const slots = this.slotsOn(device);
    if (!Number.isInteger(slot) || slot < 0 || slot >= slots)
      invalid(
        undefined,
        `expected a slot of device ${device} in 0..${slots - 1} but received ${slot}`,
        'slot',
      );
    return this.physicalToLogical[this.slotOffsets[device]! + slot]!;
  }

  slotsOn(device: number): number {
    return this.slotOffsets[this.#device(device) + 1]! - this.slotOffsets[device]!;
  }

  /** The logical ids of a device in slot order. A view: do not write to it. */
  expertsOn(device: number): Int32Array {
    return this.physicalToLogical.subarray(
      this.slotOffsets[this.#device(device)],
      this.slotOffsets[device + 1],
    );
  }

  /** The device of a physical id. */
  deviceOfPhysical(physical: number): number {
    const device = this.#deviceOf[physical];
    if (device === undefined)
      invalid(
        undefined,
        `expected a physical id in 0..${this.physicalExperts - 1} but received ${physical}`,
        'physical',
      );
    return device!;
  }

  has(device: number, expert: number): boolean {
    return this.slotOf(expert, device) >= 0;
  }

  /** i32[experts]: the local slot of every expert on a device, -1 where it is not (vLLM's expert_map). */
  expertMap(device: number): Int32Array {
    const map = new Int32Array(this.experts).fill(-1);
    const held = this.expertsOn(device);
    for (let slot = held.length - 1; slot >= 0; slot--) map[held[slot]!] = slot;
    return map;
  }

  /** "local->global" pairs of a device in ascending global order, joined by ", ": the log line of vLLM. */
  compressedExpertMap(device: number): string {
    const pairs: string[] = [];
    for (const [expert, slot] of this.expertMap(device).entries())
      if (slot >= 0) pairs.push(`${slot}->${expert}`);
    return pairs.join(', ');
  }

  /** The ids as nested arrays, [devices][slots]. */
  toRows(): number[][] {
    return Array.from({ length: this.devices }, (_, device) => Array.from(this.expertsOn(device)));
  }

  equals(other: Placement): boolean {
    return (
      this.experts === other.experts &&
      this.devices === other.devices &&
      this.slotOffsets.every((offset, device) => offset === other.slotOffsets[device]) &&
      this.physicalToLogical.every((expert, physical) => expert === other.physicalToLogical[physical])
    );
  }
}
