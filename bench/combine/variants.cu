// Variants of moe_combine's kernel, timed side by side in one graph (R launches on R buffers, a flushed L2
// before each replay, CUDA events, median of 11). What each reached is in NOTES.md.
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -o combine_variants bench/combine/variants.cu
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define CHECK(expr)                                                  \
  do {                                                               \
    cudaError_t e = (expr);                                          \
    if (e != cudaSuccess) {                                          \
      printf("%d %s: %s\n", __LINE__, #expr, cudaGetErrorString(e)); \
      exit(1);                                                       \
    }                                                                \
  } while (0)

constexpr int T = 4096, C = 9, H = 7168, R = 4;
using bf16 = __nv_bfloat16;

struct Set {
  bf16 *rows, *out;
  int* inverse;
  float* weights;
};

enum class Load { kPlain, kStreaming, kNoAllocate };

template <Load L>
__device__ __forceinline__ uint4 load(const void* p) {
  uint4 v;
  if constexpr (L == Load::kStreaming) return __ldcs(static_cast<const uint4*>(p));
  if constexpr (L == Load::kPlain) return *static_cast<const uint4*>(p);
  if constexpr (L == Load::kNoAllocate) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
  }
}

__device__ __forceinline__ void add(float (&sum)[8], uint4 v, float w) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum[2 * i] = fmaf(w, __uint_as_float(words[i] << 16), sum[2 * i]);
    sum[2 * i + 1] = fmaf(w, __uint_as_float(words[i] & 0xffff0000u), sum[2 * i + 1]);
  }
}
__device__ __forceinline__ uint4 pack(const float (&sum)[8]) {
  uint4 v;
  uint32_t* words = &v.x;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return v;
}

// A block per token and slice.
template <int THREADS, int SLICES, Load L, bool STREAM_OUT>
__global__ void __launch_bounds__(THREADS) plain(Set s) {
  __shared__ const bf16* source[C];
  __shared__ float weight[C];
  const int token = blockIdx.x / SLICES, slice = blockIdx.x % SLICES;
  if (threadIdx.x < C) {
    const int place = s.inverse[token * C + threadIdx.x];
    source[threadIdx.x] = s.rows + int64_t{place} * H;
    weight[threadIdx.x] = s.weights[token * C + threadIdx.x];
  }
  __syncthreads();
  constexpr int kVectors = H / 8, kEach = (kVectors + SLICES - 1) / SLICES;
  const int end = min(kVectors, (slice + 1) * kEach);
  for (int at = slice * kEach + threadIdx.x; at < end; at += THREADS) {
    uint4 v[C];
    float sum[8] = {};
#pragma unroll
    for (int c = 0; c < C; c++) v[c] = load<L>(source[c] + at * 8);
#pragma unroll
    for (int c = 0; c < C; c++) add(sum, v[c], weight[c]);
    uint4* to = reinterpret_cast<uint4*>(s.out + int64_t{token} * H) + at;
    if (STREAM_OUT)
      __stcs(to, pack(sum));
    else
      *to = pack(sum);
  }
}

// A warp per piece of 256 elements of a token; no shared memory, lanes 0..8 look the columns up.
template <int THREADS, Load L, bool STREAM_OUT>
__global__ void __launch_bounds__(THREADS) warps(Set s) {
  constexpr int kPieces = H / 256;
  const int piece = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int token = piece / kPieces, at = piece % kPieces * 32 + lane;
  int place = 0;
  float w = 0;
  if (lane < C) place = s.inverse[token * C + lane], w = s.weights[token * C + lane];
  uint4 v[C];
  float sum[8] = {};
#pragma unroll
  for (int c = 0; c < C; c++) v[c] = load<L>(s.rows + int64_t{__shfl_sync(~0u, place, c)} * H + at * 8);
#pragma unroll
  for (int c = 0; c < C; c++) add(sum, v[c], __shfl_sync(~0u, w, c));
  uint4* to = reinterpret_cast<uint4*>(s.out + int64_t{token} * H) + at;
  if (STREAM_OUT)
    __stcs(to, pack(sum));
  else
    *to = pack(sum);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void barrier_init(uint64_t* b, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count));
}
__device__ __forceinline__ void barrier_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra done;\nbra wait;\ndone:\n}" ::
          "r"(shared_address(b)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, int bytes, uint64_t* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(b))
               : "memory");
}

// The copy engine fills a ring of row slices; 7 warps add them up. A persistent grid of PER_SM blocks a multiprocessor.
template <int SLICES, int PER_SM>
__global__ void __launch_bounds__(256) ring(Set s, int stages) {
  constexpr int kElements = H / SLICES, kBytes = kElements * 2, kVectors = kElements / 8, kThreads = 224;
  constexpr int kEach = (kVectors + kThreads - 1) / kThreads;
  extern __shared__ __align__(128) char buffer[];
  __shared__ uint64_t full[64], empty[64];
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; i++) barrier_init(full + i, 1), barrier_init(empty + i, 7);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  int stage = 0, parity = 0;
  if (warp == 7) {
    const int lane = threadIdx.x % 32;
    for (int item = blockIdx.x; item < T * SLICES; item += gridDim.x) {
      const int token = item / SLICES, slice = item % SLICES;
      const int place = lane < C ? s.inverse[token * C + lane] : 0;
      for (int c = 0; c < C; c++) {
        const int from = __shfl_sync(~0u, place, c);
        if (lane == 0) {
          barrier_wait(empty + stage, parity ^ 1);
          barrier_expect(full + stage, kBytes);
          bulk_load(buffer + stage * kBytes, s.rows + int64_t{from} * H + slice * kElements, kBytes, full + stage);
        }
        if (++stage == stages) stage = 0, parity ^= 1;
      }
    }
    return;
  }
  for (int item = blockIdx.x; item < T * SLICES; item += gridDim.x) {
    const int token = item / SLICES, slice = item % SLICES;
    float w[C];
#pragma unroll
    for (int c = 0; c < C; c++) w[c] = __ldg(s.weights + token * C + c);
    float sum[kEach][8] = {};
#pragma unroll
    for (int c = 0; c < C; c++) {
      barrier_wait(full + stage, parity);
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        const int at = threadIdx.x + i * kThreads;
        if (kVectors % kThreads == 0 || at < kVectors) {
          add(sum[i], *reinterpret_cast<const uint4*>(buffer + stage * kBytes + at * 16), w[c]);
        }
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(empty + stage);
      if (++stage == stages) stage = 0, parity ^= 1;
    }
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int at = threadIdx.x + i * kThreads;
      if (kVectors % kThreads == 0 || at < kVectors) {
        __stcs(reinterpret_cast<uint4*>(s.out + int64_t{token} * H + slice * kElements) + at, pack(sum[i]));
      }
    }
  }
}

__global__ void copy(const uint4* from, uint4* to, int64_t n) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {
    const uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
    to[i] = a, to[i + stride] = b, to[i + 2 * stride] = c, to[i + 3 * stride] = d;
  }
  for (; i < n; i += stride) to[i] = from[i];
}
__global__ void flush(const uint4* from, int64_t n, int* sink) {
  uint32_t x = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x)
    x |= from[i].x;
  if (x == 0x12345678) *sink = 1;
}
__global__ void spin(int64_t cycles) {
  const int64_t begin = clock64();
  while (clock64() - begin < cycles) {
  }
}
__global__ void fill(uint32_t* to, int64_t n) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    to[i] = 0x3f003f00u | (x >> 9 & 0x7f) | (x & 0x807f8000u);
  }
}

cudaStream_t stream;
uint4* flushed;
int* sink;
constexpr int64_t kFlush = (512ll << 20) / 16;

float time(const std::function<void(int)>& launch) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  for (int r = 0; r < R; r++) launch(r);
  CHECK(cudaGetLastError());
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t a, b;
  cudaEventCreate(&a), cudaEventCreate(&b);
  std::vector<float> times;
  for (int i = 0; i < 12; i++) {
    flush<<<1056, 256, 0, stream>>>(flushed, kFlush, sink);
    spin<<<1, 1, 0, stream>>>(100000);
    cudaEventRecord(a, stream);
    cudaGraphLaunch(exec, stream);
    cudaEventRecord(b, stream);
    CHECK(cudaStreamSynchronize(stream));
    float ms;
    cudaEventElapsedTime(&ms, a, b);
    if (i > 0) times.push_back(1e3f * ms / R);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);
  return times[5];
}

int main() {
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaMalloc(&flushed, kFlush * 16));
  CHECK(cudaMemset(flushed, 0, kFlush * 16));
  CHECK(cudaMalloc(&sink, 4));
  std::vector<Set> sets(R);
  const int64_t rows = int64_t{T} * C * H;
  std::mt19937 random(1);
  for (Set& s : sets) {
    CHECK(cudaMalloc(&s.rows, rows * 2));
    CHECK(cudaMalloc(&s.out, int64_t{T} * H * 2));
    CHECK(cudaMalloc(&s.inverse, T * C * 4));
    CHECK(cudaMalloc(&s.weights, T * C * 4));
    fill<<<1056, 256>>>(reinterpret_cast<uint32_t*>(s.rows), rows / 2);
    // As a dispatch of uniform routing over 257 experts leaves it: every column elsewhere, tokens in order.
    std::vector<int> expert(T * C), inverse(T * C), next(258);
    for (int i = 0; i < T * C; i++) expert[i] = i % C == C - 1 ? 256 : random() % 256, next[expert[i] + 1]++;
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (int i = 0; i < T * C; i++) inverse[i] = next[expert[i]]++;
    std::vector<float> weights(T * C);
    for (float& w : weights) w = (random() % 1000) / 1000.0f;
    CHECK(cudaMemcpy(s.inverse, inverse.data(), T * C * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(s.weights, weights.data(), T * C * 4, cudaMemcpyHostToDevice));
  }
  CHECK(cudaDeviceSynchronize());
  const double bytes = double(T) * (C + 1) * H * 2 + 8.0 * T * C;
  std::vector<uint16_t> expected(size_t{T} * H), actual(expected.size());
  bool first = true;
  const auto report = [&](const char* name, const std::function<void(int)>& launch) {
    CHECK(cudaMemset(sets[0].out, 0xff, expected.size() * 2));
    launch(0);
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy((first ? expected : actual).data(), sets[0].out, expected.size() * 2, cudaMemcpyDeviceToHost));
    const bool same = first || actual == expected;
    first = false;
    const float us = time(launch), again = time(launch);
    printf("%-44s %8.2f %8.2f us  %.3f TB/s %s\n", name, us, again, bytes / us / 1e6, same ? "" : "WRONG");
    fflush(stdout);
  };
  for (int blocks : {1056, 2112, 4224}) {
    const int64_t n = rows / 8;
    const float us = time([&](int r) {
      copy<<<blocks, 512, 0, stream>>>(reinterpret_cast<uint4*>(sets[r].rows),
                                       reinterpret_cast<uint4*>(sets[(r + 1) % R].rows), n);
    });
    printf("copy %d blocks: %.2f us, %.3f TB/s\n", blocks, us, 2.0 * rows * 2 / us / 1e6);
  }
#define PLAIN(threads, slices, hint, out)                                        \
  report("plain " #threads " threads, " #slices " slices, " #hint ", out " #out, \
         [&](int r) { plain<threads, slices, Load::hint, out><<<T * slices, threads, 0, stream>>>(sets[r]); })
  PLAIN(128, 1, kStreaming, true);
  PLAIN(128, 7, kStreaming, true);
  PLAIN(128, 7, kPlain, false);
  PLAIN(128, 7, kNoAllocate, false);
  PLAIN(128, 7, kNoAllocate, true);
  PLAIN(128, 4, kNoAllocate, false);
  PLAIN(224, 4, kNoAllocate, false);
  PLAIN(224, 2, kNoAllocate, false);
  PLAIN(448, 2, kNoAllocate, false);
  PLAIN(64, 14, kNoAllocate, false);
  PLAIN(256, 1, kNoAllocate, false);
#define WARPS(threads, hint, out)                            \
  report("warps " #threads " threads, " #hint ", out " #out, \
         [&](int r) { warps<threads, Load::hint, out><<<T*(H / 256) * 32 / threads, threads, 0, stream>>>(sets[r]); })
  WARPS(128, kNoAllocate, false);
  WARPS(128, kStreaming, true);
  WARPS(256, kNoAllocate, false);
  WARPS(512, kNoAllocate, false);
#define RING(slices, per_sm, kib)                                                                    \
  do {                                                                                               \
    const int bytes_of_stage = H / slices * 2, stages = std::min(64, kib * 1024 / bytes_of_stage);   \
    CHECK(cudaFuncSetAttribute(ring<slices, per_sm>, cudaFuncAttributeMaxDynamicSharedMemorySize,    \
                               stages * bytes_of_stage));                                            \
    report("ring " #slices " slices, " #per_sm " per SM, " #kib " KiB", [&](int r) {                 \
      ring<slices, per_sm><<<132 * per_sm, 256, stages * bytes_of_stage, stream>>>(sets[r], stages); \
    });                                                                                              \
  } while (0)
  RING(1, 1, 210);
  RING(2, 1, 210);
  RING(4, 1, 210);
  RING(4, 1, 128);
  RING(2, 2, 104);
  RING(4, 2, 104);
  RING(4, 2, 64);
  RING(4, 3, 64);
  return 0;
}
