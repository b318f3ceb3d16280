// The table of contents of the public API.
export type { BackendName, MemoryInfo } from './backend/backend.js';
export {
  backendStatuses,
  Capture,
  Context,
  type ContextDescription,
  type ContextOptions,
  createContext,
} from './context.js';
export { errorCodes, MoeError, type MoeErrorCode } from './errors.js';
export { type ExpertsLayout, ExpertWeights, type SwiGLU } from './experts.js';
export { architectureNames } from './model/architectures.js';
export { Checkpoint, openCheckpoint } from './model/checkpoint.js';
export {
  type ForwardOptions,
  type FuseSharedExperts,
  type LoadProgress,
  MoeLayer,
  type MoeLayerDescription,
  type MoeLayerOptions,
  type MoeLayerStage,
  type RoutedOutput,
} from './model/layer.js';
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
  type TensorToWrite,
  writeSafetensors,
} from './model/safetensors.js';
export type { BackendStatus } from './native.js';
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
export {
  type DType,
  dtypes,
  type FloatDType,
  type Raw,
  Tensor,
  type TensorData,
  type Values,
} from './tensor.js';
