// pairs_bf16.cu: the end of an item: hidden columns, or outputs.
#pragma once

#include "pairs_bf16_shared.cuh"

// Hidden columns of both of a warp's parts, eight each, where the first's gate and up rows were.
template <int N> DEVICE void activate_sums(const Layer& layer, float (&sums)[BLOCKS][N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        float hidden[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float gate = sums[c / 2][i + c % 2], up = sums[c / 2][i + 2 + c % 2];
            hidden[c] = activate<ACTIVATION>(gate, up, layer.limit, layer.alpha, layer.beta);
        }
#pragma unroll
        for (int c = 0; c < 4; c++) sums[0][i + c] = hidden[c];
    }
}

// The end of an item, for a warp group.
template <int N>
DEVICE void store(const Layer& layer, Shared& shared, const Item& item, float (&sums)[BLOCKS][N / 2],
                  const ItemTargets& targets, Place place) {
    compute_here(place.lane);
    if (GATED) activate_sums<N>(layer, sums);
    const Outputs outputs = {layer.out, layer.rows, targets.own, shared.targets[place.group], layer.sums};
    const auto& results = reinterpret_cast<const float(&)[RESULTS][N / 2]>(sums);
    const int first = item.block * ROWS, own = first + place.lane % 8 * 8;
    // Of a part's hidden columns a warp has eight, and its other part's are 32 further on.
    const int eight = GATED ? 4 * (place.lane >> 3 & 1) + place.warp : place.eight();
    store_outputs<N, RESULTS, TURNED, LONE>(results, shared.staging[place.group], outputs, item.start, first, item.tokens,
                                            RESULTS * place.group, 1, ceil_div(layer.rows - own, 64), eight, place);
}
