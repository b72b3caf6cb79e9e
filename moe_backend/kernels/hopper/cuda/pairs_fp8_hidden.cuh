// pairs.cu: FP8: the end of an item of the first GEMM: hidden columns as codes, and their scale.
#pragma once

#include "pairs_epilogues.cuh"

// As turn_words, with halves of words: of lane t, first word: columns 0 and 1, second word: columns 2 and 3; afterwards
// all of column t.
DEVICE uint2 turn_halves(u32 first, u32 second, int t) {
    const bool odd = t & 1, high = t & 2;
    // What the neighbour wants, and what this lane has for itself.
    const u32 given = __byte_perm(first, second, odd ? 0x5410 : 0x7632);
    const u32 own = __byte_perm(first, second, odd ? 0x7632 : 0x5410);
    const u32 got = __shfl_xor_sync(ALL, given, 1);
    // Column t % 2, and that plus 2, of two lanes.
    const u32 low = odd ? __byte_perm(got, own, 0x5410) : __byte_perm(own, got, 0x5410);
    const u32 upper = odd ? __byte_perm(got, own, 0x7632) : __byte_perm(own, got, 0x7632);
    const u32 other = __shfl_xor_sync(ALL, high ? low : upper, 2);
    return high ? uint2{other, upper} : uint2{low, other};
}

// Hidden columns of the sums: of each chunk's 64, in place of the gate's.
template <int COUNT> DEVICE void activate_sums(const Layer& layer, Sums (&sums)[COUNT], float (&amax)[2]) {
    amax[0] = amax[1] = 0.0f;
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
#pragma unroll
        for (int i = 0; i < CHUNK / 4; i++) {
            float& gate = sums[c][i];
            gate = activate<ACTIVATION>(gate, sums[c][CHUNK / 4 + i], layer.limit, layer.alpha, layer.beta);
            amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(gate));
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        amax[r] = fmaxf(amax[r], __shfl_xor_sync(ALL, amax[r], 1));
        amax[r] = fmaxf(amax[r], __shfl_xor_sync(ALL, amax[r], 2));
    }
}

// The end of an item of the first GEMM, for a warp group; with FEW tokens the other has the other 64 hidden columns.
template <bool FEW>
DEVICE void store_hidden(const Layer& layer, Shared& shared, const Item& item, Sums (&sums)[FEW ? 1 : CHUNKS],
                         const Place& place) {
    float amax[2];
    activate_sums(layer, sums, amax);
    const int t = place.column();
    if (FEW) {
        named_sync(1, CONSUMERS);  // what was here before has been read
        if (t < 2) shared.largest[place.group][place.row() + 8 * t] = t ? amax[1] : amax[0];
        named_sync(1, CONSUMERS);
#pragma unroll
        for (int r = 0; r < 2; r++) amax[r] = fmaxf(amax[r], shared.largest[1 - place.group][place.row() + 8 * r]);
    }
    const int first = (FEW ? 0 : place.group * HALF) + place.row();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int token = first + 8 * r;
        const bool there = token < item.tokens;
        const long long position = item.start + token;
        const float factor = codes_per_unit(amax[r]);
        if (there && t == 0 && (!FEW || place.group == 0)) {
            layer.out_scale[static_cast<long long>(item.block) * layer.positions + position] = unit_of_codes(amax[r]);
        }
#pragma unroll
        for (int c = 0; c < (FEW ? 1 : CHUNKS); c++) {
#pragma unroll
            for (int j = 0; j < CHUNK / 16; j += 4) {
                const float* v = &sums[c][4 * j + 2 * r];
                const uint2 codes = turn_halves(to_fp8(v[0] * factor, v[1] * factor, v[4] * factor, v[5] * factor),
                                                to_fp8(v[8] * factor, v[9] * factor, v[12] * factor, v[13] * factor), t);
                const int column = item.block * ROWS + (FEW ? place.group : c) * CHUNK_ROWS + 8 * (j + t);
                if (there && column < layer.rows) {
                    *reinterpret_cast<uint2*>(static_cast<u8*>(layer.out) + position * layer.rows + column) = codes;
                }
            }
        }
    }
}
