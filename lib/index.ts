// The table of contents of the public API.
export type { WaitOptions } from './abort.js';
export type { BackendName, MemoryInfo, Roofline } from './backend/backend.js';
export { Capture } from './capture.js';
export { Context, type ContextDescription } from './context.js';
export { backendStatuses, type ContextOptions, createContext } from './create_context.js';
export { type DispatchFigures, dispatchFigures } from './eplb/dispatch_figures.js';
export { dispatchRounds } from './eplb/dispatch_rounds.js';
export {
  type DispatchShares,
  type DispatchSharesOptions,
  dispatchShares,
  sharedDeviceLoads,
} from './eplb/dispatch_shares.js';
export { type GroupListKind, gatherHeat, groupCounts, type HeatOptions, RankHeat } from './eplb/heat.js';
export { parseLoads, type ReadLoadsOptions, readLoads } from './eplb/load_file.js';
export { checkPlannable, type LoadShape, Loads } from './eplb/loads.js';
export {
  bytesToMove,
  deviceLoads,
  movesPerLayer,
  type Par,
  parByStep,
  peakToAverage,
  stepPar,
  windowPar,
} from './eplb/metrics.js';
export { formatNpy, type NpyArray, parseNpy } from './eplb/npy.js';
export { type Plan, type PlanRequest, planSync, startPlacements } from './eplb/plan.js';
export type { PlannerFunction } from './eplb/plan_by.js';
export { Planner, type PlannerOptions, type PlanOptions, planExperts } from './eplb/planner.js';
export type { PlanProblem, Policy, PolicyResult } from './eplb/policy.js';
export { defaultPolicy, policies } from './eplb/registry.js';
export { type ServedTrace, type ServeOptions, serveTrace } from './eplb/serve.js';
export { type PolicyFigures, type SimulateOptions, simulate } from './eplb/simulate.js';
export { generateTrace, type TraceKind, type TraceOptions, traceKinds } from './eplb/trace.js';
export { type Transfer, type TransferOptions, transferSchedule } from './eplb/transfer.js';
export { errorCodes, MoeError, type MoeErrorCode } from './errors.js';
export { type ExpertsLayout, ExpertWeights, type SwiGLU } from './experts.js';
export { architectureNames } from './model/architectures.js';
export { Checkpoint, openCheckpoint } from './model/checkpoint.js';
export {
  type ForwardOptions,
  type FuseSharedExperts,
  MoeLayer,
  type MoeLayerDescription,
  type MoeLayerOptions,
  type MoeLayerStage,
  type RoutedOutput,
} from './model/layer.js';
export type { LoadProgress } from './model/layer_loader.js';
export {
  type Activations,
  type Recording,
  readActivations,
  readRecording,
} from './model/recording.js';
export {
  type HostTensor,
  openSafetensors,
  readSafetensors,
  SafetensorsReader,
  type TensorInfo,
} from './model/safetensors.js';
export { type TensorToWrite, writeSafetensors } from './model/safetensors_write.js';
export type { BackendStatus } from './native.js';
export type { Op } from './op.js';
export { type FusedMoeInputs, type FusedMoeOptions, fusedMoe } from './ops/fused_moe.js';
export { type MoeCombineInputs, type MoeCombineOptions, moeCombine } from './ops/moe_combine.js';
export {
  type MoeDispatchInputs,
  type MoeDispatchOptions,
  type MoeDispatchOutputs,
  moeDispatch,
} from './ops/moe_dispatch.js';
export { type MoeExpertsInputs, moeExperts } from './ops/moe_experts.js';
export {
  type MoeFusedGateInputs,
  type MoeFusedGateOptions,
  type MoeFusedGateOutputs,
  moeFusedGate,
} from './ops/moe_fused_gate.js';
export { type MoeRouterInputs, moeRouter } from './ops/moe_router.js';
export {
  allocateExperts,
  type PackExpertsInputs,
  type PackExpertsOptions,
  packExperts,
  writeExperts,
} from './ops/pack_experts.js';
export { type SharedExpertsInputs, type SharedExpertsOptions, sharedExperts } from './ops/shared_experts.js';
export { countMoves, keepSlots } from './placement/align.js';
export {
  type ExpertMapFormat,
  formatExpertMap,
  parseExpertMap,
  type ReadExpertMapOptions,
  readExpertMap,
  writeExpertMap,
} from './placement/expert_map_file.js';
export {
  type Log2phyOptions,
  log2phy,
  log2phyAll,
  log2phyCandidates,
  replicaCounts,
} from './placement/log2phy.js';
export { Placement, type PlacementOptions } from './placement/placement.js';
export {
  checkRoundRobin,
  linearPlacement,
  type MixedOptions,
  mixedPlacement,
  placementStrategies,
  type RoundRobinModel,
  redundantPlacement,
  roundRobinPlacement,
} from './placement/strategies.js';
export { type PlanReportInput, planReport } from './report/plan_report.js';
export type { Report, ReportPicture } from './report/report.js';
export { writeReport } from './report/report_file.js';
export { type SimulationReportInput, simulationReport } from './report/simulation_report.js';
export {
  type DType,
  dtypes,
  type FloatDType,
  type Raw,
  Tensor,
  type TensorData,
  type Values,
} from './tensor.js';
