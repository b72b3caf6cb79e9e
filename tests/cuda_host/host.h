// CUDA for the host: what moe_backend/kernels/hopper/cuda/common.cuh and wgmma.cuh name, and the few
// built-ins that the kernels use, for g++ -DCUDA_ON_HOST. driver.py compiles and launches.
//
// What it shows, by failing the launch: data read before it has arrived (copies come late, and what
// has not come is NaN), overwritten or changed too early (copies and wgmma may act any time between
// issue and wait), barriers that count wrong, threads that wait for ever, accesses out of range or
// misaligned, and, over several seeds, races between threads and between blocks. What it cannot
// show: missing fences (every store is seen at once and in order), bank conflicts, registers, time.
#pragma once

#include <math.h>

#include "clusters.h"
#include "fibers.h"
#include "memory.h"

#define DEVICE inline
#define KERNEL extern "C"
#define GRID_CONSTANT
#define SHARED_MEMORY(name) u8* const name = host::machine->current->block->shared
#define __launch_bounds__(...)

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From> To host_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline u32 __float_as_uint(float x) { return host_bits<u32>(x); }
inline float __uint_as_float(u32 x) { return host_bits<float>(x); }
inline int __ffs(u32 x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 __byte_perm(u32 a, u32 b, u32 select) {
    u64 both = a | static_cast<u64>(b) << 32;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<u32>(both >> 8 * (select >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
inline u32 __funnelshift_l(u32 low, u32 high, u32 shift) {
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) << (shift & 31) >> 32);
}
inline float __expf(float x) { return expf(x); }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

// --- Shuffles and votes ---

namespace host {

// Each lane of the mask takes the value of lane source(lane), which it must not take from outside.
template <class T, class Source> T shuffle(const char* kind, u32 mask, T value, Source source) {
    struct Lane {
        T value;
        int source;
        T result;
    } mine = {value, source(machine->current->lane()), value};
    meet_warp(kind, mask, mine, [&](Lane** lanes) {
        for (int i = 0; i < 32; i++) {
            if (!lanes[i]) continue;
            const Lane* from = lanes[lanes[i]->source];
            int source = lanes[i]->source;
            if (!from) fail(text("%s: lane %d reads lane %d, which mask %x lacks", kind, i, source, mask));
            lanes[i]->result = from->value;
        }
    });
    return mine.result;
}

}  // namespace host

template <class T> T __shfl_sync(u32 mask, T value, int from) {
    return host::shuffle("__shfl_sync", mask, value, [=](int) { return from & 31; });
}
template <class T> T __shfl_xor_sync(u32 mask, T value, int bits) {
    return host::shuffle("__shfl_xor_sync", mask, value, [=](int lane) { return (lane ^ bits) & 31; });
}
template <class T> T __shfl_up_sync(u32 mask, T value, int by) {
    return host::shuffle("__shfl_up_sync", mask, value,
                         [=](int lane) { return lane < by ? lane : lane - by; });
}
inline u32 __ballot_sync(u32 mask, int vote) {
    u32 mine = vote != 0;
    host::meet_warp("__ballot_sync", mask, mine, [](u32** lanes) {
        u32 all = 0;
        for (int i = 0; i < 32; i++) all |= lanes[i] && *lanes[i] ? 1u << i : 0;
        for (int i = 0; i < 32; i++)
            if (lanes[i]) *lanes[i] = all;
    });
    return mine;
}

inline u32 __match_any_sync(u32 mask, int value) {
    struct Lane {
        int value;
        u32 result;
    } mine = {value, 0};
    host::meet_warp("__match_any_sync", mask, mine, [](Lane** lanes) {
        for (int i = 0; i < 32; i++)
            for (int j = 0; lanes[i] && j < 32; j++)
                if (lanes[j] && lanes[j]->value == lanes[i]->value) lanes[i]->result |= 1u << j;
    });
    return mine.result;
}

inline uint4 load_written(const uint4* p) { return *p; }
inline void prefetch(const void*) {}

#include "matrix.h"
