// What this machine offers: processors, memory, names. Limits of the container count where there are any. The only file
// of this folder that knows operating systems; compiler.h knows compilers.
#pragma once
#include <cstddef>
#include <string>

namespace moe {

// Threads that can run at once, at least 1: the affinity mask, cut by a cgroup's CPU quota.
int usable_threads();

// Bytes of memory that this process could ever have; never 0.
size_t physical_memory();

// Bytes that could be had now without being killed for it, swap included; physical_memory() where nobody knows.
size_t available_memory();

// Asks for large pages in a block that nobody has touched, where a program may ask.
void want_large_pages(void* data, size_t bytes);

std::string cpu_name();

// Vector extensions of the processor, e.g. "sse4.2 avx avx2 fma"; empty where it cannot be asked.
std::string cpu_features();

}  // namespace moe
