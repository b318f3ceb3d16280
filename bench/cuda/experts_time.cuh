// What experts_bench times: layers of fused_moe beside their floors, the paths beside each other at the borders of
// expert_paths.cc, and a shared expert as a slot, after the others and beside them.
#pragma once
#include "experts_harness.cuh"

namespace bench {

// Of reads alone, in TB/s.
inline double read_ceiling(CudaBackend& backend, Buffer& flush) {
  Buffer data(size_t{4} << 30);
  CHECK(cudaMemset(data.data, 1, data.bytes));
  const double us = time_graph(backend, flush, 2, [&](int) {
    read_kernel<<<132 * 8, 512, 0, backend.stream()>>>(static_cast<const uint4*>(data.data), data.bytes / 16,
                                                       static_cast<uint32_t*>(flush.data));
  });
  return static_cast<double>(data.bytes) / us * 1e-6;
}

// Launches of a graph, which take inputs of their own.
inline int launches_for(int64_t tokens) { return tokens <= 256 ? 8 : tokens <= 4096 ? 4 : 2; }

inline std::vector<std::unique_ptr<Input>> inputs_of(const Layer& l, int64_t tokens, Routing routing) {
  std::vector<std::unique_ptr<Input>> inputs;
  for (int i = 0; i < launches_for(tokens); i++) {
    inputs.push_back(std::make_unique<Input>(l, tokens, routing, 100 + i));
  }
  return inputs;
}

inline void wish_path(const char* path) {
  if (path == nullptr) {
    unsetenv("MOE_KERNELS_CUDA_EXPERTS");
  } else {
    setenv("MOE_KERNELS_CUDA_EXPERTS", path, 1);
  }
}

// `path` null: as chosen.
inline void time_layer(CudaBackend& backend, const Layer& l, const char* path, int64_t from, int64_t to,
                       double read_ceiling, Buffer& flush, Routing routing) {
  Weights weights(backend, l, 5);
  weights.drop_source();
  wish_path(path);
  for (const int64_t T : {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384}) {
    if (T < from || T > to) continue;
    const auto inputs = inputs_of(l, T, routing);
    double hit = 0;
    for (const auto& in : inputs) hit += static_cast<double>(in->hit) / static_cast<double>(inputs.size());
    const double us = time_graph(backend, flush, static_cast<int>(inputs.size()),
                                 [&](int i) { OK(enqueue<FusedMoe>(backend, call_of(weights, *inputs[i]))); });
    const std::string taken = path_taken(backend, "fused_moe");
    if (path != nullptr && taken != path) continue;
    const double weight_bytes = hit * 3.0 * l.H * l.I * 2, row_bytes = 2.0 * T * l.H * 2;
    const double flop = 6.0 * T * l.C * l.H * l.I;
    const double floor = std::max((weight_bytes + row_bytes) / read_ceiling * 1e-6, flop / 788e12 * 1e6);
    // What the rows between the second product and the sum add: written once, read once.
    const double rows_floor = floor + 2.0 * T * l.C * l.H * 2 / read_ceiling * 1e-6;
    std::printf(
        "%-7s %-4s %-7s %6lld tokens  hit %5.1f  %9.1f us  floor %8.1f  ratio %5.2f  with rows %8.1f  %6.1f TFLOP/s  "
        "%5.0f GB/s\n",
        l.name, routing == Routing::kZipf ? "zipf" : "", taken.c_str(), (long long)T, hit, us, floor, us / floor,
        rows_floor, flop / us * 1e-6, weight_bytes / us * 1e-3);
    std::fflush(stdout);
  }
}

// `stream` and `wgmma` in turn, at one number of tokens of a layer: what expert_paths.h decides by, and what it took.
struct PathPoint {
  const char* layer;
  int64_t T;
  mlp::Shape shape;
  double stream, wgmma;  // us
  // What is lost by a choice.
  double loss(bool by_stream) const { return (by_stream ? stream : wgmma) / std::min(stream, wgmma) - 1; }
};

inline mlp::Shape shape_of(CudaBackend& backend, const Layer& l, int64_t T) {
  mlp::StreamCall call{};
  call.dtype = l.dtype, call.T = T, call.C = l.C, call.H = l.H, call.I = l.I, call.S = l.S;
  call.sm_count = backend.sm_count();
  return {l.dtype, l.dtype, T, l.C, l.S, l.H, l.I, backend.compute_capability(), stream_kernel(call), call.sm_count};
}

inline void time_paths(CudaBackend& backend, const Layer& l, Buffer& flush, std::vector<PathPoint>* points) {
  Weights weights(backend, l, 5);
  weights.drop_source();
  for (const int64_t T : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}) {
    const mlp::Shape shape = shape_of(backend, l, T);
    if (shape.stream == mlp::StreamKernel::kNone) break;
    const auto inputs = inputs_of(l, T, Routing::kUniform);
    std::vector<std::function<void(int)>> launches;
    for (const mlp::Path path : {mlp::Path::kStream, mlp::Path::kWgmma}) {
      launches.push_back([&, path](int i) {
        wish_path(name_of(path));
        OK(enqueue<FusedMoe>(backend, call_of(weights, *inputs[i])));
      });
    }
    const std::vector<double> us = time_graphs(backend, flush, static_cast<int>(inputs.size()), launches);
    const PathPoint& point = points->emplace_back(PathPoint{l.name, T, shape, us[0], us[1]});
    mlp::Path chosen{};
    mlp::choose(shape, nullptr, &chosen);
    const double loss = point.loss(chosen == mlp::Path::kStream);
    std::printf("%-14s %4lld tokens  %5.2f blocks  stream (%s) %7.1f us  wgmma %7.1f us  chosen: %-6s", l.name,
                (long long)T, mlp::blocks_a_multiprocessor(shape),
                shape.stream == mlp::StreamKernel::kFew ? "few" : "many", us[0], us[1], name_of(chosen));
    std::printf(loss > 0 ? "  loses %.1f%%\n" : "\n", 100 * loss);
    std::fflush(stdout);
  }
}

// The limit of blocks a multiprocessor that the points of one kernel of `stream` would set: where the worst loss is the
// least, beside that of expert_paths.h.
inline void derive_paths(const std::vector<PathPoint>& points, mlp::StreamKernel kernel, const char* name,
                         double limit) {
  std::vector<const PathPoint*> of;
  for (const PathPoint& p : points) {
    const bool in_range = p.T >= mlp::kManyFrom && p.T <= mlp::kManyTo;
    if (p.shape.stream == kernel && (kernel == mlp::StreamKernel::kFew || in_range)) of.push_back(&p);
  }
  if (of.empty()) return;
  const auto blocks = [](const PathPoint* p) { return mlp::blocks_a_multiprocessor(p->shape); };
  std::sort(of.begin(), of.end(), [&](auto* a, auto* b) { return blocks(a) < blocks(b); });
  const auto worst = [&](double below) {
    return *std::max_element(of.begin(), of.end(),
                             [&](auto* a, auto* b) { return a->loss(blocks(a) < below) < b->loss(blocks(b) < below); });
  };
  const auto loss = [&](double below) {
    const PathPoint* p = worst(below);
    return p->loss(blocks(p) < below);
  };
  // Limits between two neighbours are all the same.
  double from = 0, to = blocks(of[0]), least = loss(0);
  for (size_t i = 0; i < of.size(); i++) {
    const double next = i + 1 < of.size() ? blocks(of[i + 1]) : INFINITY,
                 here = loss(std::nextafter(blocks(of[i]), 1e9));
    if (here < least) least = here, from = blocks(of[i]), to = next;
  }
  const PathPoint* p = worst(limit);
  std::printf(
      "stream (%s): a limit from %.2f to %.2f blocks a multiprocessor loses %.1f%% at most; %.2f, as it is, "
      "%.1f%% (%s, %lld tokens)\n",
      name, from, to, 100 * least, limit, 100 * loss(limit), p->layer, (long long)p->T);
}

inline void derive_paths(const std::vector<PathPoint>& points) {
  derive_paths(points, mlp::StreamKernel::kFew, "few", mlp::kFewBlocks);
  derive_paths(points, mlp::StreamKernel::kMany, "many", mlp::kManyBlocks);
  double most = 0;
  const PathPoint* quicker = nullptr;  // at other numbers of tokens than its kernel for many is chosen for
  for (const PathPoint& p : points) {
    const bool in_range = p.T >= mlp::kManyFrom && p.T <= mlp::kManyTo;
    if (p.shape.stream != mlp::StreamKernel::kMany || in_range || p.loss(false) <= most) continue;
    most = p.loss(false), quicker = &p;
  }
  if (quicker == nullptr) return;
  std::printf("stream (many) below %lld and beyond %lld tokens is quicker by up to %.1f%% (%s, %lld tokens)\n",
              (long long)mlp::kManyFrom, (long long)mlp::kManyTo, 100 * most, quicker->layer, (long long)quicker->T);
}

// A shared expert, in turn: as a slot of fused_moe; after it by shared_experts; beside it as an overlapped MoeLayer
// does it, whose second half adds the routed experts.
inline void time_shared(CudaBackend& backend, const Layer& l, Buffer& flush) {
  Layer routed = l, shared = l;
  routed.S -= l.shared, routed.C -= l.shared, routed.shared = 0;
  shared.S = shared.C = 1, shared.shared = 0, shared.I = l.shared * l.I;
  Weights all(backend, l, 5), others(backend, routed, 5), own(backend, shared, 6);
  for (Weights* weights : {&all, &others, &own}) weights->drop_source();
  wish_path(nullptr);
  for (const int64_t T : {1, 16, 64, 256, 1024, 4096}) {
    const auto inputs = inputs_of(l, T, Routing::kUniform), routings = inputs_of(routed, T, Routing::kUniform);
    Buffer projected(static_cast<size_t>(T * 2 * shared.I) * size_of(l.dtype));
    const auto part = [&](int i, SharedPart which) {
      const int64_t states = T * l.H;
      SharedExperts p{};
      p.T = T, p.H = l.H, p.S = 1, p.I = shared.I;
      p.part = which;
      p.hidden = {routings[i]->hidden.data, l.dtype, states};
      p.experts = own.experts;
      const Tensor halves = {projected.data, l.dtype, T * 2 * shared.I};
      if (which == SharedPart::kGateUp) p.projected = halves;
      if (which == SharedPart::kDown) p.projected_in = halves;
      if (which != SharedPart::kGateUp) {
        p.routed = {routings[i]->output.data, l.dtype, states};
        p.output = {inputs[i]->output.data, l.dtype, states};
      }
      OK(enqueue<SharedExperts>(backend, p));
    };
    const auto route = [&](int i) { OK(enqueue<FusedMoe>(backend, call_of(others, *routings[i]))); };
    const std::vector<double> us =
        time_graphs(backend, flush, static_cast<int>(inputs.size()),
                    {[&](int i) { OK(enqueue<FusedMoe>(backend, call_of(all, *inputs[i]))); },
                     [&](int i) { route(i), part(i, SharedPart::kWhole); },
                     [&](int i) {
                       OK(backend.take_lane(Backend::Lane::kBeside));
                       part(i, SharedPart::kGateUp);
                       OK(backend.take_lane(Backend::Lane::kMain));
                       route(i);
                       OK(backend.take_lane(Backend::Lane::kJoin));
                       part(i, SharedPart::kDown);
                     }});
    std::printf("%-14s %6lld tokens  a slot %8.1f us  after %8.1f us  beside %8.1f us\n", l.name, (long long)T, us[0],
                us[1], us[2]);
    std::fflush(stdout);
  }
}

}  // namespace bench
