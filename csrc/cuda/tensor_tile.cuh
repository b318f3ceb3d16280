// One tile of a product of bf16 or f16 rows on tensor cores (mma.sync), C = A B^T, both with the inner dimension last.
//
// 256 threads, 8 warps in WARPS_M x (8 / WARPS_M), each with 32 rows x N columns. 64 of the inner dimension at a time
// come through a ring of shared memory that cp.async fills; 16-byte pieces of a row are swizzled by the row, so that
// ldmatrix meets every bank once. Products are exact in f32; tensor cores add them with a little less than f32's
// rounding, so where the result must be as good as f32 (EXACT) every 64 are added up in ordinary f32 outside, in
// ascending order. Bitwise the same from run to run. Rows must be multiples of 8 elements.
#pragma once
#include "floats.cuh"

namespace moe {

constexpr int kTensorThreads = 256, kTensorDepth = 64;
// What a block may have of shared memory on every device from sm_80 on (sm_86, sm_89 and sm_120 have the least).
constexpr int kTensorSharedBytes = 99 * 1024;

__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, __nv_bfloat16*) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, __half*) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
// 16 bytes, or zeros where there is nothing to load.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

template <int WARPS_M, int N>
struct TensorShape {
  static constexpr int kWarpsN = 8 / WARPS_M, kRows = 32 * WARPS_M, kColumns = N * kWarpsN;
  static constexpr int kStageBytes = (kRows + kColumns) * kTensorDepth * 2;
  static constexpr int kStages = 4 * kStageBytes <= kTensorSharedBytes ? 4 : 3;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(N % 16 == 0 && kSharedBytes <= kTensorSharedBytes);
  // Where a thread's results lie: sum[m][n][i].
  __device__ static int row(int m, int i) {
    return threadIdx.x / 32 / kWarpsN * 32 + m * 16 + i / 2 * 8 + threadIdx.x % 32 / 4;
  }
  __device__ static int column(int n, int i) {
    return threadIdx.x / 32 % kWarpsN * N + n * 8 + threadIdx.x % 4 * 2 + i % 2;
  }
};

// Where a thread's 16-byte pieces of one operand come from: piece(r) is that of row r < `rows` (at least one) at the
// first step; `step` elements on is that of the next step; other rows, and step `there` and later ones, are zeros.
template <class Piece>
struct TensorOperand {
  Piece piece;
  int rows;
  int64_t step;
  int there;
};
template <class Piece>
TensorOperand(Piece, int, int64_t, int) -> TensorOperand<Piece>;

// Which of the 8 pieces of a row's 64 elements a thread loads.
__device__ __forceinline__ int tensor_piece() { return threadIdx.x % 8; }

// `steps` times 64 of the inner dimension. EXACT: every 64 are added up outside of the tensor cores, in f32.
template <class T, int WARPS_M, int N, bool EXACT, class A, class B>
__device__ void multiply_tensor_tile(const A& a, const B& b, int steps, float (&sum)[2][N / 8][4]) {
  using Shape = TensorShape<WARPS_M, N>;
  extern __shared__ __align__(128) char shared[];
  const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kRowsAtOnce = kTensorThreads / 8, kLoadsA = Shape::kRows / kRowsAtOnce;
  constexpr int kLoadsB = (Shape::kColumns + kRowsAtOnce - 1) / kRowsAtOnce;
  const int row = threadIdx.x / 8;
  const T *from_a[kLoadsA], *from_b[kLoadsB];
#pragma unroll
  for (int i = 0; i < kLoadsA; i++) from_a[i] = a.piece(min(row + i * kRowsAtOnce, a.rows - 1));
#pragma unroll
  for (int i = 0; i < kLoadsB; i++) from_b[i] = b.piece(min(row + i * kRowsAtOnce, b.rows - 1));
  // Rows of a are multiples of 8 before those of b, and all of a thread's are equal modulo 8.
  const uint32_t place = base + row * 128 + ((tensor_piece() ^ (row & 7)) << 4);

  const auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = place + step % Shape::kStages * Shape::kStageBytes;
#pragma unroll
      for (int i = 0; i < kLoadsA; i++) {
        const bool there = row + i * kRowsAtOnce < a.rows && step < a.there;
        copy_async(stage + i * kRowsAtOnce * 128, from_a[i] + (there ? step * a.step : 0), there);
      }
#pragma unroll
      for (int i = 0; i < kLoadsB; i++) {
        if (Shape::kColumns % kRowsAtOnce != 0 && row + i * kRowsAtOnce >= Shape::kColumns) continue;
        const bool there = row + i * kRowsAtOnce < b.rows && step < b.there;
        copy_async(stage + (Shape::kRows + i * kRowsAtOnce) * 128, from_b[i] + (there ? step * b.step : 0), there);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  const auto address = [&](uint32_t stage, int row, int piece) {
    return stage + row * 128 + ((piece ^ (row & 7)) << 4);
  };

#pragma unroll
  for (int step = 0; step < Shape::kStages - 1; step++) load(step);
  const int first_row = warp / Shape::kWarpsN * 32, first_column = Shape::kRows + warp % Shape::kWarpsN * N;
  for (int step = 0; step < steps; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(Shape::kStages - 2) : "memory");
    __syncthreads();  // the stage has arrived, and everybody has left the one that is loaded next
    load(step + Shape::kStages - 1);
    const uint32_t stage = base + step % Shape::kStages * Shape::kStageBytes;
    float separate[2][N / 8][4];
    float (&part)[2][N / 8][4] = EXACT ? separate : sum;
    if constexpr (EXACT) {
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) part[m][n][0] = part[m][n][1] = part[m][n][2] = part[m][n][3] = 0;
      }
    }
#pragma unroll
    for (int k = 0; k < kTensorDepth / 16; k++) {
      uint32_t x[2][4], y[N / 16][4];
#pragma unroll
      for (int m = 0; m < 2; m++)
        load_matrices(x[m], address(stage, first_row + m * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < N / 16; n++) {
        load_matrices(
            y[n], address(stage, first_column + n * 16 + (lane & 7) + ((lane >> 4) << 3), k * 2 + ((lane >> 3) & 1)));
      }
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) mma_16x8x16(part[m][n], x[m], y[n / 2] + n % 2 * 2, static_cast<T*>(nullptr));
      }
    }
    if constexpr (EXACT) {
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) sum[m][n][i] += part[m][n][i];
        }
      }
    }
  }
}

}  // namespace moe
