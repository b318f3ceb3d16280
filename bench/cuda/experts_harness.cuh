// What experts_bench measures and checks with: layers with random weights, routings, and a reference in f64.
#pragma once
#include <cmath>
#include <memory>

#include "../../csrc/cuda/backend.h"
#include "../../csrc/cuda/expert_tiles.h"
#include "../../csrc/cuda/floats.cuh"
#include "../../test/native/ok.h"
#include "harness.cuh"

namespace bench {

using namespace moe;

struct Layer {
  const char* name;
  int64_t H, I, S, C;  // C columns, of which `shared` name the last experts always
  int shared = 0;
  DType dtype = DType::kBF16;
  bool biases = false;
  SwiGLU swiglu = {};
};

// Of the peers' table.
inline const Layer kLayers[] = {
    {"V3-TP8", 7168, 256, 257, 9, 1},
    {"V3-EP", 7168, 2048, 9, 2},
    {"Qwen3", 2048, 768, 128, 8},
};

inline std::unique_ptr<Backend> open() {
  std::unique_ptr<Backend> backend;
  OK(create_backend(ContextOptions{}, &backend));
  return backend;
}

inline std::string path_taken(Backend& backend, const char* op) {
  const auto paths = backend.paths();
  const auto found = paths.find(op);
  return found == paths.end() ? "-" : found->second;
}

enum class Routing { kUniform, kZipf, kOneTakesAll };

// A stateless generator: value i of stream `seed`, about normal.
__device__ inline float normal_at(uint64_t seed, uint64_t i) {
  uint64_t z = i + seed * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  const float a = (z & 0xffff) + ((z >> 16) & 0xffff) + ((z >> 32) & 0xffff) + (z >> 48);
  return (a * (1.0f / 65536) - 2.0f) * 1.7320508f;
}

template <class T>
__global__ void fill_normal(T* out, size_t n, uint64_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    out[i] = narrow<T>(normal_at(seed, i) * scale);
  }
}

inline void fill(DType dtype, void* out, size_t n, uint64_t seed, float scale) {
  OK(with_float(dtype, [&](auto* type) {
    fill_normal<<<132 * 8, 256>>>(static_cast<pointee<decltype(type)>*>(out), n, seed, scale);
    return Status::Ok();
  }));
  CHECK(cudaDeviceSynchronize());
}

// As the binding does it: scratch goes back when the call has been enqueued.
template <class Params>
Status enqueue(Backend& backend, const Params& p) {
  Status status;
  backend.submit([&] { status = registered_kernel<Params>(backend, p); });
  return status;
}

// Weights in the source's layout (gate rows, up rows) and packed.
struct Weights {
  Layer layer;
  Buffer w13, w2, b13, b2, packed;
  Experts experts;

  Weights(Backend& backend, const Layer& l, uint64_t seed) : layer(l) {
    const size_t width = size_of(l.dtype), n13 = l.S * 2 * l.I * l.H, n2 = l.S * l.H * l.I;
    w13 = Buffer(n13 * width), w2 = Buffer(n2 * width);
    fill(l.dtype, w13.data, n13, seed, 1.0f / std::sqrt(static_cast<float>(l.H)));
    fill(l.dtype, w2.data, n2, seed + 1, 1.0f / std::sqrt(static_cast<float>(l.I)));
    if (l.biases) {
      b13 = Buffer(l.S * 2 * l.I * 4), b2 = Buffer(l.S * l.H * 4);
      fill(DType::kF32, b13.data, l.S * 2 * l.I, seed + 2, 0.3f);
      fill(DType::kF32, b2.data, l.S * l.H, seed + 3, 0.3f);
    }
    experts.layout = {l.S, l.H, l.I, l.dtype, l.biases, l.swiglu};
    packed = Buffer(backend.expert_bytes(experts.layout));
    packed.poison();
    experts.data = packed.data;
    PackExperts p{};
    p.S = p.count = l.S, p.H = l.H, p.I = l.I;
    p.experts = experts;
    p.w13 = {w13.data, l.dtype, static_cast<int64_t>(n13)}, p.w2 = {w2.data, l.dtype, static_cast<int64_t>(n2)};
    if (l.biases) p.b13 = {b13.data, DType::kF32, l.S * 2 * l.I}, p.b2 = {b2.data, DType::kF32, l.S * l.H};
    OK(enqueue<PackExperts>(backend, p));
    OK(backend.wait());
  }
  // The source is needed by the reference alone.
  void drop_source() { w13 = Buffer(), w2 = Buffer(); }
};

// One input of a layer: hidden states and a routing; `hit` experts have rows.
struct Input {
  int64_t T;
  std::vector<int32_t> host_ids;
  std::vector<float> host_weights;
  Buffer hidden, ids, weights, output;
  int64_t hit = 0;

  Input(const Layer& l, int64_t tokens, Routing routing, uint64_t seed, int32_t first_expert = 0, double dropped = 0,
        int32_t first_zero = -1)
      : T(tokens), host_ids(tokens * l.C), host_weights(tokens * l.C) {
    Random random(seed);
    const int64_t routed = l.S - l.shared, K = l.C - l.shared;
    std::vector<double> cumulative(routed);
    double sum = 0;
    for (int64_t e = 0; e < routed; e++)
      cumulative[e] = sum += routing == Routing::kZipf ? 1.0 / static_cast<double>(e + 1) : 1.0;
    std::vector<char> used(l.S, 0);
    for (int64_t t = 0; t < T; t++) {
      int32_t* row = host_ids.data() + t * l.C;
      for (int64_t c = 0; c < l.C; c++) {
        int32_t id = 0;
        if (c >= K) {
          id = static_cast<int32_t>(routed + c - K);
        } else if (routing == Routing::kOneTakesAll) {
          id = static_cast<int32_t>((routed / 2 + c) % routed);
        } else {
          bool again = true;
          while (again) {
            const double at = random.uniform() * sum;
            id = static_cast<int32_t>(std::lower_bound(cumulative.begin(), cumulative.end(), at) - cumulative.begin());
            again = K <= routed && std::find(row, row + c, id + first_expert) != row + c;
          }
        }
        if (random.uniform() < dropped) {
          row[c] = first_zero >= 0 && random.uniform() < 0.5 ? first_zero : -1;
        } else {
          row[c] = id + first_expert;
          used[id] = 1;
        }
        host_weights[t * l.C + c] = static_cast<float>(0.05 + random.uniform() * 0.5);
      }
    }
    for (const char u : used) hit += u;
    const size_t n = T * l.H;
    hidden = Buffer(n * size_of(l.dtype)), output = Buffer(n * size_of(l.dtype));
    ids = Buffer(host_ids.size() * 4), weights = Buffer(host_weights.size() * 4);
    if (n > 0) fill(l.dtype, hidden.data, n, seed + 77, 1.0f);
    ids.put(host_ids.data(), host_ids.size() * 4);
    weights.put(host_weights.data(), host_weights.size() * 4);
  }
};

inline FusedMoe call_of(const Weights& w, const Input& in) {
  const Layer& l = w.layer;
  FusedMoe p{};
  p.T = in.T, p.H = l.H, p.C = l.C, p.S = l.S, p.I = l.I;
  p.hidden = {in.hidden.data, l.dtype, in.T * l.H};
  p.ids = {in.ids.data, DType::kI32, in.T * l.C};
  p.weights = {in.weights.data, DType::kF32, in.T * l.C};
  p.experts = w.experts;
  p.output = {in.output.data, l.dtype, in.T * l.H};
  p.output_scale = 1.0f;
  return p;
}

// The reference, for the tokens `sample`: activations f64 [samples * C, I], then outputs f64 [samples, H]. A warp a
// value.
template <class T>
__global__ void reference_gate_up(FusedMoe p, const T* w13, const float* b13, SwiGLU s, const int32_t* sample,
                                  int64_t n, double* active) {
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / 32;
  for (int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32; at < n * p.C * p.I; at += warps) {
    const int64_t i = at % p.I, choice = at / p.I, token = sample[choice / p.C];
    const int64_t id = p.ids.as<const int32_t>()[token * p.C + choice % p.C] - int64_t{p.first_expert};
    if (id < 0 || id >= p.S) continue;
    const T *x = p.hidden.as<const T>() + token * p.H, *g = w13 + (id * 2 * p.I + i) * p.H, *u = g + p.I * p.H;
    double gs = 0, us = 0;
    for (int64_t h = threadIdx.x % 32; h < p.H; h += 32) {
      gs += static_cast<double>(widen(x[h])) * widen(g[h]);
      us += static_cast<double>(widen(x[h])) * widen(u[h]);
    }
    for (int lane = 16; lane > 0; lane /= 2) gs += __shfl_xor_sync(~0u, gs, lane), us += __shfl_xor_sync(~0u, us, lane);
    const double w = p.weights_on_input ? p.weights.as<const float>()[token * p.C + choice % p.C] : 1.0;
    gs *= w, us *= w;
    if (b13 != nullptr) gs += b13[id * 2 * p.I + i], us += b13[id * 2 * p.I + p.I + i];
    if (s.limit > 0) gs = fmin(gs, double{s.limit}), us = fmax(fmin(us, double{s.limit}), -double{s.limit});
    if (threadIdx.x % 32 == 0) active[at] = (us + s.beta) * gs / (1 + exp(-s.alpha * gs));
  }
}

template <class T>
__global__ void reference_down(FusedMoe p, const T* w2, const float* b2, const int32_t* sample, int64_t n,
                               const double* active, double* out) {
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / 32;
  for (int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32; at < n * p.H; at += warps) {
    const int64_t h = at % p.H, token = sample[at / p.H];
    double sum = 0;
    for (int64_t c = 0; c < p.C; c++) {
      const int64_t raw = p.ids.as<const int32_t>()[token * p.C + c], id = raw - p.first_expert;
      const double w = p.weights.as<const float>()[token * p.C + c];
      if (p.zero > 0 && raw >= p.first_zero && raw < p.first_zero + p.zero) {
        sum += w * widen(p.hidden.as<const T>()[token * p.H + h]);
        continue;
      }
      if (id < 0 || id >= p.S) continue;
      const T* row = w2 + (id * p.H + h) * p.I;
      const double* a = active + (at / p.H * p.C + c) * p.I;
      double dot = 0;
      for (int64_t i = threadIdx.x % 32; i < p.I; i += 32) dot += a[i] * widen(row[i]);
      for (int lane = 16; lane > 0; lane /= 2) dot += __shfl_xor_sync(~0u, dot, lane);
      if (b2 != nullptr) dot += b2[id * p.H + h];
      sum += p.weights_on_input ? dot : w * dot;
    }
    if (threadIdx.x % 32 == 0) out[at] = sum * p.output_scale;
  }
}

inline std::vector<double> reference(const Weights& w, const FusedMoe& p, const std::vector<int32_t>& sample) {
  const auto n = static_cast<int64_t>(sample.size());
  Buffer tokens(n * 4), active(n * p.C * p.I * 8 + 8), out(n * p.H * 8);
  tokens.put(sample.data(), n * 4);
  OK(with_float(w.layer.dtype, [&](auto* type) {
    using T = pointee<decltype(type)>;
    reference_gate_up<T><<<132 * 16, 256>>>(p, static_cast<const T*>(w.w13.data), static_cast<const float*>(w.b13.data),
                                            w.layer.swiglu, static_cast<const int32_t*>(tokens.data), n,
                                            static_cast<double*>(active.data));
    reference_down<T><<<132 * 16, 256>>>(p, static_cast<const T*>(w.w2.data), static_cast<const float*>(w.b2.data),
                                         static_cast<const int32_t*>(tokens.data), n,
                                         static_cast<const double*>(active.data), static_cast<double*>(out.data));
    return Status::Ok();
  }));
  CHECK(cudaDeviceSynchronize());
  std::vector<double> host(n * p.H);
  out.get(host.data(), host.size() * 8);
  return host;
}

inline double to_double(DType dtype, const void* data, size_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kBF16) return static_cast<double>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
  return static_cast<double>(__half2float(static_cast<const __half*>(data)[i]));
}

// Microseconds of one of `rotations` launches in a graph, cold L2, median of 11. Several functions take turns, replay
// by replay, so that they meet the same clocks.
inline std::vector<double> time_graphs(CudaBackend& backend, Buffer& flush, int rotations,
                                       const std::vector<std::function<void(int)>>& launches) {
  std::vector<std::shared_ptr<Graph>> graphs(launches.size());
  for (size_t which = 0; which < launches.size(); which++) {
    launches[which](0);
    OK(backend.wait());
    OK(backend.begin_capture());
    for (int i = 0; i < rotations; i++) launches[which](i);
    OK(backend.end_capture(&graphs[which]));
  }
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<std::vector<float>> times(launches.size());
  for (int round = 0; round < 13; round++) {
    for (size_t which = 0; which < launches.size(); which++) {
      read_kernel<<<132 * 8, 512, 0, backend.stream()>>>(static_cast<const uint4*>(flush.data), flush.bytes / 16,
                                                         static_cast<uint32_t*>(flush.data));
      spin_kernel<<<1, 1, 0, backend.stream()>>>(200000);
      CHECK(cudaEventRecord(begin, backend.stream()));
      OK(backend.replay(*graphs[which]));
      CHECK(cudaEventRecord(end, backend.stream()));
      CHECK(cudaStreamSynchronize(backend.stream()));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (round >= 2) times[which].push_back(ms);
    }
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  std::vector<double> medians;
  for (auto& of_one : times) {
    std::sort(of_one.begin(), of_one.end());
    medians.push_back(of_one[of_one.size() / 2] * 1000.0 / rotations);
  }
  return medians;
}

inline double time_graph(CudaBackend& backend, Buffer& flush, int rotations, const std::function<void(int)>& launch) {
  return time_graphs(backend, flush, rotations, {launch})[0];
}

}  // namespace bench
