// pairs_nvfp4.cu: a warp group's products, of codes that become bf16 in registers.
#pragma once

#include "nvfp4_operands.cuh"
#include "pairs_nvfp4_shared.cuh"
#include "wgmma.cuh"

// All of an item's products, by a warp group: while the tensor cores work on a batch of codes the next is decoded,
// into other registers. MMAs under way from one turn of a loop to the next would be made to wait for each other, so
// none are; the other warp group's fill that gap.
template <int N>
DEVICE void add_steps(float (&sums)[BLOCKS][N / 2], const Layer& layer, Shared& shared, CodeRing& code_ring, Ring& ring,
                      const Place& place) {
    Batch batches[2];
    Codes codes;
    for (int steps = layer.steps(); steps > 0; steps--) {
        const int first = ring.stage;
        barrier_wait(&shared.full[first], ring.phase);
        ring.advance();
        const int second = ring.stage;
        barrier_wait(&shared.full[second], ring.phase);
        ring.advance();
        barrier_wait(&shared.codes_full[code_ring.stage], code_ring.phase);
        const u64 tokens[2] = {shared_matrix(shared.tokens[first]), shared_matrix(shared.tokens[second])};
        const u8* parts = shared.codes[code_ring.stage] + BLOCKS * place.group * PART_BYTES;
        const u8* scales = shared.scales[code_ring.stage] + BLOCKS * place.group * PART_SCALES;
#pragma unroll
        for (int n = 0; n < 4 * BLOCKS; n++) {  // a group of a part's half
            const int half = n / (2 * BLOCKS), b = n / 2 % BLOCKS, group = n % 2;
            Batch& batch = batches[n % 2];
            wgmma_wait<1>();  // for the batch that had these registers
            if (n == 2 * BLOCKS + 1) release(&shared.empty[first], place.lane);  // its MMAs have ended with that
            if (group == 0) {
                codes.load(parts + b * PART_BYTES, scales + b * PART_SCALES, half, place.warp, place.lane);
            }
            codes.decode_group(batch, group);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Of even columns, then of odd ones, 16 of each word: the first four words' fill a matrix.
                const u64 even = columns_on(tokens[half], (2 * group + i) * 32);
                wgmma_bf16<N>(sums[b], batch[2 * i], even);
                wgmma_bf16<N>(sums[b], batch[2 * i + 1], matrix_on(even, TILE / 8));
            }
            wgmma_commit();
        }
        fence_async_shared();  // codes were read before others are copied there
        __syncwarp();
        if (place.lane == 0) barrier_arrive(&shared.codes_empty[code_ring.stage]);
        code_ring.advance();
        wgmma_wait<0>();
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) wgmma_touch(sums[b]);
        release(&shared.empty[second], place.lane);
    }
}

// Scales of all of an item, of rows g and of rows g + 8: the experts' own, and what the decoder leaves out.
struct Scales {
    float first, second;

    DEVICE Scales(const Layer& layer, const Item& item) {
        first = 256.0f * layer.weight_global[GATED ? 2 * item.expert : item.expert];
        second = GATED ? 256.0f * layer.weight_global[2 * item.expert + 1] : first;
    }
    template <int N> DEVICE void apply(float (&sums)[BLOCKS][N]) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int i = 0; i < N; i++) sums[b][i] *= i & 2 ? second : first;
        }
    }
};
