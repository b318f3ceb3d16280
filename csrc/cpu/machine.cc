#include "machine.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

#include "compiler.h"
#include "x86.h"

#if defined(_WIN32)
#if !defined(NOMINMAX)
#define NOMINMAX
#endif
#include <windows.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#include <unistd.h>
#else
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace moe {

namespace {

#if defined(__linux__)
// The first line of a small file that starts with `key`, without it; false where there is none.
bool read_line(const char* path, const char* key, char* out, size_t size) {
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return false;
  const size_t length = std::strlen(key);
  bool found = false;
  char line[512];
  while (!found && std::fgets(line, sizeof line, file) != nullptr) {
    if (std::strncmp(line, key, length) != 0) continue;
    line[std::strcspn(line, "\n")] = '\0';
    std::snprintf(out, size, "%s", line + length);
    found = true;
  }
  std::fclose(file);
  return found;
}

// A number at the start of such a line, in units of `unit` bytes.
bool read_bytes(const char* path, const char* key, size_t unit, size_t* out) {
  char text[512];
  if (!read_line(path, key, text, sizeof text)) return false;
  char* end = nullptr;
  const unsigned long long value = std::strtoull(text, &end, 10);
  if (end == text) return false;  // "max"
  *out = value > std::numeric_limits<size_t>::max() / unit ? std::numeric_limits<size_t>::max()
                                                           : static_cast<size_t>(value) * unit;
  return true;
}

constexpr char kMemoryLimit[] = "/sys/fs/cgroup/memory.max";
constexpr char kMemoryLimitV1[] = "/sys/fs/cgroup/memory/memory.limit_in_bytes";
#endif

}  // namespace

int usable_threads() {
  int threads = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) threads = CPU_COUNT(&set);
  char text[512];
  if (read_line("/sys/fs/cgroup/cpu.max", "", text, sizeof text)) {
    char* end = nullptr;
    const double quota = std::strtod(text, &end);
    const double period = end == text ? 0 : std::strtod(end, nullptr);
    // More threads than the quota would all be stopped together for the rest of each period.
    if (quota > 0 && period > 0) threads = std::min(threads, static_cast<int>(quota / period + 0.999));
  }
#endif
  return std::max(threads, 1);
}

size_t physical_memory() {
  static const size_t bytes = [] {
    size_t total = 0;
#if defined(_WIN32)
    MEMORYSTATUSEX status{};
    status.dwLength = sizeof status;
    if (GlobalMemoryStatusEx(&status)) total = static_cast<size_t>(status.ullTotalPhys);
#elif defined(__APPLE__)
    uint64_t value = 0;
    size_t size = sizeof value;
    if (sysctlbyname("hw.memsize", &value, &size, nullptr, 0) == 0) total = static_cast<size_t>(value);
#else
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    if (pages > 0 && page > 0) total = static_cast<size_t>(pages) * static_cast<size_t>(page);
#if defined(__linux__)
    size_t limit = 0;
    if ((read_bytes(kMemoryLimit, "", 1, &limit) || read_bytes(kMemoryLimitV1, "", 1, &limit)) && limit > 0) {
      total = total == 0 ? limit : std::min(total, limit);
    }
#endif
#endif
    return total == 0 ? std::numeric_limits<size_t>::max() / 2 : total;
  }();
  return bytes;
}

size_t available_memory() {
#if defined(_WIN32)
  MEMORYSTATUSEX status{};
  status.dwLength = sizeof status;
  if (GlobalMemoryStatusEx(&status)) return static_cast<size_t>(status.ullAvailPageFile);
#elif defined(__linux__)
  size_t available = 0, swap = 0, limit = 0, used = 0, cache = 0;
  if (read_bytes("/proc/meminfo", "MemAvailable:", 1024, &available)) {
    if (read_bytes("/proc/meminfo", "SwapFree:", 1024, &swap)) available += swap;
    if (read_bytes(kMemoryLimit, "", 1, &limit) && read_bytes("/sys/fs/cgroup/memory.current", "", 1, &used)) {
      // File pages are counted as used by the cgroup and given back when memory is short.
      if (read_bytes("/sys/fs/cgroup/memory.stat", "inactive_file ", 1, &cache)) used -= std::min(used, cache);
      available = std::min(available, limit - std::min(limit, used));
    }
    return available;
  }
#endif
  return physical_memory();
}

void want_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  madvise(data, bytes, MADV_HUGEPAGE);  // no matter if it is refused
#endif
}

std::string cpu_name() {
#if defined(MOE_X86)
  return x86_name();
#else
#if defined(__APPLE__)
  char text[256];
  size_t size = sizeof text;
  if (sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) == 0) return text;
#endif
#if defined(MOE_ARM)
  return "ARM64 processor";
#else
  return "processor";
#endif
#endif
}

std::string cpu_features() {
#if defined(MOE_X86)
  return x86_features();
#elif defined(MOE_ARM)
  return "neon";
#else
  return {};
#endif
}

}  // namespace moe
