// moe_router: logits[t, e] = hidden[t] . weight[e] + bias[e], everything widened to f32 first.
//
// Algorithm: up to 16 tokens, a block per expert and 4 tokens: 128 threads take vectors of the row in turn, and partial
// sums meet in a fixed tree. More tokens, tiles: on tensor cores where both sides are bf16 or both f16 and rows are
// whole vectors (tensor_tile.cuh: exact products, added in f32), else on ordinary cores (tile.cuh). Where there are
// fewer tiles than multiprocessors, the inner dimension is split into pieces that go to scratch and are added in order.
// Limits: none. The order of accumulation depends on the sizes, never on the run. NaN and infinities take their course.
#include <algorithm>

#include "backend.h"
#include "floats.cuh"
#include "tensor_tile.cuh"
#include "tile.cuh"

namespace moe {

namespace {

constexpr int kFewTokens = 16, kTokensAtOnce = 4, kThreads = 128;

template <class X, class W, int N>
__global__ void __launch_bounds__(kThreads) route_few(MoeRouter p) {
  __shared__ float partial[kTokensAtOnce][kThreads / 32];
  const int64_t expert = blockIdx.x, first = int64_t{blockIdx.y} * kTokensAtOnce;
  const int tokens = static_cast<int>(p.T - first < kTokensAtOnce ? p.T - first : kTokensAtOnce);
  const W* weight = p.weight.as<const W>() + expert * p.H;
  float sum[kTokensAtOnce] = {};
  for (int64_t at = threadIdx.x; at < p.H / N; at += kThreads) {
    const Vec<W, N> w = *reinterpret_cast<const Vec<W, N>*>(weight + at * N);
#pragma unroll
    for (int t = 0; t < kTokensAtOnce; t++) {
      if (t >= tokens) break;
      const Vec<X, N> x = *reinterpret_cast<const Vec<X, N>*>(p.hidden.as<const X>() + (first + t) * p.H + at * N);
#pragma unroll
      for (int i = 0; i < N; i++) sum[t] = fmaf(widen(x.v[i]), widen(w.v[i]), sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokensAtOnce; t++) {
    for (int lanes = 16; lanes > 0; lanes /= 2) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], lanes);
    if (threadIdx.x % 32 == 0) partial[t][threadIdx.x / 32] = sum[t];
  }
  __syncthreads();
  if (threadIdx.x >= tokens) return;
  float total = 0;
  for (int warp = 0; warp < kThreads / 32; warp++) total += partial[threadIdx.x][warp];
  if (p.bias) total += p.bias.as<const float>()[expert];
  p.logits.as<float>()[(first + threadIdx.x) * p.E + expert] = total;
}

// With pieces, `out` is f32 [pieces, T, E] and gets no bias.
template <class X, class W, int TM, int TN>
__global__ void __launch_bounds__(kTileThreads) route_tiles(MoeRouter p, float* out, int64_t depth, bool vectors) {
  using Shape = TileShape<TM, TN>;
  const int64_t first = int64_t{blockIdx.x} * Shape::kRows, column = int64_t{blockIdx.y} * Shape::kColumns;
  const int64_t begin = blockIdx.z * depth, end = begin + depth < p.H ? begin + depth : p.H;
  float sum[TM][TN] = {};
  multiply_tile<TM, TN>([&](int r) { return first + r < p.T ? p.hidden.as<const X>() + (first + r) * p.H : nullptr; },
                        [&](int c) { return column + c < p.E ? p.weight.as<const W>() + (column + c) * p.H : nullptr; },
                        begin, end, vectors, vectors, sum);
  const bool whole = gridDim.z == 1;
  out += blockIdx.z * p.T * p.E;
#pragma unroll
  for (int i = 0; i < TM; i++) {
    const int64_t t = first + Shape::row(i);
    if (t >= p.T) continue;
#pragma unroll
    for (int j = 0; j < TN; j++) {
      const int64_t e = column + Shape::column(j);
      if (e >= p.E) continue;
      out[t * p.E + e] = whole && p.bias ? sum[i][j] + p.bias.as<const float>()[e] : sum[i][j];
    }
  }
}

template <class T, int WARPS_M, int N>
__global__ void __launch_bounds__(kTensorThreads) route_tensor(MoeRouter p, float* out, int64_t depth) {
  using Shape = TensorShape<WARPS_M, N>;
  const int64_t first = int64_t{blockIdx.x} * Shape::kRows, column = int64_t{blockIdx.y} * Shape::kColumns;
  const int64_t begin = blockIdx.z * depth, end = begin + depth < p.H ? begin + depth : p.H;
  float sum[2][N / 8][4] = {};
  const int64_t from = begin + tensor_piece() * 8;
  const auto operand = [&](const T* matrix, int64_t row, int64_t rows) {
    const T* first_piece = matrix + row * p.H + from;
    const int64_t left = rows - row, there = from < end ? (end - from + kTensorDepth - 1) / kTensorDepth : 0;
    // A piece that is not there is not read, but its address has to be one.
    return TensorOperand{
        [=](int r) { return there > 0 ? first_piece + r * p.H : matrix; },
        static_cast<int>(left < Shape::kRows + Shape::kColumns ? left : Shape::kRows + Shape::kColumns), kTensorDepth,
        static_cast<int>(there)};
  };
  multiply_tensor_tile<T, WARPS_M, N, true>(operand(p.hidden.as<const T>(), first, p.T),
                                            operand(p.weight.as<const T>(), column, p.E),
                                            static_cast<int>((end - begin + kTensorDepth - 1) / kTensorDepth), sum);
  const bool whole = gridDim.z == 1;
  out += blockIdx.z * p.T * p.E;
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int64_t t = first + Shape::row(m, i), e = column + Shape::column(n, i);
        if (t >= p.T || e >= p.E) continue;
        out[t * p.E + e] = whole && p.bias ? sum[m][n][i] + p.bias.as<const float>()[e] : sum[m][n][i];
      }
    }
  }
}

__global__ void add_pieces(MoeRouter p, const float* pieces, int count) {
  const int64_t size = p.T * p.E;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    float sum = 0;
    for (int piece = 0; piece < count; piece++) sum += pieces[piece * size + i];
    if (p.bias) sum += p.bias.as<const float>()[i % p.E];
    p.logits.as<float>()[i] = sum;
  }
}

// Calls launch(grid, out, depth) for tiles of rows x columns, and adds the pieces up where it splits the inner
// dimension.
template <class Launch>
Status in_pieces(CudaBackend& device, const MoeRouter& p, int rows, int columns, int step, Launch&& launch) {
  constexpr int64_t kShortest = 128, kMostPieces = 32;  // of the inner dimension
  const int64_t down = ceil_div(p.T, rows), across = ceil_div(p.E, columns);
  const int64_t wanted = std::min({2 * device.sm_count() / (down * across), p.H / kShortest, kMostPieces});
  const int64_t depth = std::max<int64_t>(step, ceil_div(ceil_div(p.H, std::max<int64_t>(wanted, 1)), step) * step);
  const int64_t pieces = std::max<int64_t>(1, ceil_div(p.H, depth));
  float* out = p.logits.as<float>();
  if (pieces > 1) MOE_RETURN_IF_ERROR(device.scratch(static_cast<size_t>(pieces * p.T * p.E), &out));
  launch(dim3(static_cast<unsigned>(down), static_cast<unsigned>(across), static_cast<unsigned>(pieces)), out, depth);
  MOE_CUDA_LAUNCHED("moe_router");
  if (pieces > 1) {
    const int64_t blocks = std::min<int64_t>(ceil_div(p.T * p.E, 256), 8 * device.sm_count());
    add_pieces<<<static_cast<unsigned>(blocks), 256, 0, device.stream()>>>(p, out, static_cast<int>(pieces));
    MOE_CUDA_LAUNCHED("moe_router");
  }
  return Status::Ok();
}

template <class X, class W, int TM, int TN>
Status run_tiles(CudaBackend& device, const MoeRouter& p) {
  using Shape = TileShape<TM, TN>;
  return in_pieces(device, p, Shape::kRows, Shape::kColumns, kTileDepth, [&](dim3 grid, float* out, int64_t depth) {
    route_tiles<X, W, TM, TN><<<grid, kTileThreads, 0, device.stream()>>>(p, out, depth, p.H % 4 == 0);
  });
}

template <class T, int WARPS_M, int N>
Status run_tensor(CudaBackend& device, const MoeRouter& p) {
  using Shape = TensorShape<WARPS_M, N>;
  const auto kernel = route_tensor<T, WARPS_M, N>;
  MOE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes));
  return in_pieces(device, p, Shape::kRows, Shape::kColumns, kTensorDepth, [&](dim3 grid, float* out, int64_t depth) {
    kernel<<<grid, kTensorThreads, Shape::kSharedBytes, device.stream()>>>(p, out, depth);
  });
}

}  // namespace

Status moe_router(Backend& backend, const MoeRouter& p) {
  if (p.T == 0 || p.E == 0) return Status::Ok();
  if (p.T > INT32_MAX || p.E > INT32_MAX) return Status::Error(Code::kUnsupported, "expected fewer than 2^31 tokens");
  CudaBackend& device = cuda(backend);
  return with_float(p.hidden.dtype, [&](auto* hidden_type) {
    using X = pointee<decltype(hidden_type)>;
    return with_float(p.weight.dtype, [&](auto* weight_type) {
      using W = pointee<decltype(weight_type)>;
      if constexpr (std::is_same_v<X, W> && !std::is_same_v<X, float>) {
        if (p.T > kFewTokens && p.H % 8 == 0) {
          backend.note_path("moe_router", p.T > 64 ? "tensor tiles of 128 x 64" : "tensor tiles of 64 x 64");
          return p.T > 64 ? run_tensor<X, 4, 32>(device, p) : run_tensor<X, 2, 16>(device, p);
        }
      }
      if (p.T > kFewTokens) {
        const int64_t large = ceil_div(p.T, 128) * ceil_div(p.E, 128);
        backend.note_path("moe_router", large >= device.sm_count() ? "tiles of 128" : "tiles of 64");
        return large >= device.sm_count() ? run_tiles<X, W, 8, 8>(device, p) : run_tiles<X, W, 4, 4>(device, p);
      }
      const dim3 grid(static_cast<unsigned>(p.E), static_cast<unsigned>(ceil_div(p.T, kTokensAtOnce)));
      constexpr int kWide = kVector<X> < kVector<W> ? kVector<X> : kVector<W>;
      const bool wide = p.H % kWide == 0;
      backend.note_path("moe_router", wide ? "dot products" : "dot products by element");
      if (wide) {
        route_few<X, W, kWide><<<grid, kThreads, 0, device.stream()>>>(p);
      } else {
        route_few<X, W, 1><<<grid, kThreads, 0, device.stream()>>>(p);
      }
      MOE_CUDA_LAUNCHED("moe_router");
      return Status::Ok();
    });
  });
}

MOE_REGISTER(moe_router, MoeRouter);

}  // namespace moe
