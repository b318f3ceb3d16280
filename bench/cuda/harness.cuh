// What the standalone programs share: memory, random data, and the timing method of the peers' table (graph replays
// over rotating buffers with a cold L2). `dry` runs everything but the device on a machine without a GPU.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

inline bool dry = false;

#define CHECK(expr)                                                                         \
  do {                                                                                      \
    const cudaError_t error_ = (expr);                                                      \
    if (error_ != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #expr, cudaGetErrorString(error_)); \
      std::fflush(stdout);                                                                  \
      std::exit(1);                                                                         \
    }                                                                                       \
  } while (0)

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  Buffer() = default;
  explicit Buffer(size_t n) : bytes(n) {
    if (dry) {
      data = std::calloc(1, n + 64);
    } else {
      CHECK(cudaMalloc(&data, n + 64));
    }
  }
  Buffer(Buffer&& other) noexcept : data(other.data), bytes(other.bytes) { other.data = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data, other.data);
    std::swap(bytes, other.bytes);
    return *this;
  }
  ~Buffer() {
    if (data == nullptr) return;
    if (dry) {
      std::free(data);
    } else {
      cudaFree(data);
    }
  }
  void put(const void* from, size_t n) {
    if (n == 0) return;
    if (dry) {
      std::memcpy(data, from, n);
    } else {
      CHECK(cudaMemcpy(data, from, n, cudaMemcpyHostToDevice));
      wait_for_default();
    }
  }
  void get(void* to, size_t n) const {
    if (n == 0) return;
    if (dry) {
      std::memcpy(to, data, n);
    } else {
      CHECK(cudaMemcpy(to, data, n, cudaMemcpyDeviceToHost));
    }
  }
  void poison() {
    if (dry) {
      std::memset(data, 0xa5, bytes);
    } else {
      CHECK(cudaMemset(data, 0xa5, bytes));
      wait_for_default();
    }
  }
  // cudaMemset, and cudaMemcpy from pageable memory, may return before the device has done its part, and streams that
  // are not blocking do not wait for the default one.
  static void wait_for_default() { CHECK(cudaStreamSynchronize(nullptr)); }
};

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 0x1234567) {}
  uint64_t next() {
    state += 0x9e3779b97f4a7c15ull;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double normal() {
    double sum = 0;  // near enough, and quick
    for (int i = 0; i < 6; i++) sum += uniform();
    return (sum - 3.0) * 1.4142135623730951;
  }
};

__global__ void spin_kernel(long long cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {
  }
}
__global__ void read_kernel(const uint4* data, size_t n, uint32_t* out) {
  uint32_t acc = 0;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const uint4 v = data[i];
    acc ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (acc == 0x12345678u) *out = acc;
}
__global__ void copy_kernel(const uint4* from, uint4* to, size_t n) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<size_t>(gridDim.x) * blockDim.x)
    to[i] = from[i];
}
__global__ void empty_kernel() {}

struct Timer {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  Buffer flush{dry ? size_t{64} : size_t{512} << 20};
  Timer() {
    if (dry) return;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaMemset(flush.data, 1, flush.bytes));
  }
  // Microseconds per launch: `launch(i)` enqueues on `stream` and uses the i-th set of buffers.
  double graph(int rotations, const std::function<void(int)>& launch, bool cold = true) {
    if (dry) {
      for (int i = 0; i < rotations; i++) launch(i);
      return 0;
    }
    launch(0);
    CHECK(cudaStreamSynchronize(stream));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < rotations; i++) launch(i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < 13; i++) {
      if (cold)
        read_kernel<<<132 * 8, 512, 0, stream>>>(static_cast<const uint4*>(flush.data), flush.bytes / 16,
                                                 static_cast<uint32_t*>(flush.data));
      spin_kernel<<<1, 1, 0, stream>>>(200000);
      CHECK(cudaEventRecord(begin, stream));
      CHECK(cudaGraphLaunch(exec, stream));
      CHECK(cudaEventRecord(end, stream));
      CHECK(cudaStreamSynchronize(stream));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 2) times.push_back(ms);
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1000.0 / rotations;
  }
};

// Copy ceiling in TB/s (bytes read and written) and the time of an empty node.
inline void ceilings(Timer& timer, double* copy, double* empty) {
  *copy = 4.27;
  *empty = 1.0;
  if (dry) return;
  const size_t bytes = size_t{1} << 30;
  Buffer from(bytes), to(bytes);
  CHECK(cudaMemset(from.data, 3, bytes));
  const double us = timer.graph(4, [&](int) {
    copy_kernel<<<132 * 16, 512, 0, timer.stream>>>(static_cast<uint4*>(from.data), static_cast<uint4*>(to.data),
                                                    bytes / 16);
  });
  *copy = 2.0 * static_cast<double>(bytes) / us * 1e-6;
  *empty = timer.graph(40, [&](int) { empty_kernel<<<1, 32, 0, timer.stream>>>(); });
}
