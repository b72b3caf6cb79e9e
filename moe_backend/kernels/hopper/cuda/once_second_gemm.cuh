// once.cu: the output, by the warps that multiply.
#pragma once

#include "once_products.cuh"
#include "once_shared.cuh"

typedef uint4 Columns[TOKEN_BLOCKS][LOADS];  // a lane's bf16 hidden columns of an item

// Item: granule item % GRANULES2 of hit item / GRANULES2. Waits until its hidden columns are written.
DEVICE void load_hidden(Columns& v, const Shared& s, const Problem& p, const Groups& groups, int item,
                        int lane) {
    int hit = item / GRANULES2, first = item % GRANULES2 * GRANULE, g = lane / 4, t = lane % 4;
    wait_for_shared(s.finished(), groups.of(hit) + 1);
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
        int token = n * 8 + g;
        bool present = __float_as_uint(s.weights()[hit * TOKENS + token]) != ABSENT;
        const u16* row = p.hidden + static_cast<long long>(hit * p.tokens + token) * I;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) v[n][i] = make_uint4(0, 0, 0, 0);
        if (!present) continue;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int column = first + i * 32 + t * 8;
            if (I % GRANULE == 0 || column < I)
                v[n][i] = load_written(reinterpret_cast<const uint4*>(row + column));
        }
    }
}

DEVICE void to_operand(Operand& b, const Columns& v) {
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
#pragma unroll
        for (int i = 0; i < LOADS; ++i) put(b[n], i, v[n][i]);
}

// A granule of fp8 rows of which each 32 columns have their own scale.
DEVICE void multiply_narrow(Sums& sums, const u8* a, const float* scales, const Operand& b, int columns) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (I % 128 != 0 && i * 32 >= columns) break;
        Sums d;
        clear(d);
        uint2 low = read<uint2>(a + i * 32), high = read<uint2>(a + 8 * STRIDE2 + i * 32);
        multiply_fp8(d, low.x, high.x, b, 2 * i);
        multiply_fp8(d, low.y, high.y, b, 2 * i + 1);
        add_scaled(sums, d, scales[i], scales[i]);
    }
}

// An item, `local` granules into its stage, for all rows of this block.
DEVICE void multiply_item(Sums (&sums)[ROW_GROUPS], const Shared& s, const Turn& turn, int item, int local,
                          const Operand& b, int lane) {
    constexpr bool ALL = I % GRANULE == 0;
    int g = lane / 4, t = lane % 4;
    int piece = SLICES > 1 ? 0 : local / GRANULES2, granule = SLICES > 1 ? local : local % GRANULES2;
    int columns = I - item % GRANULES2 * GRANULE;
    const u8* data = s.stage(turn.stage) + piece * PIECE + granule * GRANULE_BYTES + g * STRIDE2;
    const u8* scales = s.stage_scales(turn.stage) + piece * PIECE_SCALES;
#pragma unroll
    for (int r = 0; r < ROW_GROUPS; ++r) {
        const u8* a = data + r * 16 * STRIDE2 + t * (NARROW ? 8 : 16);
        const float* scale = reinterpret_cast<const float*>(scales) + r * SUBS + granule * (GRANULE / SUB);
        const u8* block_scales = scales + r * SLICE_SCALES + place_of_scales(granule, lane);
        if (NARROW) {
            multiply_narrow(sums[r], a, scale, b, columns);
        } else if (FORMAT == FP8) {
            Sums d;
            clear(d);
            multiply<ALL>(d, a, a + 8 * STRIDE2, a, b, columns);
            add_scaled(sums[r], d, *scale, *scale);
        } else {
            multiply<ALL>(sums[r], a, a + 8 * STRIDE2, block_scales, b, columns);
        }
    }
}

// The item after those of the stage that begins with `first`.
DEVICE int end_of_stage(int first, int items) {
    if (SLICES == 1) return min(first + PIECES * GRANULES2, items);
    return first + min(SLICE_GRANULES, GRANULES2 - first % GRANULES2);
}

// Sums over the hits, from the first stage on, which is there.
DEVICE void second_gemm(Sums (&sums)[ROW_GROUPS], const Shared& s, const Problem& p, Turn& turn, int hits,
                        int warp, int lane) {
    int items = hits * GRANULES2, first = 0, last = end_of_stage(0, items);
    Groups groups(hits);
    Columns columns;
    if (warp < items) load_hidden(columns, s, p, groups, warp, lane);
    for (int item = warp; item < items; item += CONSUMERS) {
        Operand b;
        to_operand(b, columns);
        if (item + CONSUMERS < items) load_hidden(columns, s, p, groups, item + CONSUMERS, lane);
        while (item >= last) {
            release_stage(s, turn, lane);
            first = last;
            last = end_of_stage(first, items);
            barrier_wait(s.full(turn.stage), turn.phase);
        }
        multiply_item(sums, s, turn, item, item - first, b, lane);
    }
    while (last < items) {
        release_stage(s, turn, lane);
        last = end_of_stage(last, items);
        barrier_wait(s.full(turn.stage), turn.phase);
    }
}

// Sums over the warps to the output. They go where the ring was, and tokens and sums behind it, all used up.
DEVICE void store_output(const Sums (&sums)[ROW_GROUPS], const Shared& s, const Problem& p, int warp,
                         int lane) {
    float4* buffer = reinterpret_cast<float4*>(s.ring);
    named_sync(1, CONSUMERS * 32);
#pragma unroll
    for (int r = 0; r < ROW_GROUPS; ++r)
#pragma unroll
        for (int n = 0; n < TOKEN_BLOCKS; ++n)
            buffer[((warp * ROW_GROUPS + r) * TOKEN_BLOCKS + n) * 32 + lane] = whole(sums[r][n]);
    named_sync(1, CONSUMERS * 32);
    for (int part = warp; part < ROW_GROUPS * TOKEN_BLOCKS; part += CONSUMERS) {
        int row = part / TOKEN_BLOCKS * 16;
        float4 v = sum_of_warps(buffer + part * 32 + lane, ROW_GROUPS * TOKEN_BLOCKS * 32);
        uint4 low = gather_rows<1>(v.x, v.y, lane), high = gather_rows<1>(v.z, v.w, lane);
        int token = gathered_token<1>(lane) + part % TOKEN_BLOCKS * 8;
        if (lane >= 8 || token >= p.tokens || row >= output_rows()) continue;
        uint4* to =
            reinterpret_cast<uint4*>(p.out + static_cast<long long>(token) * H + blockIdx.x * ROWS + row);
        to[0] = low;
        to[1] = high;
    }
}
