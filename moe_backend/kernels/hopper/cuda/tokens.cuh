// A token's columns as the GEMMs take them: quantised, per 128 columns, to e4m3; or in bf16, as they are or in the order of
// the NVFP4 decoder.
//
// Compile-time constants: QUANTISED, REORDERED (neither: as they are), WEIGHT_ON_INPUT (with TOP_K 1), PIECES (of 256
// columns, which a warp has on their way).
#pragma once

#include "warps.cuh"

constexpr int PART = 256 * PIECES;         // columns of a token that a warp brings at once
constexpr int ORDERED = REORDERED ? 128 : 1;  // words of shared memory in which a warp reorders 256 columns

// Eight columns of a token.
struct Piece {
    uint4 bits;

    DEVICE void load(const u16* x, long long token, int column, int H) {
        bits = column < H ? *reinterpret_cast<const uint4*>(x + token * H + column) : make_uint4(0, 0, 0, 0);
    }
};

// A warp's part of a token: of each 256 columns a lane has eight.
struct Part {
    Piece pieces[PIECES];

    DEVICE void load(const u16* x, long long token, int part, int lane, int H) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) pieces[i].load(x, token, part * PART + 256 * i + 8 * lane, H);
    }
};

// A thread's eight columns as codes, and the largest number, which they share with those of 15 more threads.
struct Codes {
    uint2 bits;
    float amax;

    DEVICE void quantise(const Piece& piece, float weight) {
        const u32 pairs[4] = {piece.bits.x, piece.bits.y, piece.bits.z, piece.bits.w};
        float values[8];
        amax = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            values[2 * i] = low_bf16(pairs[i]);
            values[2 * i + 1] = high_bf16(pairs[i]);
            if (WEIGHT_ON_INPUT) values[2 * i] *= weight, values[2 * i + 1] *= weight;
            amax = fmaxf(amax, fmaxf(fabsf(values[2 * i]), fabsf(values[2 * i + 1])));
        }
#pragma unroll
        for (int by = 1; by < 16; by *= 2) amax = fmaxf(amax, __shfl_xor_sync(ALL, amax, by));
        const float factor = codes_per_unit(amax);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] *= factor;
        bits = {to_fp8(values[0], values[1], values[2], values[3]), to_fp8(values[4], values[5], values[6], values[7])};
    }
};

// A warp's part of a token, quantised, to each of its rows of the operand, `[rows, H]` e4m3, with scales, `[H / 128, rows]`.
// All of the part is quantised first if there may be MANY rows, so that it is once.
template <class Rows>
DEVICE void store_codes(const Part& part, float weight, const Rows& to, int column, int H, int rows, u8* operand,
                        float* operand_scale) {
    constexpr int AT_ONCE = Rows::MANY ? PIECES : 1;
#pragma unroll
    for (int first = 0; first < PIECES; first += AT_ONCE) {
        Codes codes[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) codes[i].quantise(part.pieces[first + i], weight);
        to.each([&](long long row) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int own = column + 256 * (first + i);
                if (own >= H) continue;
                *reinterpret_cast<uint2*>(operand + row * H + own) = codes[i].bits;
                if (column % 128 != 0) continue;
                operand_scale[static_cast<long long>(own / 128) * rows + row] = unit_of_codes(codes[i].amax);
            }
        });
    }
}

// A warp's 256 columns in the order in which the decoder of NVFP4 yields codes: of a thread's eight, neighbours in
// one of four times 64, the even ones come before all odd ones.
DEVICE uint4 reorder(const u32 (&pairs)[4], u32* ordered) {
    const int lane = threadIdx.x % 32;
    u32* to = ordered + lane % 8 * 8 + lane / 8;
#pragma unroll
    for (int i = 0; i < 2; i++) {  // columns 0 and 4, then 2 and 6; and the odd ones after these
        to[4 * i] = __byte_perm(pairs[i], pairs[2 + i], 0x5410);
        to[64 + 4 * i] = __byte_perm(pairs[i], pairs[2 + i], 0x7632);
    }
    __syncwarp();
    const uint4 bits = *reinterpret_cast<const uint4*>(ordered + 4 * lane);
    __syncwarp();
    return bits;
}

// A warp's part of a token, perhaps in that order, to each of its rows of the operand, `[rows, H]` bf16.
template <class Rows>
DEVICE void store_bf16(const Part& part, float weight, u32* ordered, const Rows& to, int column, int H,
                       u8* operand) {
    uint4 bits[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const uint4& own = part.pieces[i].bits;
        u32 pairs[4] = {own.x, own.y, own.z, own.w};
        if (WEIGHT_ON_INPUT) {
#pragma unroll
            for (u32& pair : pairs) pair = to_bf16(low_bf16(pair) * weight, high_bf16(pair) * weight);
        }
        bits[i] = REORDERED ? reorder(pairs, ordered) : uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
    to.each([&](long long row) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int own = column + 256 * i;
            if (own < H) *reinterpret_cast<uint4*>(operand + (row * H + own) * 2) = bits[i];
        }
    });
}

// As the layer's weights want it. column: the lane's first.
template <class Rows>
DEVICE void store_part(const Part& part, float weight, u32* ordered, const Rows& to, int column, int H, int rows,
                       u8* operand, float* operand_scale) {
    if (QUANTISED) store_codes(part, weight, to, column, H, rows, operand, operand_scale);
    else store_bf16(part, weight, ordered, to, column, H, operand);
}
