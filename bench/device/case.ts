// What a bench of an op on a device is made of: cases in tables, and what a case becomes once it was timed.
import type { Inputs } from './inputs.js';

/** Figures of others in us, by name. */
export type Figures = Readonly<Record<string, number>>;

export interface DeviceCase {
  readonly op: string;
  /** Shape and variant, without tokens. */
  readonly name: string;
  readonly tokens: number;
  /** Bytes that have to be read once, and bytes that have to be written. */
  readonly reads: number;
  readonly writes: number;
  readonly flops?: number;
  /** Bytes of one set of inputs and outputs, where that is not all of them. */
  readonly setBytes?: number;
  /** What public kernels took when they were recorded (bench/peers.ts). */
  readonly recorded: Figures;
  /** The name under which a control of the same run has timed the same work. */
  readonly control?: string;
  /** Launches in one capture, at most. Default 40. */
  readonly launches?: number;
  /** Gives, for every set, a function that makes its inputs and gives what is to be captured. */
  prepare(inputs: Inputs): (set: number) => () => unknown;
}

export interface DeviceTable {
  readonly title: string;
  readonly cases: readonly DeviceCase[];
}

/** What a device can do at most, measured in the same run. */
export interface Ceilings {
  readonly copyBytesPerSecond: number;
  readonly readBytesPerSecond: number;
  readonly emptyNodeMicroseconds: number;
  /** A bf16 product of 8192 x 8192 matrices by the vendor's library, where a control has timed one. */
  readonly matmulFlopsPerSecond?: number;
}

/** No floor is below it: what a node of a graph costs a careful reader, whatever the empty one of a run took. */
const LEAST_FLOOR_US = 1.0;

export interface DeviceResult {
  readonly op: string;
  readonly case: string;
  readonly tokens: number;
  readonly microseconds: number;
  readonly spread: number;
  readonly launches: number;
  readonly floorMicroseconds: number;
  readonly timesFloor: number;
  /** What the floor comes from. */
  readonly floor: 'bytes' | 'matrix product' | 'node';
  readonly tflops: number | null;
  readonly path: string;
  /** Whether kernels of the op overlap by programmatic dependent launch. */
  readonly programmaticLaunch: boolean;
  readonly recorded: Figures;
  readonly controls: Figures;
}

/**
 * The least time that a device of these ceilings can take, and why. A byte read costs what the read ceiling says, a byte
 * written what the copy ceiling leaves for it: as much of both gives the copy ceiling, and reads alone the read ceiling.
 */
export function floorOf(
  { reads, writes, flops = 0 }: Pick<DeviceCase, 'reads' | 'writes' | 'flops'>,
  ceilings: Ceilings,
): Pick<DeviceResult, 'floor' | 'floorMicroseconds'> {
  const {
    copyBytesPerSecond,
    readBytesPerSecond,
    emptyNodeMicroseconds,
    matmulFlopsPerSecond = Infinity,
  } = ceilings;
  const perRead = 1 / readBytesPerSecond;
  const perWrite = 2 / copyBytesPerSecond - perRead;
  const floors = {
    node: Math.max(LEAST_FLOOR_US, emptyNodeMicroseconds),
    bytes: 1e6 * (reads * perRead + writes * perWrite),
    'matrix product': (1e6 * flops) / matmulFlopsPerSecond,
  };
  const [floor, floorMicroseconds] = Object.entries(floors).reduce((a, b) => (b[1] > a[1] ? b : a));
  return { floor: floor as keyof typeof floors, floorMicroseconds };
}
