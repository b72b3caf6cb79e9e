// flow.cu: the ends of items: hidden columns, and outputs.
#pragma once

#if FORMAT == 1
#include "flow_fp8_hidden.cuh"
#else
#include "flow_nvfp4_hidden.cuh"
#endif

// The end of an item of the second GEMM, for a warp group.
template <int N>
DEVICE void store_rows(const Layer& layer, Shared& shared, const Item& item,
                       const float (&sums)[BLOCKS][N / 2], const Place& place) {
    store_outputs<N, BLOCKS, TURNED, false>(sums, shared.staging + place.group * BLOCKS * TURNED * 128,
                                            {layer.partial, layer.H, {}, nullptr, nullptr}, item.start, item.block * ROWS,
                                            item.tokens, place.group, WARP_GROUPS, item.parts, place.eight(), place);
}
