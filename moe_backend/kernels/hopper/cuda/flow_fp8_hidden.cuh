// flow.cu: FP8: the end of an item of the first GEMM, hidden columns as codes with a scale.
#pragma once

#include "flow_shared.cuh"

// Makes of lanes 4g+t, of which each has a byte for each of four tokens, lanes with a token's bytes of
// four lanes with the same t: those of g % 4 = 0 the first token's, and so on.
DEVICE u32 turn_bytes(u32 word, int g) {
    const u32 next = __shfl_xor_sync(ALL, word, 4);
    word = __byte_perm(word, next, g & 1 ? 0x3715 : 0x6240);
    const u32 other = __shfl_xor_sync(ALL, word, 8);
    return __byte_perm(word, other, g & 2 ? 0x3276 : 0x5410);
}

// Hidden columns of a thread's sums, and of each token the largest of a warp.
template <int N>
DEVICE void activate_sums(const Layer& layer, float (&sums)[BLOCKS][N / 2], float* largest,
                          const Place& place) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float amax[2] = {0.0f, 0.0f};
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                float& gate = sums[b][4 * j + c];
                const float up = sums[b][4 * j + 2 + c];
                gate = activate<ACTIVATION>(gate, up, layer.limit, layer.alpha, layer.beta);
                amax[c] = fmaxf(amax[c], fabsf(gate));
            }
            amax[c] = fmaxf(amax[c], __shfl_xor_sync(ALL, amax[c], 4));
            amax[c] = fmaxf(amax[c], __shfl_xor_sync(ALL, amax[c], 8));
            amax[c] = fmaxf(amax[c], __shfl_xor_sync(ALL, amax[c], 16));
        }
        if (place.row() == 0) {
            *reinterpret_cast<float2*>(largest + 8 * j + place.column()) = make_float2(amax[0], amax[1]);
        }
    }
}

// A token's scale from all warps' largest; by one thread for each token.
DEVICE void scale_token(const Layer& layer, Shared& shared, const Item& item, int token) {
    const float* largest = reinterpret_cast<const float*>(shared.staging);
    float amax = 0.0f;
#pragma unroll
    for (int warp = 0; warp < CONSUMER_WARPS; warp++) amax = fmaxf(amax, largest[warp * MOST + token]);
    shared.codes_per_unit[token] = codes_per_unit(amax);
    const float scale = unit_of_codes(amax);
    layer.hidden_scale[static_cast<long long>(item.block) * layer.positions + item.start + token] = scale;
}

// A part's hidden columns as codes, to its 32 bytes of each token's row.
template <int N>
DEVICE void stage_codes(const Shared& shared, const float (&values)[N / 2], u8* to, const Place& place) {
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
        const bool two = j + 1 < N / 8;
        const int k = two ? j + 1 : j;
        const float* factors = shared.codes_per_unit + place.column();
        const float2 a = *reinterpret_cast<const float2*>(factors + 8 * j);
        const float2 b = *reinterpret_cast<const float2*>(factors + 8 * k);
        const float* second = values + 4 * k;
        u32 word = to_fp8(values[4 * j] * a.x, values[4 * j + 1] * a.y, second[0] * b.x, second[1] * b.y);
        const int g = place.row();
        word = turn_bytes(word, g);
        const int token = 8 * j + 4 * (g & 2) + place.column() + (g & 1);
        u8* row = to + token * HIDDEN_BYTES;
        if (two || (g & 2) == 0) *reinterpret_cast<u32*>(row + 8 * place.warp + (g & 4)) = word;
    }
}

// The end of an item of the first GEMM. Waits for all warp groups; with that the staging memory is free when it begins, if
// no item of the second comes before one of the first, or else once all are here.
template <int N>
DEVICE void store_hidden(const Layer& layer, Shared& shared, const Item& item, float (&sums)[BLOCKS][N / 2],
                         const Place& place) {
    const int thread = 128 * place.group + 32 * place.warp + place.lane;
    float* largest = reinterpret_cast<float*>(shared.staging);
    if (INTERLEAVED) named_sync(1, CONSUMERS);  // items of the second were before this one
    activate_sums<N>(layer, sums, largest + thread / 32 * MOST, place);
    named_sync(1, CONSUMERS);
    if (thread < item.tokens) scale_token(layer, shared, item, thread);
    named_sync(1, CONSUMERS);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        stage_codes<N>(shared, sums[b], shared.staging + 32 * (WARP_GROUPS * b + place.group), place);
    }
    named_sync(1, CONSUMERS);
    constexpr int PIECES = GROUP / 16;
    for (int i = thread; i < item.tokens * PIECES; i += CONSUMERS) {
        const int token = i / PIECES, at = i % PIECES * 16;
        const int column = item.block * GROUP + at;
        if (column < layer.I) {
            const u8* from = shared.staging + token * HIDDEN_BYTES + at;
            u8* to = layer.hidden + static_cast<long long>(item.start + token) * layer.I + column;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        }
    }
    tell_hidden(layer, item, thread);
}
