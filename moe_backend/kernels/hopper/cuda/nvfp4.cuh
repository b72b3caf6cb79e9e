// NVFP4 codes and their block scales as bf16, exactly.
#pragma once

#include "common.cuh"

// Two e4m3 block scales, of a word of four the first two or the others, as bf16 times 2**118: their bits four to the
// left are bf16 times 2**-120. None is negative, but for -0, whose sign is left out.
DEVICE u32 decode_scales(u32 four, bool others) {
    u32 spread = (__byte_perm(four, 0, others ? 0x4342 : 0x4140) & 0x007F007F) << 4;
    return multiply_bf16(multiply_bf16(spread, 0x7B007B00), 0x7B007B00);
}

// Eight e2m1 codes, in the order of bits of `codes.py`, as bf16 times a scale: codes n and n + 4 are pair n. A code's
// sign at bit 15 and its other bits at 6..8 of a bf16 read as its magnitude times 2**-126. The caller owes 2**8.
DEVICE void decode(u32 (&pairs)[4], u32 word, u32 scale) {
    pairs[0] = multiply_bf16(word & 0x81C081C0, scale);
    pairs[1] = multiply_bf16(__funnelshift_l(word, word, 10) & 0x81C081C0, scale);
    pairs[2] = multiply_bf16(__funnelshift_l(word, word, 13) & 0x81C081C0, scale);
    pairs[3] = multiply_bf16((word & 0x001B001B) * 0x4108 & 0x81C081C0, scale);
}
