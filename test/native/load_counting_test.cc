// What moe_fused_gate counts, on any backend: random sequences of counting, reading, writing and clearing load tensors,
// outside and inside captures and lanes, with tensors and captures coming and going, against counts kept on the host.
// Drives a backend as csrc/binding does. usage:
// load_counting_test [ROUNDS [SEED [MOST_TOKENS [fill]]]], where `fill` takes all of the device's memory.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/binding/task.h"
#include "ok.h"

using namespace moe;

namespace {

std::mt19937_64 random_bits;
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

using Counts = std::vector<int64_t>;

// A queue ---------------------------------------------------------------------------------------------------------

std::shared_ptr<Backend> backend;
std::shared_ptr<FaultLog> faults = std::make_shared<FaultLog>();
std::shared_ptr<Recording> recording;

std::shared_ptr<Buffer> allocate(DType dtype, int64_t elements) {
  auto buffer = std::make_shared<Buffer>();
  buffer->bytes = static_cast<size_t>(elements) * size_of(dtype);
  buffer->dtype = dtype;
  buffer->elements = elements;
  OK(backend->allocate(buffer->bytes, &buffer->data));
  buffer->backend = backend;
  if (recording != nullptr && backend->has_graphs()) buffer->capture = recording->number;
  return buffer;
}

void submit(std::shared_ptr<const Task> task) {
  if (!backend->runs_at_once()) {
    if (recording != nullptr) return recording->tasks.push_back(std::move(task));
    return backend->submit([backend = backend.get(), task] { execute(*backend, *task, *faults); });
  }
  Status status;
  backend->submit([&] { status = run(*backend, *task); });
  OK(status);
  if (recording == nullptr) return;
  for (const auto* buffers : {&task->reads, &task->writes}) {
    for (const auto& buffer : *buffers) {
      if (buffer->capture != recording->number) recording->leases.push_back(buffer);
    }
  }
}

void write(const std::shared_ptr<Buffer>& buffer, const void* data) {
  auto task = std::make_shared<Task>();
  task->op = "write";
  task->writes = {buffer};
  if (data == nullptr) {
    task->run = [to = buffer->data, bytes = buffer->bytes](Backend& b) { return b.fill_zero(to, bytes); };
  } else {
    std::shared_ptr<uint8_t[]> staged = backend->staging(buffer->bytes);
    std::memcpy(staged.get(), data, buffer->bytes);
    task->run = [to = buffer->data, staged, bytes = buffer->bytes](Backend& b) {
      return b.copy_in(to, staged.get(), bytes);
    };
  }
  submit(std::move(task));
}

// Enqueues the copy; the data is there after the next wait.
std::shared_ptr<uint8_t[]> fetch(const std::shared_ptr<Buffer>& buffer) {
  std::shared_ptr<uint8_t[]> host = backend->staging(buffer->bytes);
  backend->submit([backend = backend.get(), buffer, host] {
    OK(settle(*backend, *buffer));
    OK(backend->copy_out(host.get(), buffer->data, buffer->bytes));
  });
  return host;
}

template <class T>
std::vector<T> read(const std::shared_ptr<Buffer>& buffer) {
  const auto host = fetch(buffer);
  OK(backend->wait());
  std::vector<T> values(static_cast<size_t>(buffer->elements));
  std::memcpy(values.data(), host.get(), buffer->bytes);
  return values;
}

Tensor view(const std::shared_ptr<Buffer>& buffer) {
  return buffer == nullptr ? Tensor{} : Tensor{buffer->data, buffer->dtype, buffer->elements};
}

// Gates -----------------------------------------------------------------------------------------------------------

struct Gate {
  MoeFusedGate p{};
  std::shared_ptr<Buffer> logits, bias, map;
  std::map<int64_t, Counts> counts;  // by slots

  // `kinds`: how many different rows; one row sends all tokens to the same experts.
  Gate(int64_t T, int64_t E, int32_t K, int32_t groups, int32_t top_groups, Scoring scoring, bool biased,
       int64_t rounds, int64_t mapped_below, int64_t kinds) {
    p.T = T, p.E = E, p.K = K, p.rounds = rounds;
    p.groups = groups, p.top_groups = top_groups;
    p.scoring = scoring, p.group_score = biased ? GroupScore::kTop2Sum : GroupScore::kMax;
    p.renormalize = true, p.scale = 1.0f;
    p.valid_tokens.host = T;
    std::normal_distribution<float> normal;
    std::vector<uint16_t> rows(static_cast<size_t>(T * E));  // bf16
    for (size_t i = 0; i < rows.size(); i++) {
      const float value = normal(random_bits);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      const size_t same = static_cast<size_t>(kinds * E);
      rows[i] = i < same ? static_cast<uint16_t>(bits >> 16) : rows[i - same];
    }
    logits = allocate(DType::kBF16, T * E);
    write(logits, rows.data());
    if (biased) {
      std::vector<float> values(static_cast<size_t>(E));  // zeros leave equal choices
      if (below(2) == 0) {
        for (float& value : values) value = 0.1f * normal(random_bits);
      }
      bias = allocate(DType::kF32, E);
      write(bias, values.data());
    }
    if (rounds > 0) {
      std::vector<int32_t> ids(static_cast<size_t>(rounds * E));
      for (int32_t& id : ids) id = static_cast<int32_t>(below(mapped_below + 1)) - 1;
      map = allocate(DType::kI32, rounds * E);
      write(map, ids.data());
    }
    const auto chosen = read<int32_t>(enqueue(nullptr));
    for (const int64_t slots : {3, 64, 256, 1100, 4096, 5000}) {
      Counts& count = counts[slots];
      count.resize(static_cast<size_t>(slots));
      for (const int32_t id : chosen) {
        if (id >= 0 && id < slots) count[static_cast<size_t>(id)]++;
      }
    }
  }

  // Returns the ids.
  std::shared_ptr<Buffer> enqueue(const std::shared_ptr<Buffer>& load) const {
    MoeFusedGate call = p;
    auto task = std::make_shared<Task>();
    task->op = "moe_fused_gate";
    const auto ids = allocate(DType::kI32, p.T * p.K), weights = allocate(DType::kF32, p.T * p.K);
    for (const auto& buffer : {logits, bias, map, load}) {
      if (buffer != nullptr) task->reads.push_back(buffer);
    }
    task->writes = {ids, weights};
    if (load != nullptr) {
      task->writes.push_back(load);
      task->counters = {load.get()};
      call.slots = load->elements;
    }
    call.logits = view(logits), call.bias = view(bias), call.id_map = view(map), call.load = view(load);
    call.ids = view(ids), call.weights = view(weights);
    task->run = [call](Backend& b) { return registered_kernel<MoeFusedGate>(b, call); };
    submit(std::move(task));
    return ids;
  }
};

std::vector<std::unique_ptr<Gate>> gates;

void make_gates(int64_t most_tokens) {
  const auto add = [=](int64_t T, auto... more) {
    if (T <= most_tokens) gates.push_back(std::make_unique<Gate>(T, more...));
  };
  // One row for every kernel that counts, few tokens and many; maps, also onto more slots than experts; and all tokens
  // to the same experts.
  for (const int64_t T : {1, 64, 512, 4096, 12000, 40000}) {
    add(T, 256, 8, 8, 4, Scoring::kSigmoid, true, 0, 0, T);
  }
  add(512, 256, 8, 8, 4, Scoring::kSigmoid, true, 0, 0, 1);
  add(12000, 256, 8, 8, 4, Scoring::kSigmoid, true, 0, 0, 1);
  add(4096, 256, 8, 8, 4, Scoring::kSigmoid, true, 3, 300, 4096);
  add(512, 256, 8, 8, 4, Scoring::kSigmoid, true, 7, 6000, 512);
  add(512, 384, 8, 1, 1, Scoring::kSigmoid, true, 0, 0, 512);
  for (const int64_t T : {64, 4096}) {
    add(T, 128, 8, 1, 1, Scoring::kSoftmax, false, 0, 0, T);
    add(T, 64, 6, 1, 1, Scoring::kSoftmax, false, 0, 0, T);
    add(T, 160, 6, 8, 3, Scoring::kSoftmax, false, 0, 0, T);
    add(T, 8, 2, 1, 1, Scoring::kSoftmax, false, 0, 0, T);
    add(T, 1000, 20, 1, 1, Scoring::kSqrtSoftplus, false, 2, 5000, T);
  }
}

// Loads and captures ----------------------------------------------------------------------------------------------

// A load tensor and what it should hold.
struct Load {
  std::shared_ptr<Buffer> buffer;
  std::shared_ptr<Counts> counts;
};

struct Capture {
  std::shared_ptr<Recording> recording;
  std::vector<std::function<void()>> effects;  // of a replay, on the counts
  std::vector<Load> made;                      // inside
  bool replayed = false;
};

int checked = 0, captures_made = 0, replays = 0;
std::atomic<int> in_flight = 0, wrong = 0;

void compare(const Counts& expected, const int64_t* received, const char* where) {
  for (size_t i = 0; i < expected.size(); i++) {
    if (expected[i] == received[i]) continue;
    if (wrong++ == 0) {
      std::printf("%s: slot %zu of %zu: expected %lld but received %lld\n", where, i, expected.size(),
                  static_cast<long long>(expected[i]), static_cast<long long>(received[i]));
    }
    return;
  }
}

void check(const Load& load, const char* where) {
  compare(*load.counts, read<int64_t>(load.buffer).data(), where);
  checked++;
}

// Compared by the thread that waits, which may then be the last to hold the tensor.
void check_later(const Load& load) {
  const auto host = fetch(load.buffer);
  in_flight++;
  backend->notify([buffer = load.buffer, expected = *load.counts, host](Status status) {
    OK(status);
    compare(expected, reinterpret_cast<const int64_t*>(host.get()), "later");
    in_flight--;
  });
  checked++;
}

// Does what changes the counts now, or at every replay.
void effect(Capture* capture, std::function<void()> change) {
  capture == nullptr ? change() : capture->effects.push_back(std::move(change));
}

void count(const Load& load, Capture* capture, const Gate& gate) {
  gate.enqueue(load.buffer);
  effect(capture, [to = load.counts, &gate] {
    const Counts& more = gate.counts.at(static_cast<int64_t>(to->size()));
    for (size_t i = 0; i < more.size(); i++) (*to)[i] += more[i];
  });
}

void count(const Load& load, Capture* capture) {
  count(load, capture, *gates[static_cast<size_t>(below(gates.size()))]);
}

void write(const Load& load, Capture* capture) {
  Counts values(load.counts->size());
  for (int64_t& value : values) value = static_cast<int64_t>(random_bits() >> 8);
  write(load.buffer, values.data());
  effect(capture, [to = load.counts, values] { *to = values; });
}

void clear(const Load& load, Capture* capture) {
  write(load.buffer, nullptr);
  effect(capture, [to = load.counts] { std::fill(to->begin(), to->end(), 0); });
}

Load make(Capture* capture, int64_t slots = 0) {
  constexpr int64_t kSlots[] = {256, 256, 256, 64, 3, 1100, 4096, 5000};
  if (slots == 0) slots = kSlots[below(8)];
  Load load{allocate(DType::kI64, slots), std::make_shared<Counts>(static_cast<size_t>(slots))};
  clear(load, capture);
  return load;
}

void change(const Load& load, Capture* capture) {
  const int64_t what = below(8);
  if (what == 0) return write(load, capture);
  if (what == 1) return clear(load, capture);
  count(load, capture);
}

// Two tensors counted in beside each other, which may be one tensor after the other.
void overlap(std::vector<Load>& loads, Capture* capture) {
  const size_t one = static_cast<size_t>(below(loads.size())), other = static_cast<size_t>(below(loads.size()));
  OK(backend->take_lane(Backend::Lane::kBeside));
  for (int64_t i = below(3); i >= 0; i--) change(loads[one], capture);
  OK(backend->take_lane(Backend::Lane::kMain));
  if (loads[other].buffer != loads[one].buffer) change(loads[other], capture);
  if (capture == nullptr && below(3) == 0) loads[one] = make(nullptr);  // what it was is given back in a lane
  OK(backend->take_lane(Backend::Lane::kJoin));
}

std::unique_ptr<Capture> record(const std::function<void(Capture*)>& work, bool fails = false) {
  auto capture = std::make_unique<Capture>();
  if (backend->has_graphs()) OK(backend->begin_capture());
  recording = capture->recording = std::make_shared<Recording>();
  recording->number = static_cast<uint64_t>(++captures_made);
  work(capture.get());
  recording = nullptr;
  if (fails) {
    if (backend->has_graphs()) backend->abort_capture();
    return nullptr;
  }
  if (backend->has_graphs()) OK(backend->end_capture(&capture->recording->graph));
  return capture;
}

std::unique_ptr<Capture> record_anything(std::vector<Load>& loads) {
  const auto anything = [&](Capture* capture) {
    for (int64_t i = below(5); i >= 0; i--) {
      const int64_t what = below(10);
      if (what == 0) {
        capture->made.push_back(make(capture));
      } else if (what == 1 && !capture->made.empty()) {
        change(capture->made.back(), capture);
      } else if (what == 2) {
        overlap(loads, capture);
      } else if (what == 3 && loads.size() > 4) {
        loads.pop_back();  // what was recorded with it keeps it
      } else {
        change(loads[static_cast<size_t>(below(loads.size()))], capture);
      }
    }
  };
  return record(anything, below(5) == 0);
}

void replay(Capture& capture) {
  if (capture.recording->graph != nullptr) {
    OK(backend->replay(*capture.recording->graph));
  } else {
    backend->submit([backend = backend.get(), recording = capture.recording] {
      for (const auto& task : recording->tasks) execute(*backend, *task, *faults);
    });
  }
  for (const auto& change : capture.effects) change();
  capture.replayed = true;
  replays++;
}

// Tests -----------------------------------------------------------------------------------------------------------

void anything(int rounds) {
  std::vector<Load> loads;
  for (int i = 0; i < 6; i++) loads.push_back(make(nullptr));
  std::vector<std::unique_ptr<Capture>> captures;
  for (int round = 0; round < rounds && wrong == 0; round++) {
    Load& load = loads[static_cast<size_t>(below(loads.size()))];
    const int64_t what = below(20);
    if (what < 6) {
      change(load, nullptr);
    } else if (what < 9) {
      check(load, "read");
    } else if (what < 11) {
      check_later(load);
      if (below(2) == 0) load = make(nullptr);  // with work in flight
    } else if (what == 11) {
      overlap(loads, nullptr);
    } else if (what == 12) {
      if (auto capture = record_anything(loads); capture != nullptr) captures.push_back(std::move(capture));
    } else if (what < 18 && !captures.empty()) {
      Capture& capture = *captures[static_cast<size_t>(below(captures.size()))];
      for (int64_t i = below(3); i >= 0; i--) replay(capture);
      for (const Load& made : capture.made) {
        if (below(2) == 0) count(made, nullptr);
        check(made, "made in a capture");
      }
    } else if (what == 18 && captures.size() > 3) {
      const auto at = captures.begin() + below(captures.size());
      // Tensors of a capture may outlive it.
      if ((*at)->replayed && !(*at)->made.empty() && below(2) == 0) loads.push_back((*at)->made.back());
      captures.erase(at);
    } else if (loads.size() > 3) {
      load = below(2) == 0 ? make(nullptr) : loads.back();
      if (loads.size() > 8) loads.pop_back();
    }
  }
  for (const Load& load : loads) check(load, "at the end");
}

// What a tensor's counters take goes back with it, however it is held.
void memory_goes_back() {
  const auto used = [] {
    OK(backend->wait());
    return backend->memory().used;
  };
  const size_t before = used();
  for (int turn = 0; turn < 4; turn++) {
    std::unique_ptr<Capture> capture;
    {
      const Load load = make(nullptr, 256);
      if (turn != 2) count(load, nullptr, *gates[1]);
      const auto work = [&](Capture* c) { count(load, c, *gates[1]); };
      if (turn > 0) capture = record(work, turn == 3);
      if (capture != nullptr) replay(*capture);
      check(load, "memory");
      std::printf("a load of 256 slots: %zu bytes more than before%s\n", used() - before,
                  capture == nullptr ? "" : ", captured");
    }
    if (capture != nullptr) replay(*capture);
    capture = nullptr;
    if (used() != before) {
      std::printf("memory: %zu bytes in use, %zu before\n", used(), before);
      wrong++;
    }
  }
}

// With no memory left for counters the tensor is counted in itself, then and later.
void no_memory() {
  std::vector<Load> loads;
  for (int i = 0; i < 4; i++) loads.push_back(make(nullptr, 256));
  count(make(nullptr, 256), nullptr, *gates[1]);  // its outputs' memory is kept for the next ones
  std::vector<std::shared_ptr<Buffer>> hoard;
  for (int64_t bytes = int64_t{8} << 30; bytes >= 65536;) {
    auto buffer = std::make_shared<Buffer>();
    if (!backend->allocate(static_cast<size_t>(bytes), &buffer->data).ok()) {
      bytes /= 2;
      continue;
    }
    buffer->bytes = static_cast<size_t>(bytes), buffer->backend = backend;
    hoard.push_back(std::move(buffer));
  }
  const size_t used = backend->memory().used;
  std::printf("%zu blocks, %.1f GB in use\n", hoard.size(), static_cast<double>(used) * 1e-9);
  const auto work = [&](Capture* c) { count(loads[1], c, *gates[0]); };
  count(loads[0], nullptr, *gates[0]);
  const auto capture = record(work);
  replay(*capture);
  for (const Load& load : loads) check(load, "without memory");
  if (backend->memory().used > used + 65536) std::printf("counters were made\n"), wrong++;
  hoard.clear();
  replay(*capture);
  for (const Load& load : loads) {
    count(load, nullptr, *gates[1]);
    check(load, "with memory again");
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::unique_ptr<Backend> opened;
  OK(create_backend(ContextOptions{}, &opened));
  backend = std::move(opened);
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 5000;
  random_bits.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  make_gates(argc > 3 ? std::atoll(argv[3]) : 40000);
  memory_goes_back();
  if (argc > 4) no_memory();
  anything(rounds);
  OK(backend->wait());
  while (in_flight > 0) std::this_thread::yield();
  gates.clear();
  if (backend->memory().used != 0) std::printf("memory at the end: %zu\n", backend->memory().used), wrong++;
  backend->stop();
  backend = nullptr;
  std::printf("%s: %d reads, %d captures, %d replays\n", wrong == 0 ? "passed" : "FAILED", checked, captures_made,
              replays);
  return wrong == 0 ? 0 : 1;
}
