// flow.cu: copies of a step's FP8 weights, tokens and hidden columns, and of their scales.
#pragma once

#include "flow_items.cuh"

// The first and the last row of `hidden_scale` that a step of the second GEMM needs.
DEVICE int first_group(int k0) { return k0 / GROUP; }
DEVICE int last_group(const Layer& layer, int k0) { return (min(k0 + STEP, layer.I) - 1) / GROUP; }

// Bytes of token scales from a row: positions end with the array.
DEVICE int scale_bytes(const Layer& layer, const Item& item) {
    return 4 * min(item.columns(), layer.positions - item.start);
}

template <bool GATED>
DEVICE void copy_weight_scales(const Layer& layer, const Item& item, float* to, int k0, int lane, u64*) {
    constexpr int SCALES = GATED ? SCALES13 : SCALES2;
#pragma unroll
    for (int first = 0; first < PARTS * SCALES; first += 32) {
        const int i = first + lane, part = i / SCALES, nth = i % SCALES;
        if (part >= item.parts) continue;
        const float* from;
        if (GATED) {
            const int row13 = (item.block * GROUP + part * 32) / N13;
            const int row = (2 * item.expert + nth % 2) * layer.scale_rows13 + row13;
            const int column = min((k0 + nth / 2 * SUB13) / K13, layer.scale_columns13 - 1);
            from = layer.w13_scale + row * layer.scale_columns13 + column;
        } else {
            const int row = item.expert * layer.scale_rows2 + (item.block * ROWS + part * 64) / N2;
            const int column = min((k0 + nth * SUB2) / K2, layer.scale_columns2 - 1);
            from = layer.w2_scale + row * layer.scale_columns2 + column;
        }
        copy_float(to + part * PART_SCALES + nth, from);
    }
}

// A step of an item's tokens for the first GEMM, from wherever they are; as the accelerator would write them,
// so that row r has its pieces of 16 bytes in the order of their number xor r. A warp's eight lanes take four
// rows, the warps in turn.
DEVICE void gather_step(const Layer& layer, Shared& shared, int columns, const int* tokens, int stage, int k0,
                        int warp, int lane) {
    const int piece = lane % 8, quad = 16 * warp + lane / 8 * 4;
    const bool there = k0 + 16 * piece < layer.H;
    const u8* from = layer.tokens + (there ? k0 + 16 * piece : 0);
    u8* to = shared.matrices[stage] + PARTS * PART_BYTES + quad * LINE;
    const int swapped = piece ^ (quad & 4);
#pragma unroll 2
    for (int first = 0; first + quad < columns; first += 16 * GATHERERS) {
        const int4 token = *reinterpret_cast<const int4*>(tokens + first + quad);
        const int rows[4] = {token.x, token.y, token.z, token.w};
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const u8* codes = from + static_cast<long long>(rows[r]) * layer.H;
            copy_sixteen(to + (first + r) * LINE + (swapped ^ r) * 16, codes, there);
        }
    }
    const float* scales = layer.token_scale + static_cast<long long>(k0 / STEP) * layer.num_tokens;
    for (int row = 32 * warp + lane; row < columns; row += 32 * GATHERERS) {
        copy_float(shared.token_scales[stage][0] + row, scales + tokens[row]);
    }
}

// A part's weights, by one thread.
template <bool GATED>
DEVICE void copy_part(const Layer& layer, const Item& item, u8* to, int part, int k0, u64* full) {
    const int eight = item.block * (GROUP / 8) + part * 4;
    if (GATED) copy_box<STREAMED>(to, layer.w13, k0, 0, 0, eight, item.expert, full);
    else copy_box<STREAMED>(to, layer.w2, k0, item.expert * layer.H + item.block * ROWS + part * 64, full);
}

// What `copy_hidden` brings.
DEVICE int hidden_bytes(const Layer& layer, const Item& item, int k0) {
    const int groups = 1 + last_group(layer, k0) - first_group(k0);
    return item.columns() * TOKEN_BYTES + groups * scale_bytes(layer, item);
}

// A step's hidden columns and their scales, by one thread.
DEVICE void copy_hidden(const Layer& layer, Shared& shared, const Item& item, int stage, int k0) {
    u64* full = &shared.full[stage];
    u8* to = shared.matrices[stage] + PARTS * PART_BYTES;
    const int rows = item.columns();
    int row = 0;
#pragma unroll 1
    for (; row + 32 <= rows; row += 32) copy_box(to + row * LINE, layer.hidden32, k0, item.start + row, full);
#pragma unroll 1
    for (; row < rows; row += 8) copy_box(to + row * LINE, layer.hidden8, k0, item.start + row, full);
    const int first = first_group(k0), last = last_group(layer, k0);
#pragma unroll 1
    for (int group = first; group <= last; group++) {
        const float* from = layer.hidden_scale + static_cast<long long>(group) * layer.positions + item.start;
        copy_bulk(shared.token_scales[stage][group - first], from, scale_bytes(layer, item), full);
    }
}
