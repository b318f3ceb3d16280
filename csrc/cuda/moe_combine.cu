// moe_combine: out[t] = output_scale * sum over columns c of weights[t, c] * rows[inverse[t, c]].
//
// Algorithm: memory-bound, (C + 1) * H elements a token. A block has 128 vectors of 16 bytes of one token (blocks of a
// token lie together, so that its rows are read in long stretches; small blocks leave no tail). Its first C threads
// look the columns up (source row and weight) into shared memory; then every thread loads the vector of all columns
// before it uses the first (for the common C; else 8 at a time), adds them in column order in f32, scales, rounds once
// and stores. A zero expert adds weight * hidden[t]; weights_on_input makes every other weight 1. Limits: 4096 columns;
// where H is no multiple of the vector, elements are taken one by one. Columns without a place add nothing, whatever
// their weight; NaN and infinities take their course. A place beyond the capacity is dropped and noted (ERR_MOE_RANGE).
// What was tried besides is in bench/combine/NOTES.md.
#include <algorithm>

#include "backend.h"
#include "floats.cuh"
#include "launch_early.cuh"

namespace moe {

namespace {

constexpr int kThreads = 128;

// What a column without a place adds. A pointer to zeros and no branch: a branch around a load makes the compiler use
// every value before it loads the next.
__device__ uint4 zeros;

// COLUMNS > 0: exactly so many, all loaded at once. 0: any number, 8 at a time. The bound says that 64 registers are
// fine: left alone the compiler takes 32, and keeps fewer loads in flight.
template <class T, int N, int COLUMNS>
__global__ void __launch_bounds__(kThreads, 8) combine(MoeCombine p, unsigned slices, FaultNote* notes) {
  extern __shared__ char shared[];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int C = COLUMNS > 0 ? COLUMNS : static_cast<int>(p.C);
  const T** source = reinterpret_cast<const T**>(shared);
  float* weight = reinterpret_cast<float*>(source + C);
  const unsigned slice = blockIdx.x % slices;
  const int64_t token = blockIdx.x / slices;
  for (int c = threadIdx.x; c < C; c += kThreads) {
    const int64_t choice = token * C + c;
    const int32_t place = p.inverse.as<const int32_t>()[choice];
    float w = p.weights.as<const float>()[choice];
    const T* row = nullptr;
    const int64_t zero = p.zero > 0 ? int64_t{p.ids.as<const int32_t>()[choice]} - p.first_zero : -1;
    if (zero >= 0 && zero < p.zero) {
      row = p.hidden.as<const T>() + token * p.H;
    } else if (place >= p.P) {
      raise_fault(notes, FaultSite::kCombineInverse, place, static_cast<int32_t>(p.P));
    } else if (place >= 0) {
      row = p.rows.as<const T>() + place * p.H;
      if (p.weights_on_input) w = 1.0f;
    }
    source[c] = row;
    weight[c] = row == nullptr ? 0.0f : w;
  }
  __syncthreads();

  constexpr int kAtOnce = COLUMNS > 0 ? COLUMNS : 8;
  const int64_t vectors = p.H / N;
  for (int64_t at = int64_t{slice} * kThreads + threadIdx.x; at < vectors; at += int64_t{slices} * kThreads) {
    float sum[N] = {};
    for (int first = 0; first < C; first += kAtOnce) {
      Vec<T, N> value[kAtOnce];
#pragma unroll
      for (int c = 0; c < kAtOnce; c++) {
        const T* row = COLUMNS > 0 || first + c < C ? source[first + c] : nullptr;
        value[c] = load<T, N>(row == nullptr ? reinterpret_cast<const T*>(&zeros) : row + at * N);
      }
      asm volatile("" ::: "memory");  // all loads before the first use
#pragma unroll
      for (int c = 0; c < kAtOnce; c++) {
        const float w = COLUMNS > 0 || first + c < C ? weight[first + c] : 0.0f;  // 0 x 0 without a place
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] = fmaf(w, widen(value[c].v[i]), sum[i]);
      }
    }
    Vec<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++) out.v[i] = narrow<T>(sum[i] * p.output_scale);
    store<T, N>(p.output.as<T>() + token * p.H + at * N, out);
  }
}

template <class T, int N>
cudaError_t launch(CudaBackend& device, const MoeCombine& p, unsigned slices, size_t shared) {
  const auto blocks = static_cast<unsigned>(p.T * slices);
  const auto run = [&](auto kernel) {
    return launch_early(device.compute_capability() >= 90, kernel, blocks, kThreads, shared, device.stream(), p, slices,
                        device.fault_notes());
  };
#define MOE_COMBINE(columns) \
  case columns: return run(combine<T, N, columns>)
  switch (N > 1 ? p.C : 0) {
    MOE_COMBINE(1);
    MOE_COMBINE(2);
    MOE_COMBINE(4);
    MOE_COMBINE(6);
    MOE_COMBINE(7);
    MOE_COMBINE(8);
    MOE_COMBINE(9);
    MOE_COMBINE(10);
    MOE_COMBINE(11);
    MOE_COMBINE(16);
    default: return run(combine<T, N, 0>);
  }
#undef MOE_COMBINE
}

}  // namespace

Status moe_combine(Backend& backend, const MoeCombine& p) {
  if (p.T == 0 || p.H == 0) return Status::Ok();
  CudaBackend& device = cuda(backend);
  const size_t shared = static_cast<size_t>(p.C) * (sizeof(void*) + sizeof(float));
  if (p.T > INT32_MAX || shared > 48 * 1024) {
    return Status::Error(Code::kUnsupported, "expected fewer than 2^31 tokens and at most 4096 columns");
  }
  return with_float(p.rows.dtype, [&](auto* type) {
    using T = pointee<decltype(type)>;
    constexpr int kWide = kVector<T>;
    const bool wide = p.H % kWide == 0;
    const int64_t pieces = ceil_div(p.H / (wide ? kWide : 1), kThreads);
    const auto slices = static_cast<unsigned>(std::min(pieces, INT32_MAX / p.T));  // at least 1
    backend.note_path("moe_combine", wide ? "vectors" : "elements");
    MOE_CUDA_CHECK((wide ? launch<T, kWide> : launch<T, 1>)(device, p, slices, shared));
    return Status::Ok();
  });
}

MOE_REGISTER(moe_combine, MoeCombine);

}  // namespace moe
