// pairs_fp8.cu: a warp group's products and their scales.
#pragma once

#include "pairs_fp8_shared.cuh"
#include "wgmma.cuh"

typedef float Sums[CHUNK / 2];  // of 64 tokens with a chunk's rows, a thread's

// A warp has read all of a stage: both blocks may copy there.
DEVICE void release(Shared& shared, int stage, const Place& place) {
    fence_async_shared();  // what it read comes before others are copied there
    __syncwarp();
    if (place.lane < 2) barrier_arrive_at(&shared.empty[stage], place.lane);
}

// sums += products * scale of the weight row * scale of the token.
DEVICE void add_scaled(Sums& sums, const Sums& products, const float* weights, float token, float token8) {
    float scale[SEGMENTS], scale8[SEGMENTS];
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) {
        scale[i] = weights[i] * token;
        scale8[i] = weights[i] * token8;
    }
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        const int i = 8 * j / SEGMENT;
        sums[4 * j] += products[4 * j] * scale[i];
        sums[4 * j + 1] += products[4 * j + 1] * scale[i];
        sums[4 * j + 2] += products[4 * j + 2] * scale8[i];
        sums[4 * j + 3] += products[4 * j + 3] * scale8[i];
    }
}

// Products of SUBS sub-steps, which one scale follows. Between issue and wait there is no branch, for which the
// compiler would let MMAs wait for each other.
template <int SUBS> DEVICE void multiply(Sums& products, u64 tokens, u64 weights, int column) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < SUB * SUBS; k += 32) {
        wgmma_fp8<CHUNK>(products, columns_on(tokens, column + k), columns_on(weights, column + k), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_touch(products);
}

// How many sub-steps from `sub` on have the same scales.
DEVICE int run_length(const float* scales, int sub, int subs) {
    int run = 1;
    bool same = true;
#pragma unroll
    for (int n = 1; n < MANY; n++) {
        same = same && sub + n < subs;
#pragma unroll
        for (int i = 0; i < SEGMENTS; i++) same = same && scales[(sub + n) % MANY * SCALES + i] == scales[sub * SCALES + i];
        run += same;
    }
    return __shfl_sync(ALL, run, 0);  // as it is, which the compiler is to know
}

// A chunk's products of one step.
DEVICE void add_chunk(Sums& sums, u64 tokens, u64 weights, const float* scales, float token, float token8, int left) {
    const int subs = min(MANY, ceil_div(left, SUB));
#pragma unroll 1
    for (int sub = 0; sub < (MANY == 1 ? 1 : subs);) {
        const int run = MANY == 1 ? 1 : run_length(scales, sub, subs);
        Sums products;
        if (run == 1) multiply<1>(products, tokens, weights, sub * SUB);
        else if (run == 2) multiply<least(2, MANY)>(products, tokens, weights, sub * SUB);
        else if (run == 3) multiply<least(3, MANY)>(products, tokens, weights, sub * SUB);
        else multiply<MANY>(products, tokens, weights, sub * SUB);
        add_scaled(sums, products, scales + sub * SCALES, token, token8);
        wgmma_touch(sums);  // before the next products overwrite these
        sub += run;
    }
}

// All of an item's products, by a warp group: its 64 tokens with both chunks; or, with FEW tokens, those with its
// own chunk, as sums[0].
template <bool FEW>
DEVICE void add_steps(Sums (&sums)[FEW ? 1 : CHUNKS], const Layer& layer, Shared& shared, int chunks, Ring& ring,
                      const Place& place) {
    for (int k0 = 0; k0 < layer.depth; k0 += STEP, ring.advance()) {
        const int stage = ring.stage, half = FEW ? 0 : place.group;
        barrier_wait(&shared.full[stage], ring.phase);
        const u64 tokens = shared_matrix(shared.tokens[stage] + half * HALF_BYTES);
        const float* token_scales = shared.token_scales[stage] + half * HALF + place.row();
        const float token = token_scales[0], token8 = token_scales[8];
#pragma unroll
        for (int i = 0; i < (FEW ? 1 : CHUNKS); i++) {
            const int chunk = FEW ? place.group : i;
            if (chunk >= chunks) continue;
            add_chunk(sums[i], tokens, shared_matrix(shared.weights[stage] + chunk * CHUNK_BYTES),
                      shared.weight_scales[stage] + chunk * SEGMENTS, token, token8, layer.depth - k0);
        }
        release(shared, stage, place);
    }
}
