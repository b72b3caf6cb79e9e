// flow.cu: what an item is, what the layer is, and what is in shared memory.
#pragma once

#include "flow_sizes.cuh"
#include "outputs.cuh"

struct alignas(16) Item {
    int parts;   // 0: there are no more
    int gated;   // of the first GEMM
    int ready;   // its hidden columns are there, or it needs none
    int hit;     // number of the expert in the list
    int expert;
    int block;   // of hidden columns, or of output rows
    int start;   // first position
    int tokens;

    // As many as are copied and multiplied, perhaps beyond the expert's own.
    DEVICE int columns() const { return ceil_div(tokens, 8) * 8; }
};

struct Shared {
    u8 matrices[STAGES][PARTS * PART_BYTES + MOST * TOKEN_BYTES];
    u8 staging[STAGING_BYTES];
    float token_scales[SCALED_STAGES][2][SCALED];
    alignas(SCALE_BYTES == 0 ? 16 : 128) Scale weight_scales[STAGES][PARTS * PART_SCALES];
    Item items[STAGES];
    Item queue[QUEUE];
    int tokens[QUEUE + 1][MOST];  // of items of the first GEMM; one of them may still be copied
    Hit hits[EXPERTS + 1];
    float codes_per_unit[SCALED];
    int warp_totals[THREADS / 32];
    u64 full[STAGES], empty[STAGES];  // of the ring
    u64 queued[QUEUE], taken[QUEUE];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "what the launch asks for");

struct Layer {
    const TensorMap *w13, *w2;
    const TensorMap *hidden32, *hidden8;  // boxes of 32 and of 8 positions
    const Scales *w13_scale, *w2_scale;
    const float *w13_global, *w2_global;
    const u8* tokens;
    const float* token_scale;
    const int *list, *token_of;
    int *ticket, *ready;
    u8* hidden;  // bytes of e4m3 or bf16, as `tokens` are
    float* hidden_scale;
    u16* partial;
    float limit, alpha, beta;
    int H, I, num_tokens, positions;
    int scale_rows13, scale_columns13, scale_rows2, scale_columns2;

    DEVICE int blocks13() const { return ceil_div(I, GROUP); }
    DEVICE int blocks2() const { return ceil_div(H, ROWS); }
    DEVICE int depth(bool gated) const { return gated ? H : I; }
    DEVICE int steps(bool gated) const { return ceil_div(depth(gated), STEP); }
};

// A warp has read all of a stage.
DEVICE void release(Shared& shared, int stage, const Place& place) {
    fence_async_shared();  // what it read comes before others are copied there
    __syncwarp();
    if (place.lane == 0) barrier_arrive(&shared.empty[stage]);
}

// All consumers have stored an item's hidden columns, which other blocks' accelerators read next.
DEVICE void tell_hidden(const Layer& layer, const Item& item, int thread) {
    fence_async_global();
    named_sync(1, CONSUMERS);
    if (thread == 0) add_release(layer.ready + item.hit, 1);
}
