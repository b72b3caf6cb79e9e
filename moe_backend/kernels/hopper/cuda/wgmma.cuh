// Asynchronous MMAs of a warp group (128 threads), both operands in shared memory: wgmma of sm_90a.
//
// An operand is a tile of rows of 128 bytes, K along them, as the tensor memory accelerator writes
// it with the 128-byte swizzle: 1024 bytes for eight rows, at a multiple of 1024.
//
// With bf16 the first operand may be in registers.
//
// Between wgmma_fence and wgmma_wait nothing else may touch the sums; wgmma_touch tells the compiler,
// for which they are ready as soon as an MMA is issued, not to use them before.
#pragma once

#include "common.cuh"

#ifndef CUDA_ON_HOST

// PTX ISA, "Shared memory matrix layout": address, distance of two groups of eight rows, both in
// units of 16 bytes, and the swizzle (1: 128 bytes). The other distance is unused with it.
DEVICE u64 shared_matrix(const void* tile, int bytes_of_eight_rows = 1024) {
    return (shared_address(tile) & 0x3FFFF) >> 4 | 1ull << 16 | static_cast<u64>(bytes_of_eight_rows >> 4) << 32 |
           1ull << 62;
}
// The tile so many times eight rows of 128 bytes further on.
DEVICE u64 matrix_on(u64 matrix, int times) { return matrix + times * (1024 >> 4); }
// The same tile, so many bytes further along K, fewer than 128.
DEVICE u64 columns_on(u64 matrix, int bytes) { return matrix + (bytes >> 4); }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int N> DEVICE void wgmma_touch(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d (+)= a b: 64 rows of a, N columns of b (rows of its tile), 32 deep, e4m3. Of the group's warp w
// and its lane 4g+t, d[4j] and d[4j+1] are row 16w+g at columns 8j+2t and 8j+2t+1, d[4j+2] and
// d[4j+3] those of row 16w+g+8.
template <int N> DEVICE void wgmma_fp8(float (&d)[N / 2], u64 a, u64 b, bool accumulate);
// d += a b: the same 16 deep, bf16; of a thread a is rows g, g+8, g, g+8 of its warp's 16, at columns from 2t, 2t,
// 2t+8, 2t+8.
template <int N> DEVICE void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b);
// The same with a in shared memory.
template <int N> DEVICE void wgmma_bf16(float (&d)[N / 2], u64 a, u64 b);

#define LIST_4 "%0, %1, %2, %3"
#define LIST_8 LIST_4 ", %4, %5, %6, %7"
#define LIST_12 LIST_8 ", %8, %9, %10, %11"
#define LIST_16 LIST_12 ", %12, %13, %14, %15"
#define LIST_24 LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define LIST_32 LIST_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_36 LIST_32 ", %32, %33, %34, %35"
#define LIST_40 LIST_36 ", %36, %37, %38, %39"
#define LIST_44 LIST_40 ", %40, %41, %42, %43"
#define LIST_48 LIST_44 ", %44, %45, %46, %47"
#define LIST_52 LIST_48 ", %48, %49, %50, %51"
#define LIST_56 LIST_52 ", %52, %53, %54, %55"
#define LIST_60 LIST_56 ", %56, %57, %58, %59"
#define LIST_64 LIST_60 ", %60, %61, %62, %63"
#define LIST_68 LIST_64 ", %64, %65, %66, %67"
#define LIST_72 LIST_68 ", %68, %69, %70, %71"
#define LIST_76 LIST_72 ", %72, %73, %74, %75"
#define LIST_80 LIST_76 ", %76, %77, %78, %79"
#define LIST_88 LIST_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define LIST_96 LIST_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EIGHT(i) FOUR(i), FOUR(i + 4)
#define SIXTEEN(i) EIGHT(i), EIGHT(i + 8)

// SUMS registers, of which the numbers after them are a, b and whether to accumulate.
#define WGMMA_FP8(N, SUMS, A, B, ACCUMULATE, ...)                                                       \
    template <> DEVICE void wgmma_fp8<N>(float(&d)[N / 2], u64 a, u64 b, bool accumulate) {             \
        asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" #ACCUMULATE ", 0;\n"                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" LIST_##SUMS           \
                     "}, %" #A ", %" #B ", more, 1, 1;\n}"                                              \
                     : __VA_ARGS__                                                                      \
                     : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                              \
    }
WGMMA_FP8(8, 4, 4, 5, 6, FOUR(0))
WGMMA_FP8(16, 8, 8, 9, 10, EIGHT(0))
WGMMA_FP8(24, 12, 12, 13, 14, EIGHT(0), FOUR(8))
WGMMA_FP8(32, 16, 16, 17, 18, SIXTEEN(0))
WGMMA_FP8(48, 24, 24, 25, 26, SIXTEEN(0), EIGHT(16))
WGMMA_FP8(64, 32, 32, 33, 34, SIXTEEN(0), SIXTEEN(16))
WGMMA_FP8(96, 48, 48, 49, 50, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32))
WGMMA_FP8(128, 64, 64, 65, 66, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48))

// SUMS registers, of which the numbers after them are a, b and that it accumulates.
#define WGMMA_BF16(N, SUMS, A, B, C, D, MATRIX, ACCUMULATE, ...)                                            \
    template <> DEVICE void wgmma_bf16<N>(float(&d)[N / 2], const u32 (&a)[4], u64 b) {                     \
        asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" #ACCUMULATE ", 0;\n"                        \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST_##SUMS               \
                     "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #MATRIX ", more, 1, 1, 0;\n}"            \
                     : __VA_ARGS__                                                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                         \
    }
WGMMA_BF16(8, 4, 4, 5, 6, 7, 8, 9, FOUR(0))
WGMMA_BF16(16, 8, 8, 9, 10, 11, 12, 13, EIGHT(0))
WGMMA_BF16(24, 12, 12, 13, 14, 15, 16, 17, EIGHT(0), FOUR(8))
WGMMA_BF16(32, 16, 16, 17, 18, 19, 20, 21, SIXTEEN(0))
WGMMA_BF16(48, 24, 24, 25, 26, 27, 28, 29, SIXTEEN(0), EIGHT(16))
WGMMA_BF16(64, 32, 32, 33, 34, 35, 36, 37, SIXTEEN(0), SIXTEEN(16))
WGMMA_BF16(72, 36, 36, 37, 38, 39, 40, 41, SIXTEEN(0), SIXTEEN(16), FOUR(32))
WGMMA_BF16(80, 40, 40, 41, 42, 43, 44, 45, SIXTEEN(0), SIXTEEN(16), EIGHT(32))
WGMMA_BF16(88, 44, 44, 45, 46, 47, 48, 49, SIXTEEN(0), SIXTEEN(16), EIGHT(32), FOUR(40))
WGMMA_BF16(96, 48, 48, 49, 50, 51, 52, 53, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32))
WGMMA_BF16(104, 52, 52, 53, 54, 55, 56, 57, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), FOUR(48))
WGMMA_BF16(112, 56, 56, 57, 58, 59, 60, 61, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), EIGHT(48))
WGMMA_BF16(120, 60, 60, 61, 62, 63, 64, 65, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), EIGHT(48), FOUR(56))
WGMMA_BF16(128, 64, 64, 65, 66, 67, 68, 69, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48))

// The same with a in shared memory.
#define WGMMA_BF16_SHARED(N, SUMS, A, B, ACCUMULATE, ...)                                                   \
    template <> DEVICE void wgmma_bf16<N>(float (&d)[N / 2], u64 a, u64 b) {                                \
        asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" #ACCUMULATE ", 0;\n"                        \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST_##SUMS               \
                     "}, %" #A ", %" #B ", more, 1, 1, 0, 0;\n}"                                            \
                     : __VA_ARGS__                                                                          \
                     : "l"(a), "l"(b), "r"(1));                                                             \
    }
WGMMA_BF16_SHARED(16, 8, 8, 9, 10, EIGHT(0))
WGMMA_BF16_SHARED(32, 16, 16, 17, 18, SIXTEEN(0))
WGMMA_BF16_SHARED(48, 24, 24, 25, 26, SIXTEEN(0), EIGHT(16))
WGMMA_BF16_SHARED(64, 32, 32, 33, 34, SIXTEEN(0), SIXTEEN(16))
WGMMA_BF16_SHARED(80, 40, 40, 41, 42, SIXTEEN(0), SIXTEEN(16), EIGHT(32))
WGMMA_BF16_SHARED(96, 48, 48, 49, 50, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32))
WGMMA_BF16_SHARED(104, 52, 52, 53, 54, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), FOUR(48))
WGMMA_BF16_SHARED(112, 56, 56, 57, 58, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), EIGHT(48))
WGMMA_BF16_SHARED(120, 60, 60, 61, 62, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), EIGHT(48), FOUR(56))
WGMMA_BF16_SHARED(128, 64, 64, 65, 66, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48))
WGMMA_BF16_SHARED(136, 68, 68, 69, 70, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), FOUR(64))
WGMMA_BF16_SHARED(144, 72, 72, 73, 74, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), EIGHT(64))
WGMMA_BF16_SHARED(152, 76, 76, 77, 78, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), EIGHT(64), FOUR(72))
WGMMA_BF16_SHARED(160, 80, 80, 81, 82, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64))
WGMMA_BF16_SHARED(176, 88, 88, 89, 90, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), EIGHT(80))
WGMMA_BF16_SHARED(192, 96, 96, 97, 98, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80))

#undef WGMMA_BF16_SHARED
#undef WGMMA_BF16
#undef WGMMA_FP8
#undef SIXTEEN
#undef EIGHT
#undef FOUR

#endif  // CUDA_ON_HOST
