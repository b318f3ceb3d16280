// What a native function answers. Only csrc/binding turns a Status into a thrown MoeError.
#pragma once
#include <string>
#include <utility>

namespace moe {

// The order of `errorCodes` in lib/errors.ts; the contract test compares the names.
enum class Code : int {
  kInvalidArg,
  kUnsupported,
  kOutOfMemory,
  kDisposed,
  kWrongContext,
  kCapture,
  kDeviceLost,
  kBackend,
  kCheckpoint,
  kAborted,
  kInternal,
  kRange,
  kOk,  // beyond the codes: not an error
};

inline constexpr const char* kCodeNames[] = {
    "ERR_MOE_INVALID_ARG",   "ERR_MOE_UNSUPPORTED", "ERR_MOE_OOM",         "ERR_MOE_DISPOSED",
    "ERR_MOE_WRONG_CONTEXT", "ERR_MOE_CAPTURE",     "ERR_MOE_DEVICE_LOST", "ERR_MOE_BACKEND",
    "ERR_MOE_CHECKPOINT",    "ERR_MOE_ABORTED",     "ERR_MOE_INTERNAL",    "ERR_MOE_RANGE",
};

struct [[nodiscard]] Status {
  Code code = Code::kOk;
  std::string text;
  std::string arg;  // the argument at fault, where one is

  bool ok() const { return code == Code::kOk; }

  static Status Ok() { return {}; }
  static Status Error(Code code, std::string text, std::string arg = {}) {
    return {code, std::move(text), std::move(arg)};
  }
};

}  // namespace moe

#define MOE_RETURN_IF_ERROR(expr)              \
  do {                                         \
    ::moe::Status moe_status_ = (expr);        \
    if (!moe_status_.ok()) return moe_status_; \
  } while (0)
