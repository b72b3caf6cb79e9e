// pairs_fp8.cu: the end of an item: hidden columns as codes with a scale, or outputs.
#pragma once

#include "pairs_fp8_shared.cuh"

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

// The same with halves of words: of lane t, first word: columns 0 and 1, second word: columns 2 and 3; afterwards
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
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j += 4) {
                    u32 words[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float* v = &sums[c][4 * (j + i) + 2 * r];
                        words[i] = to_bf16(v[0] * target.weight, v[1] * target.weight);
                    }
                    turn_words(words, t);
                    const int column = item.block * ROWS + (FEW ? place.group : c) * CHUNK_ROWS + 8 * (j + t);
                    if (token < item.tokens && column < layer.rows) {
                        *reinterpret_cast<uint4*>(row + column) = {words[0], words[1], words[2], words[3]};
                    }
                }
            }
        }
    }
};
