// once.cu: activations in the order in which a decoder yields the weights that they meet.
#pragma once

#include "once_shared.cuh"

DEVICE uint4 times(const uint4& v, float f) {
    return make_uint4(
        to_bf16(low_bf16(v.x) * f, high_bf16(v.x) * f), to_bf16(low_bf16(v.y) * f, high_bf16(v.y) * f),
        to_bf16(low_bf16(v.z) * f, high_bf16(v.z) * f), to_bf16(low_bf16(v.w) * f, high_bf16(v.w) * f));
}

// Columns 0..7 in the order in which the decoder of weights yields them: NVFP4's 0 4 1 5 2 6 3 7, FP8's
// 0 2 1 3 4 6 5 7.
DEVICE u32 low_halves(u32 a, u32 b) { return (a & 0xFFFF) | b << 16; }
DEVICE u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xFFFF0000); }
DEVICE uint4 in_order(const uint4& v) {
    if (FORMAT == NVFP4)
        return make_uint4(low_halves(v.x, v.z), high_halves(v.x, v.z), low_halves(v.y, v.w),
                          high_halves(v.y, v.w));
    if (FORMAT == FP8)
        return make_uint4(low_halves(v.x, v.y), high_halves(v.x, v.y), low_halves(v.z, v.w),
                          high_halves(v.z, v.w));
    return v;
}

// Where the eight columns from this one on lie: so that four lanes read 64 bytes side by side of the columns
// whose weights they have, 32 columns each of 128 (NVFP4) or 16 of 64 (FP8, but in NARROW rows eight of 32).
DEVICE int place_of(int column, bool narrow) {
    if (FORMAT == NVFP4) return column / 128 * 128 + column / 8 % 4 * 32 + column / 32 % 4 * 8;
    if (FORMAT == FP8 && !narrow) return column / 64 * 64 + column / 8 % 2 * 32 + column / 16 % 4 * 8;
    return column;
}

// All tokens as the first GEMM wants them; several loads of a lane are on their way at a time.
DEVICE void bring_tokens(const Shared& s, const Problem& p, int warp, int lane) {
    constexpr int PARTS = ceil_div(H, 256), BATCH = 8;
    int jobs = p.tokens * PARTS;
    for (int first = warp; first < jobs; first += BATCH * CONSUMERS) {
        uint4 v[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            int job = first + b * CONSUMERS, token = job / PARTS, column = job % PARTS * 256 + lane * 8;
            const uint4* from = reinterpret_cast<const uint4*>(p.x) + (token * H + column) / 8;
            v[b] = job < jobs && column < H ? *from : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            int job = first + b * CONSUMERS, token = job / PARTS, column = job % PARTS * 256 + lane * 8;
            if (job >= jobs || column >= H) continue;
            if (WEIGHT_ON_INPUT) v[b] = times(v[b], p.topk_weights[token]);
            u8* to = s.tokens() + token * TOKEN_STRIDE + 2 * place_of(column, false);
            *reinterpret_cast<uint4*>(to) = in_order(v[b]);
        }
    }
}
