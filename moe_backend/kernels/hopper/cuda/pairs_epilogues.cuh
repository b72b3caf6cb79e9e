// pairs.cu: the end of an item: outputs, and what both formats' hidden columns need.
#pragma once

#include "pairs_shared.cuh"

// Of four lanes each has a word for each of four columns of words; lane t is to have all four words of column t,
// in the order of the lanes.
DEVICE void turn_words(u32 (&words)[4], int t) {
    const bool odd = t & 1, high = t & 2;
    const u32 a = __shfl_xor_sync(ALL, odd ? words[0] : words[1], 1);
    const u32 b = __shfl_xor_sync(ALL, odd ? words[2] : words[3], 1);
    // Two lanes' words of column t % 2, and of that plus 2.
    const u32 low0 = odd ? a : words[0], low1 = odd ? words[1] : a;
    const u32 high0 = odd ? b : words[2], high1 = odd ? words[3] : b;
    const u32 c = __shfl_xor_sync(ALL, high ? low0 : high0, 2);
    const u32 d = __shfl_xor_sync(ALL, high ? low1 : high1, 2);
    words[0] = high ? c : low0;
    words[1] = high ? d : low1;
    words[2] = high ? high0 : c;
    words[3] = high ? high1 : d;
}

// A token's numbers, GROUPS times eight neighbours' of a chunk, with a weight as bf16 to its row from `column` on: those of
// token `r` of a thread's two, of which four lanes have the same.
template <int GROUPS>
DEVICE void store_row(const Sums& sums, int r, float weight, u16* row, int column, int columns, bool there, int t) {
#pragma unroll
    for (int j = 0; j < GROUPS; j += 4) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* v = &sums[4 * (j + i) + 2 * r];
            words[i] = to_bf16(v[0] * weight, v[1] * weight);
        }
        turn_words(words, t);
        const int own = column + 8 * (j + t);
        if (there && own < columns) *reinterpret_cast<uint4*>(row + own) = {words[0], words[1], words[2], words[3]};
    }
}

// Where a thread's outputs of the second GEMM go, of two tokens.
template <bool FEW> struct Rows {
    Target targets[2];

    DEVICE Rows(const Layer& layer, const Item& item, const Place& place) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int token = first(place) + 8 * r;
            targets[r] = LONE && token < item.tokens ? layer.targets[item.start + token] : Target{-1, 1.0f};
        }
    }

    DEVICE int first(const Place& place) const { return (FEW ? 0 : place.group * HALF) + place.row(); }

    // The end of an item, for a warp group.
    DEVICE void store(const Layer& layer, const Item& item, const Sums (&sums)[FEW ? 1 : CHUNKS],
                      const Place& place) const {
        const int t = place.column();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int token = first(place) + 8 * r;
            const Target& target = targets[r];
            u16* row = target.row < 0 ? static_cast<u16*>(layer.out) + static_cast<long long>(item.start + token) * layer.rows
                                      : layer.sums + static_cast<long long>(target.row) * layer.rows;
#pragma unroll
            for (int c = 0; c < (FEW ? 1 : CHUNKS); c++) {
                const int column = item.block * ROWS + (FEW ? place.group : c) * CHUNK_ROWS;
                store_row<CHUNK / 8>(sums[c], r, target.weight, row, column, layer.rows, token < item.tokens, t);
            }
        }
    }
};
