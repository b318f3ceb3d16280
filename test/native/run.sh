#!/bin/sh
# The C++ tests: the choice of CUDA paths and the cutting of their work, then the CPU backend under the sanitizers:
# memory and undefined behaviour, then data races. load_counting_test is for the CUDA backend too: bench/cuda/build.sh.
set -e
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
${CXX:-g++} -std=c++20 -O1 -Wall -Wextra -Wpedantic test/native/expert_paths_test.cc csrc/cuda/expert_paths.cc \
  -o "$out/expert_paths_test"
"$out/expert_paths_test"
${CXX:-g++} -std=c++20 -O1 -Wall -Wextra -Wpedantic test/native/expert_items_test.cc -o "$out/expert_items_test"
"$out/expert_items_test"
for sanitizers in address,undefined thread; do
  echo "== -fsanitize=$sanitizers"
  flags="-std=c++20 -O2 -g -Wall -Wextra -Wpedantic -fsanitize=$sanitizers -fno-sanitize-recover=all -pthread"
  for source in csrc/common/*.cc csrc/cpu/*.cc; do
    ${CXX:-g++} $flags -c "$source" -o "$out/$(basename "$source").o"
  done
  ${CXX:-g++} $flags test/native/cpu/*.cc "$out"/*.o -o "$out/cpu_test"
  "$out/cpu_test"
  ${CXX:-g++} $flags test/native/load_counting_test.cc "$out"/*.o -o "$out/load_counting_test"
  "$out/load_counting_test" 500 1 600
done
