// GEMMs with weights first: who has what of their results, and results in bf16 to rows in memory: hidden columns, or outputs
// before the sum or as sums.
#pragma once

#include "hits.cuh"
#include "targets.cuh"

// Number of a warp group that multiplies, and of its warp and lane therein.
struct Place {
    int group, warp, lane;

    DEVICE int row() const { return lane / 4; }
    DEVICE int column() const { return lane % 4 * 2; }
    // Which eight of a part's rows those are whose token a lane stores with `store_transposed`.
    DEVICE int eight() const { return 2 * warp + (lane >> 3 & 1); }
};

// Where results go.
struct Outputs {
    u16* out;  // `[positions, columns]` bf16
    int columns;
    // With targets: the thread's, of every 128th token; room for these in shared memory; and the sums, `[tokens, columns]`
    // bf16, which they are rows of.
    const Target* own;
    Target* targets;
    u16* sums;
};

// Targets that a thread of a warp group has, of so many tokens; room for them all is needed, in 128s.
DEVICE constexpr int targets_of(int tokens) { return (tokens + 127) / 128; }

// The targets of an item from position `first` on: of every 128th token, of a thread; if AIMED, else none.
template <int TOKENS, bool AIMED> struct Targets {
    Target own[targets_of(TOKENS)];

    DEVICE Targets(const Target* targets, int first, int tokens, const Place& place) {
#pragma unroll
        for (int i = 0; i < targets_of(TOKENS); i++) {
            const int token = 128 * i + 32 * place.warp + place.lane;
            own[i] = AIMED && token < tokens ? targets[first + token] : Target{-1, 1.0f};
        }
    }
};

// Eight bf16 numbers with a weight.
DEVICE uint4 weighted(const uint4& row, float weight) {
    const u32 pairs[4] = {row.x, row.y, row.z, row.w};
    u32 products[4];
#pragma unroll
    for (int i = 0; i < 4; i++) products[i] = to_bf16(low_bf16(pairs[i]) * weight, high_bf16(pairs[i]) * weight);
    return {products[0], products[1], products[2], products[3]};
}

// A warp group's results: of COUNT parts of 64, every `apart`th from `part` on, with N tokens. They are turned
// around in shared memory, TURNED tokens at once, so that a thread stores 16 bytes.
//
// turned: COUNT * TURNED * 128 bytes; outputs: the item's from first_row and first_column on, with AIMED those that have a
// target there; parts: that there are, for a thread's eight of their columns; eight: which eight of 64 results a lane has.
template <int N, int COUNT, int TURNED, bool AIMED>
DEVICE void store_outputs(const float (&sums)[COUNT][N / 2], u8* turned, const Outputs& outputs, int first_row,
                          int first_column, int item_tokens, int part, int apart, int parts, int eight, const Place& place) {
    constexpr int PART = TURNED * 128;
    // Of a token's 64 results, eight pieces of 16 bytes, which change places with the token: against
    // bank conflicts.
    const int token = place.lane & 7;
    u8* row = turned + token * 128 + (eight ^ token) * 16;
    // What a thread stores: a piece of every 16th token.
    const int thread = 32 * place.warp + place.lane, n = thread >> 3, c = thread & 7;
    const u8* from = turned + n * 128 + (c ^ (n & 7)) * 16;
    const int columns = outputs.columns, column = first_column + c * 8;
    u16* to = outputs.out + static_cast<long long>(first_row + n) * columns + column;
#pragma unroll
    for (int first = 0; first < N; first += TURNED) {
        const int tokens = least(N - first, TURNED);
        named_sync(2 + place.group, 128);  // what was here before has been stored
        if (AIMED && first == 0) {
#pragma unroll
            for (int i = 0; i < targets_of(N); i++) outputs.targets[128 * i + thread] = outputs.own[i];
        }
#pragma unroll
        for (int b = 0; b < COUNT; b++) {
#pragma unroll
            for (int j = first / 8; j < (first + tokens) / 8; j++) {
                const float(&d)[N / 2] = sums[b];
                store_transposed(row + b * PART + (8 * j - first) * 128, to_bf16(d[4 * j], d[4 * j + 1]),
                                 to_bf16(d[4 * j + 2], d[4 * j + 3]));
            }
        }
        named_sync(2 + place.group, 128);
#pragma unroll (AIMED ? 1 : TURNED)  // with targets a turn is long
        for (int m = 0; m < tokens; m += 16) {
            if (first + m + n >= item_tokens) continue;
            u16* there = to + static_cast<long long>(first + m) * columns;
            Target target = {-1, 1.0f};
            if (AIMED) target = outputs.targets[first + m + n];
            if (target.row >= 0) there = outputs.sums + static_cast<long long>(target.row) * columns + column;
#pragma unroll
            for (int b = 0; b < COUNT; b++) {
                const int own = part + apart * b;
                if (own >= parts) continue;
                uint4 bits = *reinterpret_cast<const uint4*>(from + b * PART + m * 128);
                if (AIMED) bits = weighted(bits, target.weight);  // with 1 as they are
                *reinterpret_cast<uint4*>(there + own * 64) = bits;
            }
        }
    }
}
