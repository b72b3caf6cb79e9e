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
    constexpr int PART = TURNED * 128;
    u8* turned = shared.staging + place.group * BLOCKS * PART;
    // Of a token's 64 outputs, eight pieces of 16 bytes, which change places with the token: against
    // bank conflicts.
    const int piece = 2 * place.warp + (place.lane >> 3 & 1), token = place.lane & 7;
    u8* row = turned + token * 128 + (piece ^ token) * 16;
    // What a thread stores: a piece of every 16th token.
    const int thread = 32 * place.warp + place.lane, n = thread >> 3, c = thread & 7;
    const u8* from = turned + n * 128 + (c ^ (n & 7)) * 16;
    u16* to = layer.partial + static_cast<long long>(item.start + n) * layer.H + item.block * ROWS + c * 8;
#pragma unroll
    for (int first = 0; first < N; first += TURNED) {
        const int tokens = least(N - first, TURNED);
        named_sync(2 + place.group, 128);  // what was here before has been stored
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int j = first / 8; j < (first + tokens) / 8; j++) {
                const float(&d)[N / 2] = sums[b];
                store_transposed(row + b * PART + (8 * j - first) * 128, to_bf16(d[4 * j], d[4 * j + 1]),
                                 to_bf16(d[4 * j + 2], d[4 * j + 3]));
            }
        }
        named_sync(2 + place.group, 128);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int part = WARP_GROUPS * b + place.group;
            if (part >= item.parts) continue;
#pragma unroll
            for (int m = 0; m < tokens; m += 16) {
                if (first + m + n >= item.tokens) continue;
                *reinterpret_cast<uint4*>(to + static_cast<long long>(first + m) * layer.H + part * 64) =
                    *reinterpret_cast<const uint4*>(from + b * PART + m * 128);
            }
        }
    }
}
