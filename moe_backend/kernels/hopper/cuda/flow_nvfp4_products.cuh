// flow.cu: NVFP4: a warp group's products, of codes that become bf16 in registers.
//
// While the tensor cores work on a batch of codes the next is decoded, into other registers.
#pragma once

#include "flow_shared.cuh"
#include "nvfp4_operands.cuh"
#include "wgmma.cuh"

// All of an item's products, by a warp group. MMAs under way from one turn of a loop to the next would be made to
// wait for each other, so none are.
template <int N, bool GATED>
DEVICE void add_steps(float (&sums)[BLOCKS][N / 2], const Layer& layer, Shared& shared, const Item&, Ring& ring,
                      const Place& place) {
    Batch batches[2];
    Codes codes;
    for (int steps = layer.steps(GATED); steps > 0; steps--, ring.advance()) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        if (GATED) fence_async_shared();  // tokens came by ordinary copies
        const u64 tokens = shared_matrix(shared.matrices[ring.stage] + PARTS * PART_BYTES, 4 * 1024);
#pragma unroll
        for (int n = 0; n < 4 * BLOCKS; n++) {  // a group of a part
            const int b = n / 4, half = n / 2 % 2, group = n % 2;
            Batch& batch = batches[n % 2];
            wgmma_wait<1>();  // for the batch that had these registers
            const int part = WARP_GROUPS * b + place.group;
            if (group == 0) {
                codes.load(shared.matrices[ring.stage] + part * PART_BYTES,
                           shared.weight_scales[ring.stage] + part * PART_SCALES, half, place.warp, place.lane);
            }
            codes.decode_group(batch, group);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Of even columns, then of odd ones, 16 of each word: the first four words' fill a matrix.
                const int inside = (2 * group + i) * 32;
                wgmma_bf16<N>(sums[b], batch[2 * i], columns_on(matrix_on(tokens, half), inside));
                wgmma_bf16<N>(sums[b], batch[2 * i + 1], columns_on(matrix_on(tokens, 2 + half), inside));
            }
            wgmma_commit();
        }
        wgmma_wait<0>();
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) wgmma_touch(sums[b]);
        release(shared, ring.stage, place);
    }
}

// Scales of all of an item: the experts' own, and what the decoder leaves out.
template <int N, bool GATED>
DEVICE void scale_sums(float (&sums)[BLOCKS][N / 2], const Layer& layer, const Item& item) {
    const float first = 256.0f * (GATED ? layer.w13_global[2 * item.expert] : layer.w2_global[item.expert]);
    const float second = GATED ? 256.0f * layer.w13_global[2 * item.expert + 1] : first;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[b][i] *= i & 2 ? second : first;
    }
}
