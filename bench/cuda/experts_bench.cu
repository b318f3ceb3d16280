// The expert compute of the CUDA backend without Node: fused_moe and shared_experts through the backend itself.
//
//   experts_bench check [PATH...]              every shape, dtype and option against an f64 reference, each run twice
//   experts_bench time [PATH|auto] [LAYER|all] [T|FROM-TO] [zipf]
//                                              us, ratio to the floor and TFLOP/s of the layers of the peers' table
//   experts_bench paths [LAYER]                where one path overtakes another, and the limits of expert_paths.h anew
//   experts_bench shared                       a shared expert as a slot, after the others, beside them
//   experts_bench profile PATH LAYER TOKENS    one launch after a warm-up, for ncu
//   experts_bench sanitize [PATH...]           the small cases of `check`, for compute-sanitizer
//   experts_bench race [PATH...]               a few whose rings go round, for its racecheck
// compute-sanitizer needs --num-cuda-barriers 1024 (bench/cuda/EXPERTS-STREAM.md, "Sanitizers").
//
// PATH: plain, mma, wgmma, stream; a path that cannot run a call is skipped there.
#include "experts_check.cuh"
#include "experts_time.cuh"

using namespace bench;

namespace {

// Further layers of public models for `paths`, routed experts alone.
const Layer kMoreLayers[] = {
    {"OLMoE", 2048, 1024, 64, 8},        {"gpt-oss-20b", 2880, 2880, 32, 4}, {"Qwen3-Next", 2048, 512, 512, 10},
    {"Mixtral-8x7B", 4096, 14336, 8, 2}, {"V3-EP32", 7168, 2048, 8, 1},
};

// And of those with a shared expert, for `shared`.
const Layer kSharedLayers[] = {kLayers[0], {"V3-EP + shared", 7168, 2048, 10, 3, 1}};

int time_layers(CudaBackend& backend, Buffer& flush, const std::vector<std::string>& words) {
  const auto word = [&](size_t i, const char* otherwise) { return i < words.size() ? words[i] : otherwise; };
  const std::string path = word(0, "auto"), layer = word(1, "all");
  int64_t from = 0, to = INT64_MAX;
  if (words.size() > 2) {
    char* end = nullptr;
    from = to = std::strtoll(words[2].c_str(), &end, 10);
    if (*end == '-') to = std::atoll(end + 1);
  }
  const double ceiling = read_ceiling(backend, flush);
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, read ceiling %.2f TB/s\n", device.name, ceiling);
  for (const Layer& l : kLayers) {
    if (layer != l.name && layer != "all") continue;
    for (const Routing routing : {Routing::kUniform, Routing::kZipf}) {
      if (routing == Routing::kZipf && word(3, "") != "zipf") continue;
      time_layer(backend, l, path == "auto" ? nullptr : path.c_str(), from, to, ceiling, flush, routing);
    }
  }
  return 0;
}

int profile(CudaBackend& backend, const std::vector<std::string>& words) {
  for (const Layer& l : kLayers) {
    if (words.size() < 3 || words[1] != l.name) continue;
    Weights weights(backend, l, 5);
    wish_path(words[0].c_str());
    Input in(l, std::atoll(words[2].c_str()), Routing::kUniform, 100);
    for (int i = 0; i < 2; i++) OK(enqueue<FusedMoe>(backend, call_of(weights, in)));
    OK(backend.wait());
    return 0;
  }
  std::printf("expected profile PATH LAYER TOKENS\n");
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  const std::vector<std::string> words(argv + std::min(argc, 2), argv + argc);
  if (mode == "check" || mode == "sanitize" || mode == "race") {
    const std::vector<std::string> all = {"plain", "mma", "wgmma", "stream"};
    const Extent extent = mode == "check" ? Extent::kAll : mode == "sanitize" ? Extent::kSmall : Extent::kFewest;
    return check(words.empty() ? all : words, extent);
  }
  auto owner = open();
  CudaBackend& backend = cuda(*owner);
  if (mode == "profile") return profile(backend, words);
  Buffer flush(size_t{512} << 20);
  if (mode == "time") return time_layers(backend, flush, words);
  if (mode == "paths") {
    std::vector<Layer> layers(std::begin(kLayers), std::end(kLayers));
    layers.insert(layers.end(), std::begin(kMoreLayers), std::end(kMoreLayers));
    std::vector<PathPoint> points;
    for (const Layer& l : layers) {
      if (words.empty() || words[0] == l.name) time_paths(backend, l, flush, &points);
    }
    derive_paths(points);
    return 0;
  }
  if (mode == "shared") {
    for (const Layer& l : kSharedLayers) time_shared(backend, l, flush);
    return 0;
  }
  std::printf("expected check, time, paths, shared, profile, sanitize or race but received %s\n", mode.c_str());
  return 1;
}
