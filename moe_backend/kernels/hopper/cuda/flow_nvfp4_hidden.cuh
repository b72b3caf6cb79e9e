// flow.cu: NVFP4: the end of an item of the first GEMM, hidden columns as bf16.
#pragma once

#include "flow_shared.cuh"

static_assert(!INTERLEAVED, "the staging memory would have to be waited for");

// A part's hidden columns, in the order in which the second GEMM reads them (`flow_nvfp4_copies.cuh`): of a part's
// 32 columns 16 are even, and lie before those of all odd ones. Column g of eight is of the warp's 64.
template <int N>
DEVICE void stage_hidden(const Layer& layer, const float (&sums)[N / 2], u8* staging, int part, const Place& place) {
    const int g = place.row();
    // Of two columns four apart one lane has the first token's, the other the second's.
    const int at = (g & 1) * (8 * PARTS) + 8 * part + 4 * (g >> 1 & 1) + place.warp;
    u8* row = staging + (place.column() + (g >> 2)) * HIDDEN_BYTES + 4 * at;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float values[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float gate = sums[4 * j + c], up = sums[4 * j + 2 + c];
            values[c] = activate<ACTIVATION>(gate, up, layer.limit, layer.alpha, layer.beta);
        }
        const float other = __shfl_xor_sync(ALL, g < 4 ? values[1] : values[0], 16);
        const u32 word = g < 4 ? to_bf16(values[0], other) : to_bf16(other, values[1]);
        *reinterpret_cast<u32*>(row + 8 * j * HIDDEN_BYTES) = word;
    }
}

// Waits for all warp groups; with that, and since no item of the second GEMM comes before one of the first, the
// staging memory is free when it begins.
template <int N>
DEVICE void store_hidden(const Layer& layer, Shared& shared, const Item& item, float (&sums)[BLOCKS][N / 2],
                         const Place& place) {
    const int thread = 128 * place.group + 32 * place.warp + place.lane;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        stage_hidden<N>(layer, sums[b], shared.staging, WARP_GROUPS * b + place.group, place);
    }
    named_sync(1, CONSUMERS);
    // Pieces of 16 bytes, of even columns and of odd ones; an item has a half or a quarter of 256.
    constexpr int PIECES = GROUP / 8;
    const int first = item.block * PARTS / 8 * 512 + item.block * PARTS % 8 * 32;
    for (int i = thread; i < item.tokens * PIECES; i += CONSUMERS) {
        const int token = i / PIECES, piece = i % PIECES;
        const u8* from = shared.staging + token * HIDDEN_BYTES + piece * 16;
        const int odd = piece / (PIECES / 2), inside = piece % (PIECES / 2);
        u8* to = layer.hidden + static_cast<long long>(item.start + token) * (2 * layer.I) + first;
        *reinterpret_cast<uint4*>(to + 256 * odd + 16 * inside) = *reinterpret_cast<const uint4*>(from);
    }
    tell_hidden(layer, item, thread);
}
