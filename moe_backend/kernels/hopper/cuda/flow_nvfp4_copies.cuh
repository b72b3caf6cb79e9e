// flow.cu: copies of a step's NVFP4 weights with their block scales, of tokens and of hidden columns.
//
// Activations are bf16, and of each 256 columns first all even ones lie side by side, then all odd ones, in the
// order in which the decoder yields codes (`device._nvfp4_position`). A step of eight tokens is four matrices of
// eight rows of 128 bytes.
#pragma once

#include "flow_items.cuh"

constexpr int EIGHT_BYTES = 8 * TOKEN_BYTES;

// A part's codes, by one thread.
template <bool GATED>
DEVICE void copy_part(const Layer& layer, const Item& item, u8* to, int part, int k0, u64* full) {
    const int column = first_column(item.block * PARTS + part);
    if (GATED) copy_box<STREAMED>(to, layer.w13, k0 / 2, column % 64, 0, column / 64, item.expert, full);
    else copy_box<STREAMED>(to, layer.w2, k0 / 2, item.expert * layer.H + item.block * ROWS + part * 64, full);
}

// All parts' block scales; an item has all of its parts.
template <bool GATED>
DEVICE void copy_weight_scales(const Layer& layer, const Item& item, u8* to, int k0, int lane, u64* full) {
    if (lane != 0) return;
    const int step = k0 / STEP;
    if (GATED) copy_gate_up_scales(to, layer.w13_scale, item.expert, item.block * PARTS, step, full);
    else copy_down_scales(to, layer.w2_scale, item.expert * layer.H + item.block * ROWS, step, full);
}

// A step of an item's tokens for the first GEMM, from wherever they are; as the accelerator would write them,
// so that row r of eight has its pieces of 16 bytes in the order of their number xor r. The warps take tokens in
// turn.
DEVICE void gather_step(const Layer& layer, Shared& shared, int columns, const int* tokens, int stage, int k0,
                        int warp, int lane) {
    const u8* from = layer.tokens + 2 * k0 + 16 * lane;
    u8* to = shared.matrices[stage] + PARTS * PART_BYTES + lane / 8 * 1024;
#pragma unroll 1
    for (int first = 4 * warp; first < columns; first += 4 * GATHERERS) {
        const int4 token = *reinterpret_cast<const int4*>(tokens + first);
        const int rows[4] = {token.x, token.y, token.z, token.w};
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = first % 8 + r;
            copy_sixteen(to + first / 8 * EIGHT_BYTES + row * LINE + (lane % 8 ^ row) * 16,
                         from + static_cast<long long>(rows[r]) * (2 * layer.H), true);
        }
    }
}

// What `copy_hidden` brings.
DEVICE int hidden_bytes(const Layer&, const Item& item, int) { return item.columns() * TOKEN_BYTES; }

// A step's hidden columns, by one thread.
DEVICE void copy_hidden(const Layer& layer, Shared& shared, const Item& item, int stage, int k0) {
    u8* to = shared.matrices[stage] + PARTS * PART_BYTES;
    const int rows = item.columns();
#pragma unroll 1
    for (int row = 0; row < rows; row += 8, to += EIGHT_BYTES) {
        copy_box(to, layer.hidden8, 0, item.start + row, k0 / 64, &shared.full[stage]);
    }
}
