// flow.cu: FP8: a part's products of a step, by a warp group, and their scales.
#pragma once

#include "flow_shared.cuh"
#include "wgmma.cuh"

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

// Products of SUBS sub-steps, which one scale follows. Between issue and wait there is no branch, for which the
// compiler would let MMAs wait for each other.
template <int N, int SUB, int SUBS>
DEVICE void multiply(float (&products)[N / 2], u64 weights, u64 tokens, int column) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < SUB * SUBS; k += 32) {
        wgmma_fp8<N>(products, columns_on(weights, column + k), columns_on(tokens, column + k), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_touch(products);
}

// A part's products of one step, each sub-step's scaled, all at once.
template <int N, bool GATED>
DEVICE void add_step_at_once(float (&sums)[N / 2], u64 weights, u64 tokens, const float* weight_scales,
                             const float* token_scales, int k0, int depth) {
    constexpr int SUB = GATED ? SUB13 : SUB2, MANY = STEP / SUB;
    float products[MANY][N / 2];
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < MANY; n++) {
#pragma unroll
        for (int k = 0; k < SUB; k += 32) {
            wgmma_fp8<N>(products[n], columns_on(weights, n * SUB + k), columns_on(tokens, n * SUB + k), k > 0);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < MANY; n++) {
        wgmma_touch(products[n]);
        // Columns past the last are zeros, and so have no scale of their own.
        const int group = GATED ? 0 : min(k0 + n * SUB, depth - 1) / GROUP - k0 / GROUP;
        add_scaled<N>(sums, products[n], weight_scales[GATED ? 2 * n : n], weight_scales[GATED ? 2 * n + 1 : n],
                      token_scales + group * MOST);
    }
    wgmma_touch(sums);  // before the next products overwrite these
}

// The same, but that sub-steps which follow each other with the same scales are summed before they are scaled: in
// a shard off the block grid most have the scale of their neighbour, whose block they are in.
template <int N, bool GATED>
DEVICE void add_step_in_runs(float (&sums)[N / 2], u64 weights, u64 tokens, const float* weight_scales,
                     const float* token_scales, int k0, int depth) {
    constexpr int SUB = GATED ? SUB13 : SUB2, MANY = STEP / SUB;
    const int subs = min(MANY, ceil_div(depth - k0, SUB));
#pragma unroll 1
    for (int sub = 0; sub < (MANY == 1 ? 1 : subs);) {
        const float scale = weight_scales[GATED ? 2 * sub : sub];
        const float scale8 = weight_scales[GATED ? 2 * sub + 1 : sub];
        const int group = GATED ? 0 : (k0 + sub * SUB) / GROUP - k0 / GROUP;
        int run = 1;
        if (MANY > 1) {
            bool same = true;
#pragma unroll
            for (int n = 1; n < MANY; n++) {
                const int other = sub + n;
                same = same && other < subs && weight_scales[GATED ? 2 * other : other] == scale;
                if (GATED) same = same && weight_scales[2 * other + 1] == scale8;
                else same = same && (k0 + other * SUB) / GROUP - k0 / GROUP == group;
                run += same;
            }
            run = __shfl_sync(ALL, run, 0);  // as it is, which the compiler is to know
        }
        float products[N / 2];
        const int column = sub * SUB;
        if (run == 1) multiply<N, SUB, 1>(products, weights, tokens, column);
        else if (run == 2) multiply<N, SUB, least(2, MANY)>(products, weights, tokens, column);
        else if (run == 3) multiply<N, SUB, least(3, MANY)>(products, weights, tokens, column);
        else multiply<N, SUB, MANY>(products, weights, tokens, column);
        add_scaled<N>(sums, products, scale, scale8, token_scales + group * MOST);
        wgmma_touch(sums);  // before the next products overwrite these
        sub += run;
    }
}

// A part's products of one step, whose columns begin with k0. So a token's last bits may depend on how many
// others of its expert are in the tile, though not on which.
template <int N, bool GATED>
DEVICE void add_step(float (&sums)[N / 2], u64 weights, u64 tokens, const float* weight_scales,
                     const float* token_scales, int k0, int depth) {
    constexpr int MANY = STEP / (GATED ? SUB13 : SUB2);
    if constexpr (MANY > 1 && MANY * N <= AT_ONCE) {
        add_step_at_once<N, GATED>(sums, weights, tokens, weight_scales, token_scales, k0, depth);
    } else {
        add_step_in_runs<N, GATED>(sums, weights, tokens, weight_scales, token_scales, k0, depth);
    }
}

// All of an item's products with their scales, by a warp group.
template <int N, bool GATED>
DEVICE void add_steps(float (&sums)[BLOCKS][N / 2], const Layer& layer, Shared& shared, const Item& item, Ring& ring,
                      const Place& place) {
    const int depth = layer.depth(GATED);
    for (int k0 = 0; k0 < depth; k0 += STEP) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        if (GATED) fence_async_shared();  // tokens came by ordinary copies
        const u8* matrices = shared.matrices[ring.stage];
        const u64 tokens = shared_matrix(matrices + PARTS * PART_BYTES);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int part = WARP_GROUPS * b + place.group;
            if (part < item.parts) {
                add_step<N, GATED>(sums[b], shared_matrix(matrices + part * PART_BYTES), tokens,
                                   shared.weight_scales[ring.stage] + part * PART_SCALES,
                                   shared.token_scales[ring.stage][0] + place.column(), k0, depth);
            }
        }
        release(shared, ring.stage, place);
        ring.advance();
    }
}

// Scales of all of an item: they are in its steps.
template <int N, bool GATED> DEVICE void scale_sums(float (&)[BLOCKS][N / 2], const Layer&, const Item&) {}
