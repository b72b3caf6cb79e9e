// pairs_nvfp4.cu: the warps that keep the rings filled.
#pragma once

#include "pairs_nvfp4_shared.cuh"

// Tokens of all items. Of a step's four matrices of 64 columns a half needs one of even and one of odd columns:
// `MATRIX_BYTES` each, of which each block of the pair brings one to both.
DEVICE void copy_tokens(const Layer& layer, Shared& shared, int count) {
    const int lane = threadIdx.x % 32, rank = cluster_rank();
    Ring ring;
    for (int n = 0;; n++) {
        const Item item = find_item(shared.hits, count, layer.blocks(), deal(n), rank);
        if (item.kind == END) break;
        const int boxes = ceil_div(item.tokens, BOX);
        for (int half = 0; half < 2 * layer.steps(); half++, ring.advance()) {
            u64* full = &shared.full[ring.stage];
            // Both blocks have read what was there: what one copies lands in the other as well.
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            if (lane == 0) {
                if (half == 0) shared.items[ring.stage] = item;
                barrier_expect(full, 2 * boxes * BOX_BYTES);
            }
            __syncwarp();
            if (lane < boxes) {
                const int x = (half / 2 * 4 + 2 * rank + half % 2) * LINE;
                u8* to = shared.tokens[ring.stage] + rank * MATRIX_BYTES + lane * BOX_BYTES;
                copy_box_to_all(to, layer.tokens, x, item.start + lane * BOX, full, 3);
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

// A part's codes, by one thread.
DEVICE void copy_part(const Layer& layer, const Item& item, u8* to, int part, int k0, u64* full) {
    const int nth = item.block * PARTS + part, column = first_column(nth);
    if (GATED) copy_box<STREAMED>(to, layer.weights, k0 / 2, column % 64, 0, column / 64, item.expert, full);
    else copy_box<STREAMED>(to, layer.weights, k0 / 2, item.expert * layer.rows + nth * 64, full);
}

// Codes of all items, with their block scales.
DEVICE void copy_codes(const Layer& layer, Shared& shared, int count) {
    const int lane = threadIdx.x % 32, rank = cluster_rank();
    CodeRing ring;
    for (int n = 0;; n++) {
        const Item item = find_item(shared.hits, count, layer.blocks(), deal(n), rank);
        if (item.kind == END) break;
        if (item.kind == IDLE) continue;
        for (int k0 = 0; k0 < layer.depth; k0 += STEP, ring.advance()) {
            u64* full = &shared.codes_full[ring.stage];
            barrier_wait(&shared.codes_empty[ring.stage], ring.phase ^ 1);
            if (lane == 0) {
                barrier_expect(full, PARTS * (PART_BYTES + PART_SCALES));
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    copy_part(layer, item, shared.codes[ring.stage] + part * PART_BYTES, part, k0, full);
                }
                u8* to = shared.scales[ring.stage];
                const int step = k0 / STEP, row = item.expert * layer.rows + item.block * PARTS * 64;
                if (GATED) copy_gate_up_scales(to, layer.scales, item.expert, item.block * PARTS, step, full);
                else copy_down_scales(to, layer.scales, row, step, full);
            }
            __syncwarp();
        }
    }
    __syncwarp();  // as above
}
