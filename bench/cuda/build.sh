#!/usr/bin/env bash
# Builds the standalone check and timing programs of the CUDA kernels.
# usage: build.sh OUT [gate|dispatch|pair|experts|load]..., where load is test/native/load_counting_test.cc.
# Needs nvcc 13 and g++; the programs need only a driver.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$1
shift
mkdir -p "$out/objects"
cpu="$root/csrc/cpu"
cpu_objects=()
for source in "$cpu"/*.cc "$root"/csrc/common/*.cc; do
  object="$out/objects/$(basename "$source" .cc).cpu.o"
  cpu_objects+=("$object")
  [ "$object" -nt "$source" ] && [ "$object" -nt "$root/csrc/backend.h" ] || g++ -std=c++20 -O3 -c "$source" -o "$object"
done
flags=(-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -lineinfo)
[ $# -gt 0 ] || set -- gate dispatch pair experts load
# A program that goes through the backend itself: its name, its source, and those of the ops it calls.
through_backend() {
  local name=$1 objects=() source object arch
  shift
  for source in "$root"/csrc/cuda/{backend,memory}.cc "$root/csrc/cuda/load_counters.cu" "$@"; do
    object="$out/objects/$(basename "$source").backend.o"
    objects+=("$object")
    arch=90
    [[ $source == *_sm90a.cu ]] && arch=90a
    local but=()
    [[ $source == *_sm90a.cu ]] || but=(-not -name "*_sm90a.cuh")
    [ "$object" -nt "$source" ] && [ -z "$(find "$root/csrc" "$root/bench/cuda" \( -name "*.h" -o -name "*.cuh" \) "${but[@]}" -newer "$object")" ] && continue
    echo "$(basename "$source")"
    nvcc -std=c++20 -O3 --compress-mode=size --expt-relaxed-constexpr "-gencode=arch=compute_$arch,code=sm_$arch" -Xptxas -v -c "$source" -o "$object" \
      2> "$object.ptxas" || { cat "$object.ptxas"; exit 1; }
  done
  nvcc -cudart static -Xcompiler -pthread -o "$out/$name" "${objects[@]}" \
    -Xcompiler -static-libstdc++ -Xcompiler -static-libgcc
}
# The object file of one source of kernels.
kernels() {
  local source="$root/csrc/cuda/$1.cu" object="$out/objects/$1.o"
  if [ ! "$object" -nt "$source" ] || [ -n "$(find "$root/csrc/cuda" \( -name "moe_*.cuh" -o -name hopper.cuh -o -name launch_early.cuh -o -name programmatic.cuh \) -newer "$object")" ]; then
    nvcc "${flags[@]}" -Xptxas -v -c "$source" -o "$object" 2> "$object.ptxas" || { cat "$object.ptxas" >&2; return 1; }
  fi
  echo "$object"
}
for what in "$@"; do
  case $what in
    experts)
      through_backend experts_bench "$root/bench/cuda/experts_bench.cu" "$root"/csrc/cuda/expert_*.{cc,cu} \
        "$root"/csrc/cuda/{moe_dispatch,moe_dispatch_launch,moe_combine,moe_experts}.cu \
        "$root"/csrc/cuda/{fused_moe,shared_experts,pack_experts}.cu
      continue ;;
    load)
      through_backend load_counting_test "$root/test/native/load_counting_test.cc" "$root"/csrc/cuda/moe_fused_gate*.cu
      continue ;;
    gate) objects=("$(kernels moe_fused_gate_launch)" "$(kernels moe_fused_gate_groups)") ;;
    dispatch) objects=("$(kernels moe_dispatch_launch)") ;;
    pair) objects=("$(kernels moe_fused_gate_launch)" "$(kernels moe_fused_gate_groups)" "$(kernels moe_dispatch_launch)") ;;
  esac
  nvcc "${flags[@]}" -cudart static -Xcompiler -pthread -o "$out/${what}_bench" "$root/bench/cuda/${what}_bench.cu" \
    "${objects[@]}" "${cpu_objects[@]}" -Xcompiler -static-libstdc++ -Xcompiler -static-libgcc
done
