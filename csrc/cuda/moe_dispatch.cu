// moe_dispatch: the launch shell. moe_dispatch_launch.cu says which kernels sort what.
#include "backend.h"
#include "check.h"
#include "moe_dispatch.cuh"

namespace moe {

Status moe_dispatch(Backend& backend, const MoeDispatch& p) {
  CudaBackend& device = cuda(backend);
  void* scratch = nullptr;
  const auto chain = device.compute_capability() >= 90 ? dispatch::Chain::kDefault : dispatch::Chain::kPlain;
  const size_t bytes = dispatch::scratch_bytes(p, device.sm_count(), chain);
  if (bytes > 0) MOE_RETURN_IF_ERROR(device.scratch(bytes, &scratch));
  const char* path = "";
  MOE_CUDA_CHECK(dispatch::launch(p, device.sm_count(), scratch, device.stream(), &path, chain));
  backend.note_path("moe_dispatch", path);
  return Status::Ok();
}

MOE_REGISTER(moe_dispatch, MoeDispatch);

}  // namespace moe
