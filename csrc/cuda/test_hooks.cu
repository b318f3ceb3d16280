// A deliberate fault, compiled only into the addon of the tests (out/cuda-hooks): while the variable is set, work that
// is submitted writes through an invalid address, as a broken kernel would. The device is then lost to the process.
#ifdef MOE_TEST_HOOKS
#include <cstdlib>

#include "backend.h"

namespace moe {

__global__ void write_nowhere(int* nowhere) { *nowhere = 1; }

void break_device_if_asked(cudaStream_t stream) {
  if (std::getenv("MOE_KERNELS_TEST_ILLEGAL_ACCESS") != nullptr)
    write_nowhere<<<1, 1, 0, stream>>>(reinterpret_cast<int*>(8));
}

}  // namespace moe
#endif
