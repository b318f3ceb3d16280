// Hopper's own instructions, for kernels in *_sm90a.cu: barriers in shared memory, the copy engine, matrix products of
// a warpgroup.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moe::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Barriers: 8 bytes of shared memory, initialised by one thread, then fence_barrier_init() and a __syncthreads
// ------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// For what this thread has read or written itself. After __syncwarp one lane could arrive for its warp, but racecheck
// of compute-sanitizer reports what the others did as a race, so where it looks every lane arrives.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for `bytes` of the copy engine besides.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra leave;\n"
      "bra again;\n"
      "leave:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Threads of this block that meet at barrier `id` (1 .. 15).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Makes this thread's ordinary writes visible to the copy engine and the tensor cores (shared memory), or its view of
// others' global writes to the copies that it starts (all memory).
__device__ __forceinline__ void fence_proxy_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// True in one lane of a warp whose lanes are all here. What one lane does behind this the compiler knows to be done by
// one, unlike behind a comparison of threadIdx.
__device__ __forceinline__ bool elected() {
  uint32_t one;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.b32 %0, 1, 0, one;\n}\n" : "=r"(one));
  return one != 0;
}

// As threadIdx.x % 32 of a block with one dimension, but of a register that the compiler reads anew instead of
// spilling.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The copy engine
// ---------------------------------------------------------------------------------------------------------

// `bytes` (a multiple of 16, both addresses too) from global to shared memory; counts towards `barrier`.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// The same with a hint for the L2 cache (createpolicy), for what is read once.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// 16 bytes by an ordinary asynchronous copy, or zeros where there is nothing to load.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// 16 bytes, or nothing at all.
__device__ __forceinline__ void copy_async_if(bool wanted, uint32_t to, const void* from) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %2, 0;\n@wanted cp.async.cg.shared.global [%0], [%1], 16;\n}\n" ::"r"(
          to),
      "l"(from), "r"(static_cast<int32_t>(wanted))
      : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
// `bytes` (a multiple of 16, the address too) into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// The 128 bytes around `from`, into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Arrives at `barrier` once the copies that this thread has started so far are done; the barrier counts this arrival
// like any other. Who reads what was copied through the tensor cores needs fence_proxy_shared() after waiting.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Registers
// ---------------------------------------------------------------------------------------------------------------

template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Other blocks' memory: a release of everything written before, and its acquire.
__device__ __forceinline__ void add_release(int32_t* counter, int32_t n) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(n) : "memory");
}
__device__ __forceinline__ int32_t add_acquire_release(int32_t* counter, int32_t n) {
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(n) : "memory");
  return before;
}
__device__ __forceinline__ void add_relaxed(int32_t* counter, int32_t n) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(n) : "memory");
}
__device__ __forceinline__ int32_t load_relaxed(const int32_t* counter) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// Words each by itself: one may be there and the next not.
__device__ __forceinline__ uint2 load_relaxed2(const uint32_t* words) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(words) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_relaxed4(const uint32_t* words) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(words)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint32_t* words, uint32_t first, uint32_t second) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(words), "r"(first), "r"(second) : "memory");
}
__device__ __forceinline__ int32_t load_acquire(const int32_t* counter) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Products of a warpgroup
// -----------------------------------------------------------------------------------------------

// Describes a matrix in shared memory whose rows are 128 bytes (64 elements of the inner dimension) apart, swizzled by
// 128 bytes, in groups of 8 rows of 1024 bytes that are aligned to 1024 bytes. For the k-th 16 elements add 2k.
__device__ __forceinline__ uint64_t describe(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroup = uint64_t{1024 >> 4} << 32, kLeading = uint64_t{1} << 16;
  return kSwizzle128 | kGroup | kLeading | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
// Keeps what reads `sum` behind the wait before it.
template <int N>
__device__ __forceinline__ void product_done(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(sum[i])::"memory");
}

// 16 bytes of shared memory.
__device__ __forceinline__ int4 load_shared(uint32_t address) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, int4 v) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ int32_t load_shared_word(uint32_t address) {
  int32_t v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, int32_t v) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// Matrices of 8 x 8 elements of 16 bits, transposed on the way: lane l holds elements (l / 4, 2 (l % 4)) and the next
// of each; column c of matrix m goes to the 16 bytes at the address of lane 8m + c.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// sum [64 x N] (+)= a [64 x 16] b^T [N x 16]. Thread t of the warpgroup holds, in sum[4j + 2h + l], row 16 (t / 32) +
// 8h + t % 32 / 4 and column 8j + 2 (t % 4) + l. `add`: whether the sum so far counts.
template <int N, class T>
__device__ __forceinline__ void product(float (&sum)[N / 2], uint64_t a, uint64_t b, bool add);

// Registers of a sum by fours: their numbers in the text of the instruction, and the operands.
#define MOE_LIST_4 "%0,%1,%2,%3"
#define MOE_SUM_4 "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
#define MOE_LIST_8 \
  MOE_LIST_4       \
      ","          \
      "%4,%5,%6,%7"
#define MOE_SUM_8 MOE_SUM_4, "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]), "+f"(sum[7])
#define MOE_LIST_12 \
  MOE_LIST_8        \
      ","           \
      "%8,%9,%10,%11"
#define MOE_SUM_12 MOE_SUM_8, "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11])
#define MOE_LIST_16 \
  MOE_LIST_12       \
      ","           \
      "%12,%13,%14,%15"
#define MOE_SUM_16 MOE_SUM_12, "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15])
#define MOE_LIST_20 \
  MOE_LIST_16       \
      ","           \
      "%16,%17,%18,%19"
#define MOE_SUM_20 MOE_SUM_16, "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19])
#define MOE_LIST_24 \
  MOE_LIST_20       \
      ","           \
      "%20,%21,%22,%23"
#define MOE_SUM_24 MOE_SUM_20, "+f"(sum[20]), "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23])
#define MOE_LIST_28 \
  MOE_LIST_24       \
      ","           \
      "%24,%25,%26,%27"
#define MOE_SUM_28 MOE_SUM_24, "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27])
#define MOE_LIST_32 \
  MOE_LIST_28       \
      ","           \
      "%28,%29,%30,%31"
#define MOE_SUM_32 MOE_SUM_28, "+f"(sum[28]), "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31])
#define MOE_LIST_36 \
  MOE_LIST_32       \
      ","           \
      "%32,%33,%34,%35"
#define MOE_SUM_36 MOE_SUM_32, "+f"(sum[32]), "+f"(sum[33]), "+f"(sum[34]), "+f"(sum[35])
#define MOE_LIST_40 \
  MOE_LIST_36       \
      ","           \
      "%36,%37,%38,%39"
#define MOE_SUM_40 MOE_SUM_36, "+f"(sum[36]), "+f"(sum[37]), "+f"(sum[38]), "+f"(sum[39])
#define MOE_LIST_44 \
  MOE_LIST_40       \
      ","           \
      "%40,%41,%42,%43"
#define MOE_SUM_44 MOE_SUM_40, "+f"(sum[40]), "+f"(sum[41]), "+f"(sum[42]), "+f"(sum[43])
#define MOE_LIST_48 \
  MOE_LIST_44       \
      ","           \
      "%44,%45,%46,%47"
#define MOE_SUM_48 MOE_SUM_44, "+f"(sum[44]), "+f"(sum[45]), "+f"(sum[46]), "+f"(sum[47])
#define MOE_LIST_52 \
  MOE_LIST_48       \
      ","           \
      "%48,%49,%50,%51"
#define MOE_SUM_52 MOE_SUM_48, "+f"(sum[48]), "+f"(sum[49]), "+f"(sum[50]), "+f"(sum[51])
#define MOE_LIST_56 \
  MOE_LIST_52       \
      ","           \
      "%52,%53,%54,%55"
#define MOE_SUM_56 MOE_SUM_52, "+f"(sum[52]), "+f"(sum[53]), "+f"(sum[54]), "+f"(sum[55])
#define MOE_LIST_60 \
  MOE_LIST_56       \
      ","           \
      "%56,%57,%58,%59"
#define MOE_SUM_60 MOE_SUM_56, "+f"(sum[56]), "+f"(sum[57]), "+f"(sum[58]), "+f"(sum[59])
#define MOE_LIST_64 \
  MOE_LIST_60       \
      ","           \
      "%60,%61,%62,%63"
#define MOE_SUM_64 MOE_SUM_60, "+f"(sum[60]), "+f"(sum[61]), "+f"(sum[62]), "+f"(sum[63])
#define MOE_LIST_68 \
  MOE_LIST_64       \
      ","           \
      "%64,%65,%66,%67"
#define MOE_SUM_68 MOE_SUM_64, "+f"(sum[64]), "+f"(sum[65]), "+f"(sum[66]), "+f"(sum[67])
#define MOE_LIST_72 \
  MOE_LIST_68       \
      ","           \
      "%68,%69,%70,%71"
#define MOE_SUM_72 MOE_SUM_68, "+f"(sum[68]), "+f"(sum[69]), "+f"(sum[70]), "+f"(sum[71])
#define MOE_LIST_76 \
  MOE_LIST_72       \
      ","           \
      "%72,%73,%74,%75"
#define MOE_SUM_76 MOE_SUM_72, "+f"(sum[72]), "+f"(sum[73]), "+f"(sum[74]), "+f"(sum[75])
#define MOE_LIST_80 \
  MOE_LIST_76       \
      ","           \
      "%76,%77,%78,%79"
#define MOE_SUM_80 MOE_SUM_76, "+f"(sum[76]), "+f"(sum[77]), "+f"(sum[78]), "+f"(sum[79])
#define MOE_LIST_84 \
  MOE_LIST_80       \
      ","           \
      "%80,%81,%82,%83"
#define MOE_SUM_84 MOE_SUM_80, "+f"(sum[80]), "+f"(sum[81]), "+f"(sum[82]), "+f"(sum[83])
#define MOE_LIST_88 \
  MOE_LIST_84       \
      ","           \
      "%84,%85,%86,%87"
#define MOE_SUM_88 MOE_SUM_84, "+f"(sum[84]), "+f"(sum[85]), "+f"(sum[86]), "+f"(sum[87])
#define MOE_LIST_92 \
  MOE_LIST_88       \
      ","           \
      "%88,%89,%90,%91"
#define MOE_SUM_92 MOE_SUM_88, "+f"(sum[88]), "+f"(sum[89]), "+f"(sum[90]), "+f"(sum[91])
#define MOE_LIST_96 \
  MOE_LIST_92       \
      ","           \
      "%92,%93,%94,%95"
#define MOE_SUM_96 MOE_SUM_92, "+f"(sum[92]), "+f"(sum[93]), "+f"(sum[94]), "+f"(sum[95])
#define MOE_LIST_100 \
  MOE_LIST_96        \
      ","            \
      "%96,%97,%98,%99"
#define MOE_SUM_100 MOE_SUM_96, "+f"(sum[96]), "+f"(sum[97]), "+f"(sum[98]), "+f"(sum[99])
#define MOE_LIST_104 \
  MOE_LIST_100       \
      ","            \
      "%100,%101,%102,%103"
#define MOE_SUM_104 MOE_SUM_100, "+f"(sum[100]), "+f"(sum[101]), "+f"(sum[102]), "+f"(sum[103])
#define MOE_LIST_108 \
  MOE_LIST_104       \
      ","            \
      "%104,%105,%106,%107"
#define MOE_SUM_108 MOE_SUM_104, "+f"(sum[104]), "+f"(sum[105]), "+f"(sum[106]), "+f"(sum[107])
#define MOE_LIST_112 \
  MOE_LIST_108       \
      ","            \
      "%108,%109,%110,%111"
#define MOE_SUM_112 MOE_SUM_108, "+f"(sum[108]), "+f"(sum[109]), "+f"(sum[110]), "+f"(sum[111])
#define MOE_LIST_116 \
  MOE_LIST_112       \
      ","            \
      "%112,%113,%114,%115"
#define MOE_SUM_116 MOE_SUM_112, "+f"(sum[112]), "+f"(sum[113]), "+f"(sum[114]), "+f"(sum[115])
#define MOE_LIST_120 \
  MOE_LIST_116       \
      ","            \
      "%116,%117,%118,%119"
#define MOE_SUM_120 MOE_SUM_116, "+f"(sum[116]), "+f"(sum[117]), "+f"(sum[118]), "+f"(sum[119])
#define MOE_LIST_124 \
  MOE_LIST_120       \
      ","            \
      "%120,%121,%122,%123"
#define MOE_SUM_124 MOE_SUM_120, "+f"(sum[120]), "+f"(sum[121]), "+f"(sum[122]), "+f"(sum[123])
#define MOE_LIST_128 \
  MOE_LIST_124       \
      ","            \
      "%124,%125,%126,%127"
#define MOE_SUM_128 MOE_SUM_124, "+f"(sum[124]), "+f"(sum[125]), "+f"(sum[126]), "+f"(sum[127])

#define MOE_PRODUCT(N, REGISTERS, A, B, ADD, T, NAME)                                                      \
  template <>                                                                                              \
  __device__ __forceinline__ void product<N, T>(float (&sum)[N / 2], uint64_t a, uint64_t b, bool add) {   \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD                                             \
                 ", 0;\n"                                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" MOE_LIST_##REGISTERS \
                 "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n}\n"                                              \
                 : MOE_SUM_##REGISTERS                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int32_t>(add)));                                        \
  }
#define MOE_PRODUCTS(N, REGISTERS, A, B, ADD)                 \
  MOE_PRODUCT(N, REGISTERS, A, B, ADD, __nv_bfloat16, "bf16") \
  MOE_PRODUCT(N, REGISTERS, A, B, ADD, __half, "f16")
MOE_PRODUCTS(8, 4, 4, 5, 6)
MOE_PRODUCTS(16, 8, 8, 9, 10)
MOE_PRODUCTS(24, 12, 12, 13, 14)
MOE_PRODUCTS(32, 16, 16, 17, 18)
MOE_PRODUCTS(40, 20, 20, 21, 22)
MOE_PRODUCTS(48, 24, 24, 25, 26)
MOE_PRODUCTS(56, 28, 28, 29, 30)
MOE_PRODUCTS(64, 32, 32, 33, 34)
MOE_PRODUCTS(80, 40, 40, 41, 42)
MOE_PRODUCTS(96, 48, 48, 49, 50)
MOE_PRODUCTS(112, 56, 56, 57, 58)
MOE_PRODUCTS(128, 64, 64, 65, 66)
MOE_PRODUCTS(144, 72, 72, 73, 74)
MOE_PRODUCTS(160, 80, 80, 81, 82)
MOE_PRODUCTS(176, 88, 88, 89, 90)
MOE_PRODUCTS(192, 96, 96, 97, 98)
MOE_PRODUCTS(208, 104, 104, 105, 106)
MOE_PRODUCTS(224, 112, 112, 113, 114)
MOE_PRODUCTS(240, 120, 120, 121, 122)
MOE_PRODUCTS(256, 128, 128, 129, 130)
#undef MOE_PRODUCTS
#undef MOE_PRODUCT

}  // namespace moe::hopper
