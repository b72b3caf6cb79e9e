// Each token's outputs summed over its slots, in order, with the routing weights.
//
// A warp has a part of a token's columns, a lane eight of each 256, and takes such parts in turn; the rows of the next
// are looked up meanwhile. Slots that are left out cost nothing: with experts spread over ranks most are.
//
// Compile-time constants: TOP_K, WEIGHTED (whether the weights are applied here), PIECES (of 256 columns in a part), LONE
// (the outputs of a token with one slot have gone to its row: `targets.cuh`).
#include "warps.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int PART = 256 * PIECES;
static_assert(!LONE || TOP_K <= 32, "a lane for each slot");
constexpr int TOGETHER = 8 / PIECES;  // slots whose outputs are on their way at once

// Of a lane: the row of one of 32 slots of a token, -1 if it is left out, and its weight.
struct Slot {
    int row;
    float weight;

    DEVICE void load(const int* position, const float* weights, long long token, int k) {
        row = k < TOP_K ? position[token * TOP_K + k] : -1;
        weight = WEIGHTED && k < TOP_K ? weights[token * TOP_K + k] : 1.0f;
    }
};

// Whether a token has one slot here, for a warp.
DEVICE bool is_one(const Slot& slot) { return __popc(__ballot_sync(ALL, slot.row >= 0)) == 1; }

DEVICE void add_row(float (&sums)[8], const uint4& row, float weight) {
    const u32 pairs[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[2 * i] += weight * low_bf16(pairs[i]);
        sums[2 * i + 1] += weight * high_bf16(pairs[i]);
    }
}

// Adds the rows of up to 32 slots, in order.
DEVICE void add_slots(float (&sums)[PIECES][8], const u16* partial, const Slot& slot, int column, int H) {
    u32 left = __ballot_sync(ALL, slot.row >= 0);
    while (left) {
        uint4 rows[TOGETHER][PIECES];
        float weights[TOGETHER];
        int count = 0;
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            if (left == 0) break;
            const int k = __ffs(left) - 1;
            left &= left - 1;
            const u16* from = partial + static_cast<long long>(__shfl_sync(ALL, slot.row, k)) * H;
            weights[j] = __shfl_sync(ALL, slot.weight, k);
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int c = column + 256 * p;
                rows[j][p] = c < H ? *reinterpret_cast<const uint4*>(from + c) : make_uint4(0, 0, 0, 0);
            }
            count = j + 1;
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            if (j >= count) break;
#pragma unroll
            for (int p = 0; p < PIECES; p++) add_row(sums[p], rows[j][p], weights[j]);
        }
    }
}

// partial: `[positions, H]` bf16, H a multiple of 8; position: `[tokens, TOP_K]`, -1 for slots that are left out;
// topk_weights: the same shape; out: `[tokens, H]` bf16. Positions and weights were there before the launch
// before this one.
KERNEL void __launch_bounds__(THREADS, 3) combine(const u16* partial, const int* position, const float* topk_weights,
                                                  u16* out, int tokens, int H) {
    const int lane = threadIdx.x % 32, parts = (H + PART - 1) / PART, warps = gridDim.x * WARPS;
    int job = static_cast<int>(blockIdx.x) * WARPS + static_cast<int>(threadIdx.x) / 32;
    const int jobs = tokens * parts;
    Slot next = {-1, 0.0f};
    if (job < jobs) next.load(position, topk_weights, job / parts, lane);
    wait_for_launches();
    for (; job < jobs; job += warps) {
        Slot slot = next;
        if (job + warps < jobs) next.load(position, topk_weights, (job + warps) / parts, lane);
        if (LONE && is_one(slot)) continue;
        const long long token = job / parts;
        const int column = job % parts * PART + 8 * lane;
        float sums[PIECES][8] = {};
        add_slots(sums, partial, slot, column, H);
        for (int first = 32; first < TOP_K; first += 32) {
            slot.load(position, topk_weights, token, first + lane);
            add_slots(sums, partial, slot, column, H);
        }
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const int c = column + 256 * p;
            const float(&s)[8] = sums[p];
            const uint4 bits = {to_bf16(s[0], s[1]), to_bf16(s[2], s[3]), to_bf16(s[4], s[5]), to_bf16(s[6], s[7])};
            if (c < H) *reinterpret_cast<uint4*>(out + token * H + c) = bits;
        }
    }
}
