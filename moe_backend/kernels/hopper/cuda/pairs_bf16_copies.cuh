// pairs_bf16.cu: the warp that keeps the ring filled.
#pragma once

#include "pairs_bf16_shared.cuh"

// A step's weights: of the first GEMM by eights of gate and of up rows in turn.
DEVICE void copy_weights(const Layer& layer, const Item& item, u8* to, int k0, u64* full) {
    const int first = item.block * ROWS;
    if (GATED) copy_box(to, layer.weights, 2 * k0, 0, 0, first / 8, item.expert, full);
    else copy_box(to, layer.weights, 2 * k0, first, item.expert, full);
}

DEVICE void copy(const Layer& layer, Shared& shared, int count) {
    const int lane = threadIdx.x % 32, rank = cluster_rank();
    Ring ring;
    for (int n = 0;; n++) {
        const Item item = find_item(shared.hits, count, layer.blocks(), deal(n), rank);
        if (item.kind == END) break;
        const int boxes = ceil_div(item.tokens, BOX);
        const int bytes = boxes * BOX_BYTES + (item.kind == WORK ? PARTS * PART_BYTES : 0);
        for (int k0 = 0; k0 < layer.depth; k0 += STEP, ring.advance()) {
            u64* full = &shared.full[ring.stage];
            // Both blocks have read what was there: what one copies lands in the other as well.
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            if (lane == 0) {
                if (k0 == 0) shared.items[ring.stage] = item;
                barrier_expect(full, bytes);
                if (item.kind == WORK) copy_weights(layer, item, shared.weights[ring.stage], k0, full);
            }
            __syncwarp();
            if (lane < boxes && lane % 2 == rank) {
                copy_box_to_all(shared.tokens[ring.stage] + lane * BOX_BYTES, layer.tokens, 2 * k0, item.start + lane * BOX,
                                full, 3);
            }
        }
    }
    barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
    if (lane == 0) {
        shared.items[ring.stage].kind = END;
        barrier_arrive(&shared.full[ring.stage]);
    }
    __syncwarp();  // together to the end, where blocks meet
}
