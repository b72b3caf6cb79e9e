// pairs_nvfp4.cu: the end of an item: hidden columns in the decoder's order, or outputs.
#pragma once

#include "pairs_nvfp4_shared.cuh"

// Of a warp group's 64 hidden columns 32 are even, and lie side by side before the odd ones; column g of eight is of
// the warp's 64. To shared memory, for the tokens from `first` on.
template <int N>
DEVICE void stage_hidden(const Layer& layer, const float (&sums)[BLOCKS][N / 2], u8* staging, int first, int tokens,
                         const Place& place) {
    const int g = place.row();
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        // Of two columns four apart one lane has the first token's, the other the second's.
        const int at = (g & 1) * (8 * BLOCKS) + 8 * b + 4 * (g >> 1 & 1) + place.warp;
        u8* row = staging + (place.column() + (g >> 2)) * HIDDEN_BYTES + 4 * at;
#pragma unroll
        for (int i = 0; i < TURNED / 8; i++) {
            if (8 * i >= tokens) continue;  // not the loop's end, or the compiler does not unroll it
            const int j = first / 8 + i;
            float values[2];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float gate = sums[b][4 * j + c], up = sums[b][4 * j + 2 + c];
                values[c] = activate<ACTIVATION>(gate, up, layer.limit, layer.alpha, layer.beta);
            }
            const float other = __shfl_xor_sync(ALL, g < 4 ? values[1] : values[0], 16);
            const u32 word = g < 4 ? to_bf16(values[0], other) : to_bf16(other, values[1]);
            *reinterpret_cast<u32*>(row + 8 * i * HIDDEN_BYTES) = word;
        }
    }
}

// The end of an item of the first GEMM, for a warp group.
template <int N>
DEVICE void store_hidden(const Layer& layer, Shared& shared, const Item& item, const float (&sums)[BLOCKS][N / 2],
                         const Place& place) {
    // What a thread stores: of every 16th token a piece of 16 bytes, of four of even and four of odd columns.
    const int thread = 32 * place.warp + place.lane, n = thread / 8, piece = thread % 8;
    const u8* from = shared.staging[place.group] + n * HIDDEN_BYTES + piece * 16;
    const int column = item.block / 2 * 256 + piece / 4 * 128 + item.block % 2 * 64 + 32 * place.group + piece % 4 * 8;
    u16* to = layer.out + static_cast<long long>(item.start + n) * layer.rows + column;
#pragma unroll
    for (int first = 0; first < N; first += TURNED) {
        const int tokens = least(N - first, TURNED);
        named_sync(2 + place.group, 128);  // what was here before has been stored
        stage_hidden<N>(layer, sums, shared.staging[place.group], first, tokens, place);
        named_sync(2 + place.group, 128);
#pragma unroll
        for (int m = 0; m < tokens; m += 16) {
            if (first + m + n >= item.tokens) continue;
            *reinterpret_cast<uint4*>(to + static_cast<long long>(first + m) * layer.rows) =
                *reinterpret_cast<const uint4*>(from + m * HIDDEN_BYTES);
        }
    }
}

// The end of an item of the second GEMM, for a warp group.
template <int N>
DEVICE void store_rows(const Layer& layer, Shared& shared, const Item& item, const float (&sums)[BLOCKS][N / 2],
                       const ItemTargets& targets, const Place& place) {
    const Outputs outputs = {layer.out, layer.rows, targets.own, shared.targets[place.group], layer.sums};
    store_outputs<N, BLOCKS, TURNED, LONE>(sums, shared.staging[place.group], outputs, item.start, item.block * ROWS,
                                           item.tokens, BLOCKS * place.group, 1, PARTS, place.eight(), place);
}
