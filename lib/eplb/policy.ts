// The one interface of all planning policies: loads and the placement in use in, a placement per layer out. A policy
// is a pure function of its problem (the memory it wants to see again next time included), decides nothing by time
// or by chance beyond the seed, and returns legal placements only; plan.ts measures and checks what it returns.
import type { Placement } from '../placement/placement.js';
import type { Loads } from './loads.js';

export interface PlanProblem {
  /** Logical loads of the window just seen, [steps, layers, experts], shared experts in the last columns. */
  loads: Loads;
  devices: number;
  /** Slots per device. */
  slots: number;
  /** The placement in use, one per layer. */
  current: readonly Placement[];
  /** True when no plan was made before: `current` is only where the model was loaded. */
  first: boolean;
  /** Shared experts: the last `shared` ids. */
  shared: number;
  /** Expert groups and nodes, for planners that keep groups on a node. */
  groups: number;
  nodes: number;
  /** Blocks of flashlb's search. */
  depth: number;
  /** Most moves of all layers together, and of one layer; Infinity without a budget. */
  maxMoves: number;
  maxMovesPerLayer: number;
  /** True when the caller said that moves cost nothing; without a budget or a word, needless ones are spared. */
  movesAreFree: boolean;
  seed: number;
  /** What the policy returned as memory after the previous window; undefined at first. */
  memory: unknown;
}

export interface PolicyResult {
  placements: Placement[];
  /** Handed back as `memory` with the next window. Plain data: it crosses threads by structured clone. */
  memory?: unknown;
}

export interface Policy {
  readonly name: string;
  /** One line for lists and --help. */
  readonly summary: string;
  /** True if the policy itself keeps maxMoves and maxMovesPerLayer; otherwise whole layers are dropped to fit. */
  readonly keepsBudget: boolean;
  /**
   * True if it says which slot of a device an expert gets, as maps that address slots have it: kept where there is no
   * placement in use. Otherwise, and wherever one is, experts that stay on a device stay in their slots.
   */
  readonly ordersSlots?: boolean;
  /** `layerDone` is called once per layer, for progress; it may throw to abandon the plan. */
  plan(problem: PlanProblem, layerDone: () => void): PolicyResult;
}
