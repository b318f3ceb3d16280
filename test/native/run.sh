#!/bin/sh
# The C++ tests: the choice of CUDA paths and the cutting of their work, then the CPU backend under the sanitizers:
# memory and undefined behaviour, then data races.
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
  ${CXX:-g++} -std=c++20 -O2 -g -Wall -Wextra -Wpedantic -fsanitize=$sanitizers -fno-sanitize-recover=all \
    test/native/cpu/*.cc csrc/common/*.cc csrc/cpu/*.cc -o "$out/cpu_test" -pthread
  "$out/cpu_test"
done
