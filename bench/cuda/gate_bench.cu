// Checks the CUDA moe_fused_gate against the CPU kernel, and times it. NOTES.md says how.
//   gate_bench check|sanitize [dry | beginning of a case's name]
//   gate_bench time|steady [dry | beginning of a case's name [tokens,tokens...]]
//   gate_bench profile [tokens [lanes [f32 | bf16 [map | load]]]]
#include <memory>
#include <sstream>

#include "gate_check.cuh"
#include "gate_time.cuh"

using namespace bench;

int main(int argc, char** argv) {
  const auto word = [&](int i, const char* otherwise) { return std::string(argc > i ? argv[i] : otherwise); };
  const std::string mode = word(1, "check");
  if (mode == "profile") {
    run_profile(std::stoll(word(2, "40000")), std::stoi(word(3, "0")), word(4, "bf16") == "f32", word(5, ""));
    return 0;
  }
  dry = word(2, "") == "dry";
  const std::string filter = dry ? "" : word(2, "");
  if (mode == "time" || mode == "steady") {
    std::vector<int64_t> tokens;
    std::istringstream list(word(3, ""));
    for (std::string number; std::getline(list, number, ',');) tokens.push_back(std::stoll(number));
    run_times(filter, tokens, mode == "steady");
    return 0;
  }
  std::unique_ptr<Backend> cpu;
  const Status status = create_backend(ContextOptions{}, &cpu);
  if (!status.ok()) {
    std::printf("%s\n", status.text.c_str());
    return 1;
  }
  return run_checks(*cpu, filter, mode == "sanitize") > 0;
}
