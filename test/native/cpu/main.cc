// The CPU backend without Node: what kernels run on, and every kernel of every instruction set against plain loops in
// double. Small shapes, odd sizes, NaN rows; meant to run under the sanitizers (run.sh).
#include <cstdio>

#include "testing.h"

int main() {
  using namespace moe::testing;
  test_handles();
  test_faults();
  test_pool();
  test_queue();
  test_allocator();
  for (const moe::Kernels* each : moe::usable_kernels()) {
    std::printf("-- %s\n", each->name);
    kernels = each;
    test_conversions();
    test_gate_steps();
    test_gate_golden();
    test_gate_special();
    test_gate_mapping();
    test_gate_random();
    test_gate_grouped();
    test_router();
    test_dispatch();
    test_layers();
    test_shared();
    test_pieces();
    test_pack();
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
