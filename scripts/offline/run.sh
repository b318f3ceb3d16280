#!/usr/bin/env bash
# Runs moe-kernels' GPU suites on a host with an NVIDIA driver but no node and no network. Needs bash, tar and xz.
#
#   ./run.sh                   everything below, one after the other; results as JSON and logs in $RESULTS
#   ./run.sh doctor            what the machine offers
#   ./run.sh test [pattern]    the op, grid, contract, misuse, state, process and CUDA suites on the cuda backend
#   ./run.sh test-ptx [pattern]  the same on the PTX of the addon, which the driver compiles: what a GPU newer than the
#                              addon would run. Compiling takes minutes and comes first
#   ./run.sh test-paths        the expert ops and layers again on each way CUDA has to compute experts
#   ./run.sh bench [table...]  ops through the package, beside floors, PyTorch and recorded peers
#   ./run.sh sanitize          compute-sanitizer (where installed) over a reduced grid: memcheck, racecheck, initcheck, synccheck
#   ./run.sh node ...          the node inside, in the package's folder
#
# TARGET (default: a temporary folder) is where it unpacks; RESULTS (default: ./moe-kernels-results) gets the results.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${TARGET:-$(mktemp -d)}
results=${RESULTS:-$PWD/moe-kernels-results}
mkdir -p "$target" "$results"
results=$(cd "$results" && pwd)
if [ ! -e "$target/.unpacked" ]; then
  mkdir -p "$target/bin"
  xz -dc "$here/node.xz" > "$target/bin/node" && chmod +x "$target/bin/node" || exit 1
  for part in node_modules app; do
    xz -dc "$here/$part.tar.xz" | tar x -C "$target" --no-same-owner || exit 1
  done
  touch "$target/.unpacked"
fi
cd "$target"
export PATH="$target/bin:$PATH" CI=1 NO_COLOR=1
vitest=(node node_modules/vitest/vitest.mjs run)
failed=0

step() { # name, command...
  local name=$1 begun=$SECONDS status=0
  shift
  "$@" > "$results/$name.log" 2>&1 || status=$?
  echo "== $name: $([ $status = 0 ] && echo ok || echo "FAILED ($status)"), $((SECONDS - begun)) s; $results/$name.log"
  [ $status = 0 ] || { failed=1; grep -E '(FAIL|Error|expected|✗|×)' "$results/$name.log" | head -${SHOWN:-40}; }
  return $status
}

doctor() { node dist/lib/cli/main.js doctor; }

kind=tests
run_tests() {
  local pattern=(test/cuda test/ops test/grid test/contract/ test/misuse test/states test/fuzz test/process/life test/process/leaks)
  [ ! -e test/fixtures/hf ] || pattern+=(test/model/layer test/model/families)
  local status=0 files=("$results/$kind.json")
  export MOE_KERNELS_TEST_BACKENDS=cuda
  if [ $# -gt 0 ]; then
    "${vitest[@]}" "$@" || status=$?
    cp out/test-results.json "$results/$kind.json"
  else
    # One file fills the device, so that others beside it would run out of memory.
    local alone=test/cuda/memory.test.ts
    "${vitest[@]}" "${pattern[@]}" --exclude "$alone" || status=$?
    cp out/test-results.json "$results/$kind.json"
    "${vitest[@]}" "$alone" || status=$?
    cp out/test-results.json "$results/$kind-memory.json"
    files+=("$results/$kind-memory.json")
  fi
  node scripts/offline/summary.mjs "$results/$kind-summary.json" "${files[@]}"
  return $status
}

# CUDA_FORCE_PTX_JIT is the driver's own: machine code in the addon is left aside. Every op runs once before the suites,
# so that these find all kernels in the driver's cache instead of compiling them in every process.
run_tests_ptx() {
  export CUDA_FORCE_PTX_JIT=1 CUDA_CACHE_PATH="$target/ptx-cache" CUDA_CACHE_MAXSIZE=4294967296
  kind=tests-ptx
  vitest+=(--testTimeout=600000 --hookTimeout=600000)
  local status=0
  step compile-ptx node scripts/offline/sanitized.mjs || status=1
  run_tests "$@" || status=1
  return $status
}

# MOE_KERNELS_CUDA_EXPERTS takes the named path wherever it can run.
run_tests_paths() {
  local path status=0
  for path in plain mma wgmma stream; do
    kind=tests-$path
    MOE_KERNELS_CUDA_EXPERTS=$path run_tests test/ops/fused_moe test/ops/moe_experts test/ops/shared_experts \
      test/contract/overlap test/model/families || status=1
  done
  return $status
}

bench_ops() { node --expose-gc dist/bench/device.js "$@" --json "$results/ops.json"; }

sanitize() {
  command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer on this machine"; return 0; }
  local tool process status=0 running=()
  # Side by side: each is a process of its own, and one after the other they take minutes. Barriers are per block: left
  # to itself the tool counts the places in the code that initialise them, too few, and then the device fails.
  for tool in memcheck racecheck initcheck synccheck; do
    step "sanitize-$tool" compute-sanitizer --tool "$tool" --num-cuda-barriers 1024 --error-exitcode 9 \
      --print-limit 20 node scripts/offline/sanitized.mjs &
    running+=($!)
  done
  for process in "${running[@]}"; do wait "$process" || status=1; done
  return $status
}

case ${1:-all} in
  doctor) doctor ;;
  test) shift; run_tests "$@"; failed=$? ;;
  test-ptx) shift; run_tests_ptx "$@"; failed=$? ;;
  test-paths) run_tests_paths; failed=$? ;;
  bench) shift; bench_ops "$@"; failed=$? ;;
  sanitize) sanitize; failed=$? ;;
  node) shift; node "$@"; failed=$? ;;
  all)
    doctor
    step tests run_tests
    grep -E '^ *(Test Files|Tests) ' "$results/tests.log"
    step bench-ops bench_ops && cat "$results/bench-ops.log"
    for program in out/bench-cuda/*_bench; do
      [ -x "$program" ] || continue
      name=$(basename "$program")
      step "$name-check" "$program" check
      step "$name-time" "$program" time && cat "$results/$name-time.log"
    done
    sanitize
    ;;
  *) sed -n "2,15p" "$here/run.sh" ; exit 2 ;;
esac
exit $failed
