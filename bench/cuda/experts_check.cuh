// `experts_bench check`: every shape, dtype and option of fused_moe and shared_experts against f64, each run twice.
#pragma once
#include "experts_harness.cuh"

namespace bench {

struct Case {
  Layer layer;
  int64_t T;
  Routing routing = Routing::kUniform;
  bool weights_on_input = false;
  int32_t first_expert = 0, zero = 0;
  double dropped = 0;
  float output_scale = 1;
};

inline bool run_case(Backend& backend, const Case& c, const std::string& path, Weights& weights, int* failures,
                     int* ran) {
  const Layer& l = c.layer;
  const int32_t first_zero = c.zero > 0 ? c.first_expert + static_cast<int32_t>(l.S) : -1;
  Input in(l, c.T, c.routing, 11 + c.T, c.first_expert, c.dropped, first_zero);
  FusedMoe p = call_of(weights, in);
  p.weights_on_input = c.weights_on_input;
  p.first_expert = c.first_expert, p.zero = c.zero, p.first_zero = first_zero;
  p.output_scale = c.output_scale;
  std::vector<char> first(in.T * l.H * size_of(l.dtype)), second(first.size());
  setenv("MOE_KERNELS_CUDA_EXPERTS", path.c_str(), 1);
  in.output.poison();
  OK(enqueue<FusedMoe>(backend, p));
  OK(backend.wait());
  if (path_taken(backend, "fused_moe") != path) return true;  // out of its limits
  in.output.get(first.data(), first.size());
  in.output.poison();
  OK(enqueue<FusedMoe>(backend, p));
  OK(backend.wait());
  in.output.get(second.data(), second.size());
  const bool same = first == second;
  std::vector<int32_t> sample;
  for (int64_t t = 0; t < c.T; t++) {
    if (c.T <= 64 || t % (c.T / 37) == 0 || t == c.T - 1) sample.push_back(static_cast<int32_t>(t));
  }
  const std::vector<double> wanted = reference(weights, p, sample);
  double error = 0, norm = 0, worst = 0;
  for (size_t s = 0; s < sample.size(); s++) {
    double token_error = 0, token_norm = 0;
    for (int64_t h = 0; h < l.H; h++) {
      const double w = wanted[s * l.H + h],
                   d = to_double(l.dtype, first.data(), static_cast<size_t>(sample[s]) * l.H + h) - w;
      token_error += d * d, token_norm += w * w;
    }
    error += token_error, norm += token_norm;
    const double of_token = std::sqrt(token_norm > 0 ? token_error / token_norm : token_error);
    if (!(of_token <= worst) && worst == worst) worst = of_token;  // a NaN stays
  }
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  const double limit = l.dtype == DType::kF32 ? 5e-6 : l.dtype == DType::kF16 ? 1e-3 : 6e-3;
  const bool good = relative <= limit && worst <= 4 * limit && same;
  if (!good) ++*failures;
  ++*ran;
  if (!good) {
    std::printf("%-4s %-7s %-8s H%lld I%lld S%lld C%lld %s T%lld routing %d relative %.2e worst token %.2e%s\n",
                good ? "ok" : "BAD", path.c_str(), l.name, (long long)l.H, (long long)l.I, (long long)l.S,
                (long long)l.C,
                l.dtype == DType::kBF16  ? "bf16"
                : l.dtype == DType::kF16 ? "f16"
                                         : "f32",
                (long long)c.T, static_cast<int>(c.routing), relative, worst, same ? "" : " NOT THE SAME TWICE");
    std::fflush(stdout);
  }
  return good;
}

// How many cases: all; small ones, for compute-sanitizer; the fewest in which every part of the kernels has work and
// every ring goes round, for its racecheck, which takes a second or two for each.
enum class Extent { kAll, kSmall, kFewest };

inline void run_fewest(Backend& backend, const std::vector<std::string>& paths, int* failures, int* ran) {
  // Blocks cut along K; biases and clamping, row weights, ids of other experts; rings of stages; rings of work items.
  const Layer parts = {"parts", 2048, 64, 2, 1},
              odd = {"odd", 72, 40, 5, 3, 1, DType::kBF16, true, {1.702f, 1.0f, 1.5f}},
              stages = {"stages", 2048, 1024, 3, 2}, items = {"items", 512, 256, 128, 2};
  Weights of_parts(backend, parts, 5), of_odd(backend, odd, 5), of_stages(backend, stages, 5),
      of_items(backend, items, 5);
  for (const std::string& path : paths) {
    const bool stays = path == "wgmma" || path == "stream";  // a block, for more than one piece of work
    for (const int64_t T : {3, 17, 128}) {  // both kernels of `stream`; few rows an expert, then more
      run_case(backend, {parts, T}, path, of_parts, failures, ran);
      run_case(backend, {odd, T}, path, of_odd, failures, ran);
      run_case(backend, {odd, T, Routing::kUniform, true, 7, 2, 0.3, 2.5f}, path, of_odd, failures, ran);
      if (stays) run_case(backend, {stages, T}, path, of_stages, failures, ran);
    }
    if (stays) run_case(backend, {items, 128}, path, of_items, failures, ran);
  }
}

inline void run_cases(Backend& backend, const std::vector<std::string>& paths, bool small_only, int* failures,
                      int* ran) {
  const SwiGLU clamped = {1.702f, 1.0f, 1.5f};
  std::vector<Layer> layers;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    layers.push_back({"tiny", 64, 32, 4, 2, 0, dtype});
    layers.push_back({"odd", 72, 40, 5, 3, 1, dtype, true, clamped});
    layers.push_back({"small", 128, 64, 8, 2, 0, dtype});
    if (small_only) continue;
    layers.push_back({"middle", 512, 192, 16, 4, 1, dtype, true});
    layers.push_back({"wide", 1032, 328, 33, 9, 1, dtype});
    layers.push_back({"many", 256, 64, 257, 9, 1, dtype});
    layers.push_back({"dense", 1024, 512, 1, 1, 0, dtype});
  }
  if (!small_only) {
    layers.push_back({"f32", 256, 96, 8, 2, 0, DType::kF32, true});
    layers.push_back({"most", 64, 16, 1024, 8});
    for (const Layer& l : kLayers) layers.push_back(l);
  }
  for (const Layer& l : layers) {
    Weights weights(backend, l, 5);
    const bool large = l.H * l.I > 1 << 20;
    std::vector<int64_t> tokens = {0, 1, 2, 3, 7, 8, 9, 16, 31, 64, 65, 127, 128, 129, 256, 513, 1024, 2047};
    if (small_only) tokens = {1, 3, 17, 130};
    if (large) tokens = {1, 4, 16, 33, 64, 128, 200, 256, 1024, 4096};
    for (const int64_t T : tokens) {
      for (const std::string& path : paths) {
        run_case(backend, {l, T}, path, weights, failures, ran);
        if (T == 0) continue;
        if (!large || T == 64 || T == 1024) {
          run_case(backend, {l, T, Routing::kZipf}, path, weights, failures, ran);
          run_case(backend, {l, T, Routing::kOneTakesAll}, path, weights, failures, ran);
        }
        run_case(backend, {l, T, Routing::kUniform, true, 7, 2, 0.3, 2.5f}, path, weights, failures, ran);
        if (!large) run_case(backend, {l, T, Routing::kUniform, false, 3, 0, 1.0}, path, weights, failures, ran);
      }
    }
  }
}

// shared_experts: whole with gate and routed, and its two halves, against the fused reference of one expert.
inline void run_shared(Backend& backend, const std::string& path, const Layer& l, int64_t T, int* failures, int* ran) {
  Weights weights(backend, l, 9);
  Input in(l, T, Routing::kUniform, 3);
  std::vector<float> ones(T, 1.0f);
  in.weights.put(ones.data(), T * 4);
  Buffer gate(l.H * size_of(l.dtype)), routed(T * l.H * size_of(l.dtype)), projected(T * 2 * l.I * size_of(l.dtype));
  fill(l.dtype, gate.data, l.H, 21, 1.0f / std::sqrt(static_cast<float>(l.H)));
  fill(l.dtype, routed.data, T * l.H, 22, 0.5f);
  setenv("MOE_KERNELS_CUDA_EXPERTS", path.c_str(), 1);
  SharedExperts p{};
  p.T = T, p.H = l.H, p.S = 1, p.I = l.I;
  p.hidden = {in.hidden.data, l.dtype, T * l.H};
  p.experts = weights.experts;
  std::vector<int32_t> sample(T);
  for (int64_t t = 0; t < T; t++) sample[t] = static_cast<int32_t>(t);
  const std::vector<double> plain = reference(weights, call_of(weights, in), sample);
  std::vector<char> hidden(T * l.H * size_of(l.dtype)), gates(l.H * size_of(l.dtype)), add(hidden.size()),
      got(hidden.size());
  in.hidden.get(hidden.data(), hidden.size());
  gate.get(gates.data(), gates.size());
  routed.get(add.data(), add.size());
  const auto verify = [&](const char* what) {
    if (path_taken(backend, "shared_experts") != path) return;
    in.output.get(got.data(), got.size());
    double error = 0, norm = 0;
    for (int64_t t = 0; t < T; t++) {
      double dot = 0;
      for (int64_t h = 0; h < l.H; h++)
        dot += to_double(l.dtype, hidden.data(), t * l.H + h) * to_double(l.dtype, gates.data(), h);
      for (int64_t h = 0; h < l.H; h++) {
        const double w = plain[t * l.H + h] / (1 + std::exp(-dot)) + to_double(l.dtype, add.data(), t * l.H + h);
        const double d = to_double(l.dtype, got.data(), t * l.H + h) - w;
        error += d * d, norm += w * w;
      }
    }
    const double relative = std::sqrt(error / norm), limit = l.dtype == DType::kF16 ? 1e-3 : 6e-3;
    ++*ran;
    if (relative <= limit) return;
    ++*failures;
    std::printf("BAD  shared_experts %s %s H%lld I%lld T%lld relative %.2e\n", path.c_str(), what, (long long)l.H,
                (long long)l.I, (long long)T, relative);
  };
  const Tensor expert_gate = {gate.data, l.dtype, l.H}, routed_in = {routed.data, l.dtype, T * l.H};
  const Tensor output = {in.output.data, l.dtype, T * l.H}, halves = {projected.data, l.dtype, T * 2 * l.I};
  SharedExperts whole = p;
  whole.part = SharedPart::kWhole, whole.expert_gate = expert_gate, whole.routed = routed_in, whole.output = output;
  in.output.poison();
  OK(enqueue<SharedExperts>(backend, whole));
  OK(backend.wait());
  verify("whole");
  SharedExperts up = p, down = p;
  up.part = SharedPart::kGateUp, up.projected = halves;
  down.part = SharedPart::kDown, down.projected_in = halves, down.expert_gate = expert_gate, down.routed = routed_in,
  down.output = output;
  in.output.poison();
  OK(enqueue<SharedExperts>(backend, up));
  OK(enqueue<SharedExperts>(backend, down));
  OK(backend.wait());
  verify("halves");
}

inline int check(const std::vector<std::string>& paths, Extent extent) {
  int failures = 0, ran = 0;
  auto backend = open();
  for (const std::string& path : paths) {
    if (extent == Extent::kFewest) {
      run_shared(*backend, path, {"shared", 136, 72, 1, 1}, 5, &failures, &ran);
      continue;
    }
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      for (const int64_t T : {1, 5, 40, 300}) {
        run_shared(*backend, path, {"shared", 136, 72, 1, 1, 0, dtype}, T, &failures, &ran);
        if (extent == Extent::kSmall) continue;
        run_shared(*backend, path, {"shared", 1024, 512, 1, 1, 0, dtype, true}, T, &failures, &ran);
      }
    }
  }
  if (extent == Extent::kFewest) {
    run_fewest(*backend, paths, &failures, &ran);
  } else {
    run_cases(*backend, paths, extent == Extent::kSmall, &failures, &ran);
  }
  std::printf("%d cases, %d failed\n", ran, failures);
  return failures > 0;
}

}  // namespace bench
