// pairs.cu: bf16: the end of an item of the first GEMM.
#pragma once

#include "pairs_epilogues.cuh"

// Hidden columns to their rows, for a warp group; with FEW tokens the other has the other 64.
template <bool FEW>
DEVICE void store_hidden(const Layer& layer, Shared&, const Item& item, Sums (&sums)[FEW ? 1 : CHUNKS],
                         const Place& place) {
#pragma unroll
    for (int c = 0; c < (FEW ? 1 : CHUNKS); c++) {
#pragma unroll
        for (int i = 0; i < CHUNK / 4; i++) {
            sums[c][i] = activate<ACTIVATION>(sums[c][i], sums[c][CHUNK / 4 + i], layer.limit, layer.alpha, layer.beta);
        }
        const int column = item.block * ROWS + (FEW ? place.group : c) * CHUNK_ROWS;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int token = (FEW ? 0 : place.group * HALF) + place.row() + 8 * r;
            u16* row = static_cast<u16*>(layer.out) + static_cast<long long>(item.start + token) * layer.rows;
            store_row<CHUNK / 16>(sums[c], r, 1.0f, row, column, layer.rows, token < item.tokens, place.column());
        }
    }
}
