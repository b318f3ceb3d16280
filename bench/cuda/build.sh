#!/usr/bin/env bash
# Builds the standalone check and timing programs of moe_fused_gate and moe_dispatch. usage: build.sh OUT [gate|dispatch]...
# Needs nvcc 13 and g++; the programs need only a driver.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$1
shift
mkdir -p "$out/objects"
cpu="$root/csrc/cpu"
for source in "$cpu"/*.cc "$root"/csrc/common/*.cc; do
  object="$out/objects/$(basename "$source" .cc).cpu.o"
  [ "$object" -nt "$source" ] && [ "$object" -nt "$root/csrc/backend.h" ] || g++ -std=c++20 -O3 -c "$source" -o "$object"
done
flags=(-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -lineinfo)
[ $# -gt 0 ] || set -- gate dispatch
for what in "$@"; do
  kernels="$root/csrc/cuda/moe_dispatch_launch.cu"
  [ "$what" = gate ] && kernels="$root/csrc/cuda/moe_fused_gate_launch.cu"
  object="$out/objects/$what.o"
  if [ ! "$object" -nt "$kernels" ] || [ -n "$(find "$root/csrc/cuda" -name "moe_*.cuh" -newer "$object")" ]; then
    nvcc "${flags[@]}" -Xptxas -v -c "$kernels" -o "$object" 2> "$out/objects/$what.ptxas"
  fi
  nvcc "${flags[@]}" -cudart static -Xcompiler -pthread -o "$out/${what}_bench" "$root/bench/cuda/${what}_bench.cu" "$object" \
    "$out"/objects/*.cpu.o -Xcompiler -static-libstdc++ -Xcompiler -static-libgcc
done
