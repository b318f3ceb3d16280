// What a device can do at most, as one line of JSON: bytes per second of the best of a few copy kernels (read and
// written) and read kernels over 1 GiB, and what an empty node takes in a chain of a CUDA graph. bench/device.ts runs
// it before and after its tables, and floors come from it. Not memcpy nodes: captured into a graph they are much
// slower.
#include "harness.cuh"

namespace {

constexpr size_t kBytes = size_t{1} << 30, kVectors = kBytes / sizeof(uint4);
constexpr int kThreads = 512, kLaunches = 4;

// A block takes a piece of Each vectors a thread, all loads before the first store.
template <int Each, bool Streaming>
__global__ void __launch_bounds__(kThreads) copy_piece(const uint4* from, uint4* to) {
  const size_t first = static_cast<size_t>(blockIdx.x) * kThreads * Each + threadIdx.x;
  uint4 values[Each];
#pragma unroll
  for (int i = 0; i < Each; i++)
    values[i] = Streaming ? __ldcs(from + first + i * kThreads) : from[first + i * kThreads];
#pragma unroll
  for (int i = 0; i < Each; i++) {
    if (Streaming) {
      __stcs(to + first + i * kThreads, values[i]);
    } else {
      to[first + i * kThreads] = values[i];
    }
  }
}

template <int Each>
__global__ void __launch_bounds__(kThreads) read_piece(const uint4* from, uint32_t* out) {
  const size_t first = static_cast<size_t>(blockIdx.x) * kThreads * Each + threadIdx.x;
  uint4 values[Each];
#pragma unroll
  for (int i = 0; i < Each; i++) values[i] = __ldcs(from + first + i * kThreads);
  uint32_t mixed = 0;
#pragma unroll
  for (int i = 0; i < Each; i++) mixed ^= values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
  if (mixed == 0x12345678u) *out = mixed;  // never, but the compiler cannot know
}

template <int Each>
constexpr unsigned pieces() {
  static_assert(kVectors % (kThreads * Each) == 0);
  return static_cast<unsigned>(kVectors / (kThreads * Each));
}

}  // namespace

int main() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "no CUDA device: %s\n", cudaGetErrorString(error));
    return 1;
  }
  cudaDeviceProp properties{};
  CHECK(cudaGetDeviceProperties(&properties, 0));
  Timer timer;
  Buffer from(kBytes), to(kBytes);
  CHECK(cudaMemset(from.data, 3, kBytes));
  const uint4* source = static_cast<const uint4*>(from.data);
  uint4* target = static_cast<uint4*>(to.data);
  uint32_t* word = static_cast<uint32_t*>(to.data);
  const auto best = [&](std::initializer_list<std::function<void(int)>> launches) {
    double least = 0;
    for (const auto& launch : launches) {
      const double us = timer.graph(kLaunches, launch);
      if (least == 0 || us < least) least = us;
    }
    return least;
  };
  const double copy = best({
      [&](int) {
        copy_kernel<<<properties.multiProcessorCount * 16, kThreads, 0, timer.stream>>>(source, target, kVectors);
      },
      [&](int) { copy_piece<4, false><<<pieces<4>(), kThreads, 0, timer.stream>>>(source, target); },
      [&](int) { copy_piece<4, true><<<pieces<4>(), kThreads, 0, timer.stream>>>(source, target); },
      [&](int) { copy_piece<8, true><<<pieces<8>(), kThreads, 0, timer.stream>>>(source, target); },
  });
  const double read = best({
      [&](int) {
        read_kernel<<<properties.multiProcessorCount * 16, kThreads, 0, timer.stream>>>(source, kVectors, word);
      },
      [&](int) { read_piece<4><<<pieces<4>(), kThreads, 0, timer.stream>>>(source, word); },
      [&](int) { read_piece<8><<<pieces<8>(), kThreads, 0, timer.stream>>>(source, word); },
  });
  const double empty = timer.graph(40, [&](int) { empty_kernel<<<1, 32, 0, timer.stream>>>(); });
  const double bytes = static_cast<double>(kBytes);
  std::printf(
      "{\"device\": \"%s\", \"copyBytesPerSecond\": %.4e, \"readBytesPerSecond\": %.4e, \"emptyNodeMicroseconds\": "
      "%.3f}\n",
      properties.name, 2e6 * bytes / copy, 1e6 * bytes / read, empty);
  return 0;
}
