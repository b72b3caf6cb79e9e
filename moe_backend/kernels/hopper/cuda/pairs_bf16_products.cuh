// pairs.cu: bf16: a warp group's products.
#pragma once

#include "pairs_shared.cuh"
#include "wgmma.cuh"

// All of an item's products, by a warp group: its 64 tokens with both chunks; or, with FEW tokens, those with its
// own chunk, as sums[0]. Between issue and wait there is no branch, for which the compiler would let MMAs wait for each
// other: a chunk that has no rows is multiplied with what was there before, and not stored.
template <bool FEW>
DEVICE void add_steps(Sums (&sums)[FEW ? 1 : CHUNKS], const Layer& layer, Shared& shared, int, Ring& ring,
                      const Place& place) {
    for (int k0 = 0; k0 < layer.depth; k0 += STEP, ring.advance()) {
        const int stage = ring.stage, half = FEW ? 0 : place.group;
        barrier_wait(&shared.full[stage], ring.phase);
        const u64 tokens = shared_matrix(shared.tokens[stage] + half * HALF_BYTES);
        const u64 weights = shared_matrix(shared.weights[stage] + (FEW ? place.group * CHUNK_BYTES : 0));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < LINE; k += 32) {
#pragma unroll
            for (int i = 0; i < (FEW ? 1 : CHUNKS); i++) {
                wgmma_bf16<CHUNK>(sums[i], columns_on(tokens, k), columns_on(matrix_on(weights, i * CHUNK / 8), k));
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < (FEW ? 1 : CHUNKS); i++) wgmma_touch(sums[i]);
        release(shared, stage, place);
    }
}
