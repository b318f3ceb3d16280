// CUDA's errors as Status: out of memory, a lost device, or a failed call, each with the name and the text of the
// error.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

#include "../common/status.h"

namespace moe {

// After one of these every call on the device fails until the process ends.
inline bool is_sticky(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContextIsDestroyed:
    case cudaErrorExternalDevice:
    case cudaErrorUnknown: return true;
    default: return false;
  }
}

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  const std::string text = std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ") from " + what;
  if (is_sticky(error)) {
    return Status::Error(Code::kDeviceLost, "the device failed with " + text + "; open a new context in a new process");
  }
  cudaGetLastError();  // not sticky: the next call starts clean
  if (error == cudaErrorMemoryAllocation) return Status::Error(Code::kOutOfMemory, "out of memory: " + text);
  return Status::Error(Code::kBackend, text);
}

}  // namespace moe

// Returns the Status of a failed CUDA call from the function around it.
#define MOE_CUDA_CHECK(expr)                                                               \
  do {                                                                                     \
    const cudaError_t moe_cuda_error_ = (expr);                                            \
    if (moe_cuda_error_ != cudaSuccess) return ::moe::cuda_status(moe_cuda_error_, #expr); \
  } while (0)

// After a kernel launch with <<<>>>: what was wrong with the launch itself.
#define MOE_CUDA_LAUNCHED(kernel)                                          \
  do {                                                                     \
    const cudaError_t moe_cuda_error_ = cudaPeekAtLastError();             \
    if (moe_cuda_error_ != cudaSuccess) {                                  \
      cudaGetLastError();                                                  \
      return ::moe::cuda_status(moe_cuda_error_, "the launch of " kernel); \
    }                                                                      \
  } while (0)
