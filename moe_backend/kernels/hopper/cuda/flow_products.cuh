// flow.cu: a part's products of a step, by a warp group, and their scales.
#pragma once

#include "flow_sizes.cuh"
#include "wgmma.cuh"

// Number of a consumer's warp group, and of its warp and lane therein.
struct Place {
    int group, warp, lane;

    DEVICE int row() const { return lane / 4; }
    DEVICE int column() const { return lane % 4 * 2; }
};

// sums += products * scale of the weights * scale of the token; two scales of weights: of row g, and
// of row g + 8.
template <int N>
DEVICE void add_scaled(float (&sums)[N / 2], const float (&products)[N / 2], float weight, float weight8,
                       const float* token_scales) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float2 token = *reinterpret_cast<const float2*>(token_scales + 8 * j);
        sums[4 * j] += products[4 * j] * (weight * token.x);
        sums[4 * j + 1] += products[4 * j + 1] * (weight * token.y);
        sums[4 * j + 2] += products[4 * j + 2] * (weight8 * token.x);
        sums[4 * j + 3] += products[4 * j + 3] * (weight8 * token.y);
    }
}

// A part's products of one step.
template <int N, bool GATED>
DEVICE void add_step(float (&sums)[N / 2], u64 weights, u64 tokens, const float* weight_scales,
                     const float* token_scales, int k0, int depth) {
    constexpr int SUB = GATED ? SUB13 : SUB2;
    constexpr int TOGETHER = least(STEP / SUB, N / 2 * 4 <= PRODUCTS ? 4 : N / 2 * 2 <= PRODUCTS ? 2 : 1);
#pragma unroll
    for (int first = 0; first < STEP / SUB; first += TOGETHER) {
        if (first > 0 && k0 + first * SUB >= depth) break;
        float products[TOGETHER][N / 2];
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
#pragma unroll
            for (int k = 0; k < SUB; k += 32) {
                const int column = (first + n) * SUB + k;
                wgmma_fp8<N>(products[n], columns_on(weights, column), columns_on(tokens, column), k > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
            wgmma_touch(products[n]);
            const int nth = first + n;
            // Columns past the last are zeros, and so have no scale of their own.
            const int group = GATED ? 0 : min(k0 + nth * SUB, depth - 1) / GROUP - k0 / GROUP;
            add_scaled<N>(sums, products[n], weight_scales[GATED ? 2 * nth : nth],
                          weight_scales[GATED ? 2 * nth + 1 : nth], token_scales + group * MOST);
        }
        wgmma_touch(sums);  // before the next products overwrite these
    }
}
