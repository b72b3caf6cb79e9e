// Each token's outputs summed over its slots, in order, with the routing weights.
//
// A block has a token, or a part of its columns, a thread two times eight of them. Slots that are left out cost
// nothing: with experts spread over ranks most are.
//
// Compile-time constants: TOP_K, WEIGHTED (whether the weights are applied here).
#include "warps.cuh"

constexpr int THREADS = 256;
constexpr int PIECES = 2;    // of eight columns that a thread has
constexpr int TOGETHER = 4;  // slots whose outputs are on their way at once

struct Shared {
    int count;  // of slots that are not left out
    int rows[TOP_K];
    float weights[TOP_K];
};

// The slots that are not left out, in order, by a warp.
DEVICE void list_slots(Shared& shared, const int* position, const float* weights) {
    const int lane = threadIdx.x;
    int count = 0;
    for (int first = 0; first < TOP_K; first += 32) {
        const int k = first + lane, row = k < TOP_K ? position[k] : -1;
        const u32 there = __ballot_sync(ALL, row >= 0);
        if (row >= 0) {
            const int n = count + __popc(there & ((1u << lane) - 1));
            shared.rows[n] = row;
            shared.weights[n] = WEIGHTED ? weights[k] : 1.0f;
        }
        count += __popc(there);
    }
    if (lane == 0) shared.count = count;
}

DEVICE void add_row(float (&sums)[8], const uint4& row, float weight) {
    const u32 pairs[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[2 * i] += weight * low_bf16(pairs[i]);
        sums[2 * i + 1] += weight * high_bf16(pairs[i]);
    }
}

// partial: `[positions, H]` bf16, H a multiple of 8; position: `[tokens, TOP_K]`, -1 for slots that are left out;
// topk_weights: the same shape; out: `[tokens, H]` bf16. Positions and weights were there before the launch
// before this one.
KERNEL void __launch_bounds__(THREADS) combine(const u16* partial, const int* position, const float* topk_weights,
                                               u16* out, int H) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int parts = (H + 8 * PIECES * THREADS - 1) / (8 * PIECES * THREADS);
    const long long token = blockIdx.x / parts;
    const int column = (static_cast<int>(blockIdx.x) % parts * PIECES * THREADS + static_cast<int>(threadIdx.x)) * 8;
    if (threadIdx.x < 32) list_slots(shared, position + token * TOP_K, topk_weights + token * TOP_K);
    __syncthreads();
    wait_for_launches();
    const int count = shared.count;
    float sums[PIECES][8] = {};
    for (int first = 0; first < count; first += TOGETHER) {
        uint4 rows[TOGETHER][PIECES];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            if (first + j >= count) break;
            const u16* from = partial + static_cast<long long>(shared.rows[first + j]) * H;
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int c = column + 8 * p * THREADS;
                if (c < H) rows[j][p] = *reinterpret_cast<const uint4*>(from + c);
            }
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            if (first + j >= count) break;
#pragma unroll
            for (int p = 0; p < PIECES; p++) add_row(sums[p], rows[j][p], shared.weights[first + j]);
        }
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int c = column + 8 * p * THREADS;
        const float(&s)[8] = sums[p];
        const uint4 bits = {to_bf16(s[0], s[1]), to_bf16(s[2], s[3]), to_bf16(s[4], s[5]), to_bf16(s[6], s[7])};
        if (c < H) *reinterpret_cast<uint4*>(out + token * H + c) = bits;
    }
}
