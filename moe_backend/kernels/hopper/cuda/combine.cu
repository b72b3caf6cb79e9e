// Each token's outputs summed over its slots, in order, with the routing weights.
//
// A thread has eight columns of a token, and all of its rows on their way at once.
//
// Compile-time constants: TOP_K, WEIGHTED (whether the weights are applied here).
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int TOGETHER = TOP_K < 8 ? TOP_K : 8;  // slots whose outputs are on their way at once

// partial: `[positions, H]` bf16, H a multiple of 8; position: `[tokens, TOP_K]`, -1 for slots that are left out;
// topk_weights: the same shape; out: `[tokens, H]` bf16. Positions and weights were there before the launch
// before this one.
KERNEL void __launch_bounds__(THREADS) combine(const u16* partial, const int* position, const float* topk_weights,
                                               u16* out, int H) {
    const int parts = (H + 8 * THREADS - 1) / (8 * THREADS);
    const long long token = blockIdx.x / parts;
    const int column = (static_cast<int>(blockIdx.x) % parts * THREADS + static_cast<int>(threadIdx.x)) * 8;
    int positions[TOP_K];
    float weights[TOP_K];
#pragma unroll
    for (int k = 0; k < TOP_K; k++) {
        positions[k] = position[token * TOP_K + k];
        weights[k] = WEIGHTED ? topk_weights[token * TOP_K + k] : 1.0f;
    }
    wait_for_launches();
    if (column >= H) return;
    float sums[8] = {};
#pragma unroll
    for (int first = 0; first < TOP_K; first += TOGETHER) {
        uint4 rows[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            rows[j] = make_uint4(0, 0, 0, 0);
            if (first + j >= TOP_K || positions[first + j] < 0) continue;
            rows[j] = *reinterpret_cast<const uint4*>(partial + static_cast<long long>(positions[first + j]) * H + column);
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            if (first + j >= TOP_K || positions[first + j] < 0) continue;
            const u32 pairs[4] = {rows[j].x, rows[j].y, rows[j].z, rows[j].w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[2 * i] += weights[first + j] * low_bf16(pairs[i]);
                sums[2 * i + 1] += weights[first + j] * high_bf16(pairs[i]);
            }
        }
    }
    *reinterpret_cast<uint4*>(out + token * H + column) = {to_bf16(sums[0], sums[1]), to_bf16(sums[2], sums[3]),
                                                           to_bf16(sums[4], sums[5]), to_bf16(sums[6], sums[7])};
}
