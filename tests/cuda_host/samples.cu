// Small kernels for test_cuda_host.py. `fault` chooses what is wrong in them; 0 is right.
#include "wgmma.cuh"

enum { RIGHT = 0, NO_WAIT = 1, EARLY = 2, LATE = 3 };

// Doubles tiles of 256 floats through a ring of two slots: warp 0 copies, warp 1 computes.
KERNEL void ring(const float* in, float* out, int tiles, int fault) {
    SHARED_MEMORY(memory);
    float* slots = reinterpret_cast<float*>(memory);
    u64* full = reinterpret_cast<u64*>(memory + 2048);
    u64* empty = full + 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) barrier_init(full + i, 1), barrier_init(empty + i, 32);
        barriers_ready();
    }
    __syncthreads();
    for (int i = 0; i < tiles; i++) {
        int slot = i % 2, phase = i / 2 % 2;
        if (threadIdx.x == 0) {
            if (i >= 2) barrier_wait(empty + slot, phase ^ 1);
            barrier_expect(full + slot, 1024);
            copy_bulk(slots + slot * 256, in + i * 256, 1024, full + slot);
        } else if (threadIdx.x >= 32) {
            int lane = threadIdx.x - 32;
            if (fault != NO_WAIT) barrier_wait(full + slot, phase);
            if (fault == EARLY) barrier_arrive(empty + slot);
            for (int j = lane; j < 256; j += 32) out[i * 256 + j] = 2 * slots[slot * 256 + j];
            if (fault != EARLY) barrier_arrive(empty + slot);
        }
    }
    __syncthreads();
    barrier_wait(full, (tiles - 1) / 2 % 2);
    if (tiles > 1) barrier_wait(full + 1, (tiles - 2) / 2 % 2);
}

// Block 0 (LATE: the last one) writes what the others add to theirs.
KERNEL void hand_over(int* scratch, int* counter, int* out, int fault) {
    if (blockIdx.x == (fault == LATE ? gridDim.x - 1 : 0)) {
        scratch[threadIdx.x] = threadIdx.x;
        __syncthreads();
        if (threadIdx.x == 0) add_release(counter, 1);
    } else {
        if (fault != NO_WAIT) wait_until_at_least(counter, 1);
        out[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x + scratch[threadIdx.x];
    }
    add_release(counter + 1, 1);
}

KERNEL void lanes(int* out) {
    int x = threadIdx.x;
    out[x] = __shfl_xor_sync(~0u, x, 5);
    out[32 + x] = __shfl_up_sync(~0u, x, 3);
    out[64 + x] = __shfl_sync(~0u, x, 31 - x);
    out[96 + x] = __ballot_sync(~0u, x % 3 == 0);
    if (x < 16) out[128 + x] = __ballot_sync(0xFFFF, x % 5 == 0);
}

KERNEL void round_numbers(const float* in, u32* fp8, u32* bf16) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float4 v = reinterpret_cast<const float4*>(in)[i];
    fp8[i] = to_fp8(v.x, v.y, v.z, v.w);
    bf16[2 * i] = to_bf16(v.x, v.y);
    bf16[2 * i + 1] = to_bf16(v.z, v.w);
}

// d [16, 8] += a [16, 16] b [8, 16]^T, of bf16.
KERNEL void multiply_in_warp(const u32* a, const u32* b, float* d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 rows[4];
    float sums[4];
    for (int i = 0; i < 4; i++) {
        rows[i] = a[(g + i % 2 * 8) * 8 + i / 2 * 4 + t];
        sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    }
    mma_bf16(sums, rows, b[g * 8 + t], b[g * 8 + 4 + t]);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// out [64, COLUMNS] = a [64, 128] b [COLUMNS, 128]^T, boxes of tensors with the swizzle.
KERNEL void multiply_in_group(const GRID_CONSTANT TensorMap a, const GRID_CONSTANT TensorMap b, float* out,
                              int fault) {
    SHARED_MEMORY(memory);
    u64* barrier = reinterpret_cast<u64*>(memory + 8192 + COLUMNS * 128);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barriers_ready();
        barrier_expect(barrier, 8192 + COLUMNS * 128);
        copy_box(memory, &a, 0, 0, barrier);
        copy_box(memory + 8192, &b, 0, 0, barrier);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    u64 rows = shared_matrix(memory), columns = shared_matrix(memory + 8192);
    float sums[COLUMNS / 2], more[COLUMNS / 2];
    wgmma_fence();
    for (int k = 0; k < 64; k += 32)
        wgmma_fp8<COLUMNS>(sums, columns_on(rows, k), columns_on(columns, k), k > 0);
    wgmma_commit();
    for (int k = 64; k < 128; k += 32)
        wgmma_fp8<COLUMNS>(more, columns_on(rows, k), columns_on(columns, k), k > 64);
    wgmma_commit();
    if (fault != NO_WAIT) wgmma_wait<1>();
    float early = sums[0];
    if (fault == EARLY) memory[8192 + threadIdx.x] = 0;  // row 0 of b
    wgmma_wait<0>();
    sums[0] = early;
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] += more[i];
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = 0; i < COLUMNS / 2; i++)
        out[(row + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + column + i % 2] = sums[i];
}

// The same of 64 columns of bf16.
KERNEL void multiply_bf16_in_group(const GRID_CONSTANT TensorMap a, const GRID_CONSTANT TensorMap b, float* out) {
    SHARED_MEMORY(memory);
    u64* barrier = reinterpret_cast<u64*>(memory + 8192 + 128 * 128);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barriers_ready();
        barrier_expect(barrier, 8192 + 128 * 128);
        copy_box(memory, &a, 0, 0, barrier);
        copy_box(memory + 8192, &b, 0, 0, barrier);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    const u64 rows = shared_matrix(memory), columns = shared_matrix(memory + 8192);
    float sums[64];
    for (float& sum : sums) sum = 1.0f;  // it adds to what there is
    wgmma_fence();
    for (int k = 0; k < 128; k += 32) wgmma_bf16<128>(sums, columns_on(rows, k), columns_on(columns, k));
    wgmma_commit();
    wgmma_wait<0>();
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = 0; i < 64; i++) out[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + column + i % 2] = sums[i];
}

// out [16, 8], of 16-bit numbers: two matrices [8, 8] transposed.
KERNEL void transpose(const u32* in, u16* out) {
    SHARED_MEMORY(memory);
    store_transposed(memory + threadIdx.x * 16, in[threadIdx.x], in[32 + threadIdx.x]);
    __syncwarp();
    for (int i = threadIdx.x; i < 128; i += 32) out[i] = reinterpret_cast<u16*>(memory)[i];
}

KERNEL void box(const GRID_CONSTANT TensorMap map, u32* out, int words, int x, int y) {
    SHARED_MEMORY(memory);
    u64* barrier = reinterpret_cast<u64*>(memory + words * 4);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barriers_ready();
        barrier_expect(barrier, words * 4);
        copy_box(memory, &map, x, y, 0, 1, 0, barrier);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = reinterpret_cast<u32*>(memory)[i];
}

KERNEL void gather(const float* in, const int* from, float* out) {
    SHARED_MEMORY(memory);
    u64* barrier = reinterpret_cast<u64*>(memory + blockDim.x * 4);
    if (threadIdx.x == 0) barrier_init(barrier, blockDim.x), barriers_ready();
    __syncthreads();
    copy_float(reinterpret_cast<float*>(memory) + threadIdx.x, in + from[threadIdx.x]);
    arrive_with_copies(barrier);
    barrier_wait(barrier, 0);
    out[threadIdx.x] = reinterpret_cast<float*>(memory)[blockDim.x - 1 - threadIdx.x];
}

// Pieces of 16 bytes from anywhere, or zeros where the index is negative.
KERNEL void gather_pieces(const uint4* in, const int* from, uint4* out) {
    SHARED_MEMORY(memory);
    uint4* pieces = reinterpret_cast<uint4*>(memory);
    u64* barrier = reinterpret_cast<u64*>(pieces + blockDim.x);
    if (threadIdx.x == 0) barrier_init(barrier, blockDim.x), barriers_ready();
    __syncthreads();
    const int index = from[threadIdx.x];
    copy_sixteen(pieces + threadIdx.x, in + index, index >= 0);
    arrive_with_copies(barrier);
    barrier_wait(barrier, 0);
    out[threadIdx.x] = pieces[blockDim.x - 1 - threadIdx.x];
}

// One barrier for two arrivals; the faults are named in the test.
KERNEL void misuse(int* in, int fault) {
    SHARED_MEMORY(memory);
    u64* barrier = reinterpret_cast<u64*>(memory);
    if (threadIdx.x == 0 && fault != 0) barrier_init(barrier, 2);
    if (threadIdx.x == 0 && fault != 1) barriers_ready();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (fault <= 1) copy_bulk(memory + 16, in, 16, barrier);
        if (fault == 2) barrier_arrive(barrier), barrier_wait(barrier, 0);
        if (fault == 3) barrier_expect(barrier, 16), barrier_arrive(barrier), barrier_arrive(barrier);
        if (fault == 4)
            barrier_expect(barrier, 16), copy_bulk(memory + 16, in, 32, barrier), barrier_wait(barrier, 0);
        if (fault == 5) copy_bulk(memory + 24, in, 16, barrier);
        if (fault == 6) copy_bulk(memory + 16, in + 60, 32, barrier);
        if (fault == 7) {
            barrier_arrive(barrier), barrier_expect(barrier, 16), copy_bulk(memory + 16, in, 16, barrier);
            in[0]++;
            barrier_wait(barrier, 0);
            for (int i = 0; i < 4; i++) in[4 + i] = reinterpret_cast<int*>(memory + 16)[i];
        }
        if (fault == 8) memory[1 << 20] = 1;
        if (fault == 9) in[0] = in[-2000000];
        if (fault == 10) in[0] = reinterpret_cast<uint2*>(in + 1)->x;
        if (fault == 11) in[0] = __shfl_sync(1, in[0], 1);
        if (fault == 12) barrier[0] = 0, barrier_arrive(barrier);
        if (fault == 13) in[64] = 0;
        if (fault == 14) wait_until_at_least(in, 1);
    }
    if (fault == 15) threadIdx.x < 32 ? named_sync(1, 64) : named_sync(1, 32);
    if (fault == 16 && threadIdx.x == 0) barrier_wait(barrier, 0);
    if (fault == 16 && threadIdx.x == 1)
        for (int i = 0; i < 4; i++) barrier_arrive(barrier);
    if (fault == 18) let_next_start();
    if (fault == 17 && threadIdx.x < 32) __syncthreads();  // right: the others have ended
}

enum { OWN_ONLY = 1, NO_LAST_SYNC = 2, WRONG_MASK = 3, ONE_MORE = 4, NO_FIRST_SYNC = 5, ONE_LESS = 6 };

// Each block of a cluster of two has its number times all of the cluster's tiles of 256 floats, through a ring of two
// slots: it copies half of a tile, rows of 32, to both (block 0 from a map of two dimensions, block 1 of three).
// Warp 0 copies, warp 1 computes.
KERNEL void exchange(const GRID_CONSTANT TensorMap flat, const GRID_CONSTANT TensorMap halves, float* out, int tiles,
                     int fault) {
    SHARED_MEMORY(memory);
    const float* slots = reinterpret_cast<const float*>(memory);
    u64* full = reinterpret_cast<u64*>(memory + 2048);
    u64* empty = full + 2;
    const int rank = cluster_rank(), first = blockIdx.x / 2 * tiles;
    if (threadIdx.x == 0) {
        int readers = fault == OWN_ONLY ? 1 : fault == ONE_MORE ? 3 : 2;
        for (int i = 0; i < 2; i++) barrier_init(full + i, 1), barrier_init(empty + i, readers);
        barriers_ready();
    }
    __syncwarp();
    if (fault == NO_FIRST_SYNC) __syncthreads();
    else cluster_sync();
    for (int i = 0; i < tiles; i++) {
        int slot = i % 2, phase = i / 2 % 2;
        if (threadIdx.x == 0) {
            if (i >= 2) barrier_wait(empty + slot, phase ^ 1);
            barrier_expect(full + slot, fault == ONE_LESS ? 512 : 1024);
            u8* to = memory + slot * 1024 + rank * 512;
            int half = (first + i) * 2 + rank, blocks = fault == WRONG_MASK ? 1 << rank : 3;
            if (rank == 0) copy_box_to_all(to, &flat, 0, half * 4, full + slot, blocks);
            else copy_box_to_all(to, &halves, 0, 0, half, full + slot, blocks);
        } else if (threadIdx.x >= 32) {
            barrier_wait(full + slot, phase);
            for (int j = threadIdx.x - 32; j < 256; j += 32)
                out[(blockIdx.x * tiles + i) * 256 + j] = blockIdx.x * slots[slot * 256 + j];
            __syncwarp();
            if (threadIdx.x - 32 < 2 && (fault != OWN_ONLY || threadIdx.x - 32 == rank))
                barrier_arrive_at(empty + slot, threadIdx.x - 32);
        }
    }
    __syncwarp();
    if (fault != NO_LAST_SYNC) cluster_sync();
}

// out [64, COLUMNS] = a [64, 128] b [COLUMNS, 128]^T in block 0; block 1 copies to it, and over b once it is free.
KERNEL void multiply_for_peer(const GRID_CONSTANT TensorMap a, const GRID_CONSTANT TensorMap b, float* out, int fault) {
    SHARED_MEMORY(memory);
    u64* full = reinterpret_cast<u64*>(memory + 8192 + COLUMNS * 128);
    u64* empty = full + 1;
    if (threadIdx.x == 0) {
        barrier_init(full, 1), barrier_init(empty, 1);
        barriers_ready();
        if (cluster_rank() == 0) barrier_expect(full, 8192 + COLUMNS * 128);
    }
    __syncwarp();
    cluster_sync();
    if (cluster_rank() == 1 && threadIdx.x == 0) {
        copy_box_to_all(memory, &a, 0, 0, full, 1);
        copy_box_to_all(memory + 8192, &b, 0, 0, full, 1);
        barrier_wait(empty, 0);
        copy_box_to_all(memory + 8192, &b, 0, COLUMNS, full, 1);
    } else if (cluster_rank() == 0) {
        barrier_wait(full, 0);
        float sums[COLUMNS / 2];
        wgmma_fence();
        u64 rows = shared_matrix(memory), columns = shared_matrix(memory + 8192);
        for (int k = 0; k < 128; k += 32)
            wgmma_fp8<COLUMNS>(sums, columns_on(rows, k), columns_on(columns, k), k > 0);
        wgmma_commit();
        if (threadIdx.x == 0) barrier_expect(full, COLUMNS * 128);
        if (fault != EARLY) wgmma_wait<0>();
        __syncthreads();
        if (threadIdx.x == 0) barrier_arrive_at(empty, 1);
        barrier_wait(full, 1);
        wgmma_wait<0>();
        int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
        for (int i = 0; i < COLUMNS / 2; i++)
            out[(row + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + column + i % 2] = sums[i];
    }
    __syncwarp();
    cluster_sync();
}

// What block 0 does to block 1; the faults are named in the test.
KERNEL void misuse_cluster(const GRID_CONSTANT TensorMap map, int fault) {
    SHARED_MEMORY(memory);
    u64* barrier = reinterpret_cast<u64*>(memory);
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barriers_ready();
        if (fault != 3 || rank == 0) barrier_init(barrier + 1, 1);
        if (fault != 4) barriers_ready();
    }
    __syncwarp();
    cluster_sync();
    if (threadIdx.x == 0 && rank == 0) {
        if (fault == 0) barrier_arrive_at(barrier, 2);
        if (fault == 1) copy_box_to_all(memory + 128, &map, 0, 0, barrier, 4);
        if (fault == 2) copy_box_to_all(memory + 128, &map, 0, 0, barrier, 0);
        if (fault == 3 || fault == 4) barrier_arrive_at(barrier + 1, 1);
        if (fault >= 5) copy_box_to_all(memory + 128, &map, 0, 0, barrier, 2);
    }
    if (fault == 6) cluster_sync();
}
