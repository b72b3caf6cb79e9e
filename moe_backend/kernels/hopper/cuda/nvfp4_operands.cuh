// What flow.cu and pairs_nvfp4.cu make of NVFP4 codes: first operands of wgmma, in registers.
//
// Of a row's 256 codes of a step thread t of four has 64 neighbours, eight words with the scales of four groups.
// Two words of a row and of the row eight further on are the first operands of four MMAs, a batch.
#pragma once

#include "nvfp4.cuh"

typedef u32 Batch[4][4];  // of four MMAs: words of rows g and g + 8, twice

// Two MMAs' operands: of a word the pairs of even columns, and those of odd columns.
DEVICE void decode_word(Batch& batch, int i, u32 word, u32 word8, u32 scale, u32 scale8) {
    u32 pairs[4], pairs8[4];
    decode(pairs, word, scale);
    decode(pairs8, word8, scale8);
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
        u32(&a)[4] = batch[2 * i + odd];
        a[0] = pairs[odd], a[1] = pairs8[odd], a[2] = pairs[2 + odd], a[3] = pairs8[2 + odd];
    }
}

// The low or the high half of a pair of scales, twice. (`once_products.cuh` has it in shifts: either form takes more
// instructions in the other kernel.)
DEVICE u32 both_halves(u32 pair, bool high) { return __byte_perm(pair, pair, high ? 0x3232 : 0x1010); }

// Half of a thread's codes of a part's step: four words of rows g and g + 8, with the scales of two groups each.
struct Codes {
    u32 words[4], words8[4];
    u32 scales, scales8;

    // part: 64 rows of 128 bytes, as the accelerator writes them; part_scales: as `codes.py` has them.
    DEVICE void load(const u8* part, const u8* part_scales, int half, int warp, int lane) {
        const int row = 16 * warp + lane / 4, t = lane % 4, piece = (2 * t + half) ^ (lane / 4);
        const u8* codes = part + row * 128 + piece * 16;
        const uint4 low = read<uint4>(codes), high = read<uint4>(codes + 8 * 128);
        words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
        words8[0] = high.x, words8[1] = high.y, words8[2] = high.z, words8[3] = high.w;
        const uint2 both = read<uint2>(part_scales + warp * 256 + lane * 8);
        scales = decode_scales(both.x, half);
        scales8 = decode_scales(both.y, half);
    }
    DEVICE void decode_group(Batch& batch, int group) const {
        const u32 scale = both_halves(scales, group), scale8 = both_halves(scales8, group);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            decode_word(batch, i, words[2 * group + i], words8[2 * group + i], scale, scale8);
        }
    }
};
