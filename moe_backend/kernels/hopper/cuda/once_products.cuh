// once.cu: products of 16 weight rows and all tokens, by one warp, and their sums.
#pragma once

#include "nvfp4.cuh"
#include "once_sizes.cuh"

typedef float Sums[TOKEN_BLOCKS][4];  // of 16 rows and all tokens, as an MMA leaves them
typedef u32 Operand[TOKEN_BLOCKS][WORDS];     // tokens, as MMAs take them

DEVICE void put(u32 (&words)[WORDS], int i, const uint4& v) {
    words[4 * i] = v.x;
    words[4 * i + 1] = v.y;
    words[4 * i + 2] = v.z;
    words[4 * i + 3] = v.w;
}

DEVICE void clear(Sums& d) {
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[n][i] = 0.0f;
}

DEVICE float4 whole(const float (&d)[4]) { return make_float4(d[0], d[1], d[2], d[3]); }

// The MMA number `index` of a granule, for all tokens.
DEVICE void multiply_words(Sums& d, u32 a0, u32 a1, u32 a2, u32 a3, const Operand& b, int index) {
    u32 a[4] = {a0, a1, a2, a3};
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
        mma_bf16(d[n], a, b[n][2 * index], b[n][2 * index + 1]);
}

// Where a lane's block scales of a granule are: two of row g, and four bytes further on two of row g + 8. Of the 16 of
// a row in two granules four lie side by side.
DEVICE int place_of_scales(int granule, int lane) {
    const int g = lane / 4, t = lane % 4;
    return granule / 2 * SCALE_STEP + g * 32 + (granule % 2 * 2 + t / 2) * 8 + t % 2 * 2;
}

DEVICE void multiply_nvfp4(Sums& d, const u8* a, const u8* a8, const u8* scales, const Operand& b) {
    uint4 low = read<uint4>(a), high = read<uint4>(a8);
    const u32 words[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
    u32 scale[2] = {decode_scales(read<u16>(scales), false), decode_scales(read<u16>(scales + 4), false)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 pairs[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 both =
                i < 2 ? (scale[r] & 0xFFFF) | scale[r] << 16 : scale[r] >> 16 | (scale[r] & 0xFFFF0000);
            decode(pairs[r], words[r][i], both);
        }
        multiply_words(d, pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b, 2 * i);
        multiply_words(d, pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b, 2 * i + 1);
    }
}

// Four e4m3 codes as bf16: 0 and 2, then 1 and 3. A code's bits four to the left (or right) are its bf16
// times 2**-120, subnormal or not. (The conversion instruction has an eighth of the rate of these.)
DEVICE void decode_fp8(u32 (&pairs)[2], u32 word) {
    const u32 up = 0x7B807B80;  // 2**120, twice
    pairs[0] = multiply_bf16((word & 0x007F007F) * 16 + (word & 0x00800080) * 256, up);
    pairs[1] = multiply_bf16((word & 0x7F007F00) >> 4 | (word & 0x80008000), up);
}

DEVICE void multiply_fp8(Sums& d, u32 word, u32 word8, const Operand& b, int index) {
    u32 pairs[2], pairs8[2];
    decode_fp8(pairs, word);
    decode_fp8(pairs8, word8);
    multiply_words(d, pairs[0], pairs8[0], pairs[1], pairs8[1], b, index);
}

// d += a b over a granule, of which `columns` exist. `a` and `a8`: this lane's bytes of rows g and g+8;
// `scales`: of NVFP4, `place_of_scales`.
template <bool ALL>
DEVICE void multiply(Sums& d, const u8* a, const u8* a8, const u8* scales, const Operand& b, int columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (FORMAT == NVFP4) {
            if (half == 0) multiply_nvfp4(d, a, a8, scales, b);
            continue;
        }
        if (!ALL && half * (GRANULE / 2) >= columns) break;
        uint4 low = read<uint4>(a + half * 64), high = read<uint4>(a8 + half * 64);
        if (FORMAT == FP8) {
            multiply_fp8(d, low.x, high.x, b, 4 * half);
            multiply_fp8(d, low.y, high.y, b, 4 * half + 1);
            multiply_fp8(d, low.z, high.z, b, 4 * half + 2);
            multiply_fp8(d, low.w, high.w, b, 4 * half + 3);
            continue;
        }
        multiply_words(d, low.x, high.x, low.y, high.y, b, 2 * half);
        multiply_words(d, low.z, high.z, low.w, high.w, b, 2 * half + 1);
    }
}

// Sums of rows g and g+8 times their scales.
DEVICE void add_scaled(Sums& sums, const Sums& d, float scale, float scale8) {
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
        sums[n][0] += d[n][0] * scale;
        sums[n][1] += d[n][1] * scale;
        sums[n][2] += d[n][2] * scale8;
        sums[n][3] += d[n][3] * scale8;
    }
}

// A number of this lane's row g for each of tokens 2t and 2t+1, to all eight rows' bf16 of one of the
// tokens: of 2t where the BIT of g is 0, else of 2t+1. BIT 1 keeps the order, 2 pairs rows p and p+2, 4 rows
// p and p+4, as `in_order` does.
template <int BIT> DEVICE uint4 gather_rows(float first, float second, int lane) {
    bool odd = (lane / 4 & BIT) != 0;
    float other = __shfl_xor_sync(0xFFFFFFFF, odd ? first : second, 4 * BIT);
    u32 word = odd ? to_bf16(other, second) : to_bf16(first, other), words[4];
    int source = lane % 4 + (odd ? 4 * BIT : 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int row = BIT == 1 ? 2 * i : BIT == 2 ? i + i / 2 * 2 : i;
        words[i] = __shfl_sync(0xFFFFFFFF, word, source + 4 * row);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Which token of eight that is, or -1 in lanes whose result another one has too.
template <int BIT> DEVICE int gathered_token(int lane) {
    int g = lane / 4;
    return (g & (7 ^ BIT)) != 0 ? -1 : lane % 4 * 2 + (g & BIT ? 1 : 0);
}

// What the warps left, `stride` apart, in their order.
DEVICE float4 sum_of_warps(const float4* sums, int stride) {
    float4 sum = sums[0];
#pragma unroll
    for (int w = 1; w < CONSUMERS; ++w) {
        float4 v = sums[w * stride];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}
