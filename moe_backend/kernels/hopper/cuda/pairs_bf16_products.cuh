// pairs_bf16.cu: a warp group's products.
#pragma once

#include "pairs_bf16_shared.cuh"
#include "wgmma.cuh"

// All of an item's products, by a warp group. While it waits for its MMAs the tensor cores have the other's; a stage is
// free as soon as they have ended, which with three stages counts for more than MMAs that follow each other.
template <int N>
DEVICE void add_steps(float (&sums)[BLOCKS][N / 2], const Layer& layer, Shared& shared, Ring& ring, const Place& place) {
    for (int k0 = 0; k0 < layer.depth; k0 += STEP, ring.advance()) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        const u64 tokens = shared_matrix(shared.tokens[ring.stage]);
        const u64 weights = shared_matrix(shared.weights[ring.stage] + BLOCKS * place.group * PART_BYTES);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < LINE; k += 32) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                wgmma_bf16<N>(sums[b], columns_on(matrix_on(weights, 8 * b), k), columns_on(tokens, k));
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        release(&shared.empty[ring.stage], place.lane);
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) wgmma_touch(sums[b]);
}
