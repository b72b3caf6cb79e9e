// What the CUDA kernels of this folder share: names for the PTX that they use, and the activations.
//
// Everything that is not plain C++ goes through the functions of this file and of wgmma.cuh, so that
// a host compiler can run the same kernels with other definitions of them (tests/cuda_host).
#pragma once

#ifdef CUDA_ON_HOST
#include "host.h"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__
#define GRID_CONSTANT __grid_constant__
// The block's dynamic shared memory; 1024 bytes are what swizzled tiles are aligned to.
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) u8 name[]

// A tensor of up to five dimensions as the tensor memory accelerator sees it (cuTensorMapEncodeTiled).
struct alignas(64) TensorMap {
    u64 words[16];
};

// --- Launches that overlap ---

// Everything that earlier launches wrote is there after this (griddepcontrol.wait).
DEVICE void wait_for_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next launch may start; it still waits for the end of this one where it says so.
DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// --- Barriers in shared memory ---

DEVICE u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

DEVICE void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After barrier_init, before a __syncthreads and the first copy.
DEVICE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barrier_arrive(u64* barrier, int times) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(times) : "memory");
}
// One arrival, and so many bytes of copies to wait for besides.
DEVICE void barrier_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Also where threads of another block of the cluster arrive (`barrier_arrive_at`).
DEVICE void barrier_wait(u64* barrier, int phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(barrier)), "r"(phase)
        : "memory");
}
// Threads of some warps, a multiple of 32 of them; ids from 1 on (0 is __syncthreads).
DEVICE void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- Clusters: consecutive blocks of a launch that run together and reach each other's shared memory ---

// This block's number in its cluster.
DEVICE int cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}
// All threads of all blocks of the cluster, those that have ended aside; the threads of a warp together (__syncwarp
// first where they may not be). Between barriers_ready and the first use of another block's barriers; and at the end,
// as a block must not end before what others send to it is there.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// An arrival at the barrier of the same place in the shared memory of block `rank`, which may be this one. With
// .release.cluster it would come with a fence for the whole GPU; what is released here was read, and has been, so it
// needs none (as CUTLASS has it, include/cutlass/arch/barrier.h, ClusterBarrier::arrive).
DEVICE void barrier_arrive_at(u64* barrier, int rank) {
    asm volatile(
        "{\n.reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// --- Copies to shared memory ---

// For data that is read about once: L2 evicts it before everything else (PTX ISA, createpolicy).
DEVICE u64 evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Copies. If EVICT_FIRST, L2 gives up first what they bring.

// `bytes` and both addresses are multiples of 16.
template <bool EVICT_FIRST = false> DEVICE void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
    const u32 there = shared_address(to), done = shared_address(barrier);
    if constexpr (EVICT_FIRST) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(there),
            "l"(from), "r"(bytes), "r"(done), "l"(evict_first())
            : "memory");
    } else {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there),
                     "l"(from), "r"(bytes), "r"(done)
                     : "memory");
    }
}
// A box of a tensor from coordinates on, the fastest dimension first.
template <bool EVICT_FIRST = false> DEVICE void copy_box(void* to, const TensorMap* map, int x, int y, u64* barrier) {
    const u32 there = shared_address(to), done = shared_address(barrier);
    if constexpr (EVICT_FIRST) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::
                "r"(there), "l"(map), "r"(x), "r"(y), "r"(done), "l"(evict_first())
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(there),
            "l"(map), "r"(x), "r"(y), "r"(done)
            : "memory");
    }
}
template <bool EVICT_FIRST = false>
DEVICE void copy_box(void* to, const TensorMap* map, int x, int y, int z, u64* barrier) {
    const u32 there = shared_address(to), done = shared_address(barrier);
    if constexpr (EVICT_FIRST) {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::
                "r"(there), "l"(map), "r"(x), "r"(y), "r"(z), "r"(done), "l"(evict_first())
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(there),
            "l"(map), "r"(x), "r"(y), "r"(z), "r"(done)
            : "memory");
    }
}
template <bool EVICT_FIRST = false>
DEVICE void copy_box(void* to, const TensorMap* map, int x, int y, int z, int u, int v, u64* barrier) {
    const u32 there = shared_address(to), done = shared_address(barrier);
    if constexpr (EVICT_FIRST) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::
                "r"(there), "l"(map), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v), "r"(done), "l"(evict_first())
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::
                "r"(there), "l"(map), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v), "r"(done)
            : "memory");
    }
}
// A box into the shared memory of each block of the cluster that has a bit in `blocks`, at the same place in all; its
// bytes arrive at the barrier of the same place there.
DEVICE void copy_box_to_all(void* to, const TensorMap* map, int x, int y, u64* barrier, int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::
            "r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(static_cast<u16>(blocks))
        : "memory");
}
template <bool EVICT_FIRST = false>
DEVICE void copy_box_to_all(void* to, const TensorMap* map, int x, int y, int z, u64* barrier, int blocks) {
    const u32 there = shared_address(to), done = shared_address(barrier);
    const u16 mask = static_cast<u16>(blocks);
    if constexpr (EVICT_FIRST) {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::
                "r"(there), "l"(map), "r"(x), "r"(y), "r"(z), "r"(done), "h"(mask), "l"(evict_first())
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::
                "r"(there), "l"(map), "r"(x), "r"(y), "r"(z), "r"(done), "h"(mask)
            : "memory");
    }
}
DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// One fp32 number.
DEVICE void copy_float(float* to, const float* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// 16 bytes, aligned; or zeros.
DEVICE void copy_sixteen(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// An arrival, which the barrier's count must include, once all such copies of this thread are there.
DEVICE void arrive_with_copies(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Reads and writes of shared memory before this come before copies and MMAs that follow.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Writes to global memory before this, or seen before this, come before copies from there that follow.
DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- Global memory that programs share in a launch ---

// The 128 bytes that hold this on their way to L2; what is read later is what is there then.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory"); }
DEVICE int load_acquire(const int* p) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
DEVICE void wait_until_at_least(const int* p, int value) {
    while (load_acquire(p) < value) {
    }
}
// The same for a number in shared memory that another warp of this block stores.
DEVICE void wait_for_shared(const int* p, int value) {
    int now;
    do {
        asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];" : "=r"(now) : "r"(shared_address(p)) : "memory");
    } while (now < value);
}
DEVICE void store_shared(int* p, int value) {
    asm volatile("st.release.cta.shared::cta.s32 [%0], %1;" ::"r"(shared_address(p)), "r"(value) : "memory");
}
// Returns what was there.
DEVICE int add_release(int* p, int value) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
    return before;
}
// Returns what was there, and leaves one more; by lane 0 of a warp. Where all lanes have the same address, the assembler
// makes one addition for those that come and hands its answer out at once: a lane that only wants it later would wait
// for it right there, as long as for memory. So the address is one that it knows to differ.
DEVICE int take_ticket(int* p) {
    int before;
    asm volatile(
        "{\n.reg .u32 lane;\n.reg .u64 there;\n"
        "mov.u32 lane, %%laneid;\n"
        "cvt.u64.u32 there, lane;\n"
        "add.u64 there, there, %1;\n"
        "atom.relaxed.gpu.global.add.s32 %0, [there], 1;\n}"
        : "=r"(before)
        : "l"(p)
        : "memory");
    return before;
}
// A whole number in shared memory.
DEVICE void add_shared(int* p, int value) { atomicAdd(p, value); }
// What other programs wrote in this launch, read past L1.
DEVICE uint4 load_written(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// --- Registers and numbers ---

template <int N> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// What is made of `value` from here on is not computed earlier, where it would occupy registers.
DEVICE void compute_here(int& value) { asm volatile("" : "+r"(value)); }

// Four numbers as e4m3, the first in the lowest byte; beyond 448 saturates.
DEVICE u32 to_fp8(float a, float b, float c, float d) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return low | static_cast<u32>(high) << 16;
}
// Two numbers as bf16, the first in the lower half.
DEVICE u32 to_bf16(float a, float b) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}
DEVICE u32 multiply_bf16(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
// Within one unit in the last place (PTX ISA, rcp.approx), and 0 beyond 2**126; a division takes five times as long.
DEVICE float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// --- Tensor cores, a warp at a time ---

// d += a b: 16 rows of a, 8 columns of b, 16 deep, bf16. PTX ISA, mma.m16n8k16: of lane 4g+t, a is rows
// g, g+8, g, g+8 at columns from 2t, 2t, 2t+8, 2t+8; b is column g at rows from 2t and 2t+8; d is row g
// at columns 2t and 2t+1, then row g+8.
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two 8x8 matrices of 16-bit numbers into shared memory, transposed (stmatrix): lane 4g+t has row g,
// columns 2t and 2t+1 of each. Column i of the first goes to `row` of lane i, of the second to that of
// lane i+8: 16 bytes, as aligned; those of other lanes are not used.
DEVICE void store_transposed(void* row, u32 first, u32 second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
                 "r"(first), "r"(second)
                 : "memory");
}

#endif  // CUDA_ON_HOST

template <class T> DEVICE T read(const void* p) { return *static_cast<const T*>(p); }

// What a weight is: FORMAT, as in moe_backend/kernels/triton/kernel.py.
enum { BF16 = 0, FP8 = 1, NVFP4 = 2 };

// --- FP8 ---

// How numbers of which `amax` is the largest become e4m3: codes for a unit, bounded so that 0 stays 0 also where
// amax is hardly a number; and what a code's unit is worth.
constexpr float E4M3_MAX = 448.0f;
DEVICE float codes_per_unit(float amax) { return amax > 0.0f ? fminf(E4M3_MAX / amax, 1e38f) : 1.0f; }
DEVICE float unit_of_codes(float amax) { return amax > 0.0f ? amax / E4M3_MAX : 1.0f; }

// --- Activations, as in moe_backend/activation.py ---

enum { SILU = 0, SWIGLUSTEP = 1, CLAMPED_SILU = 2, SWIGLUOAI = 3 };

DEVICE float sigmoid(float x) { return reciprocal(1.0f + __expf(-x)); }

template <int KIND> DEVICE float activate(float gate, float up, float limit, float alpha, float beta) {
    if (KIND == CLAMPED_SILU || KIND == SWIGLUOAI) gate = fminf(gate, limit);
    if (KIND != SILU) up = fminf(fmaxf(up, -limit), limit);
    if (KIND == SWIGLUOAI) return gate * sigmoid(alpha * gate) * (up + beta);
    float hidden = gate * sigmoid(gate);
    if (KIND == SWIGLUSTEP) hidden = fminf(hidden, limit);
    return hidden * up;
}
