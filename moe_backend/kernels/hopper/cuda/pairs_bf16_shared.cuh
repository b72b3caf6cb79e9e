// pairs_bf16.cu: its sizes, what the layer is, and what is in shared memory.
#pragma once

#include "outputs.cuh"
#include "pairs_items.cuh"

constexpr int LINE = 128, STEP = LINE / 2;    // bytes of a row in a step, and columns of K
constexpr int BOX = 16, BOX_BYTES = BOX * LINE;  // tokens of a copy
constexpr int WARP_GROUPS = 2, BLOCKS = 2;    // that multiply; parts of each
constexpr int PARTS = WARP_GROUPS * BLOCKS;   // of an item
constexpr int PART_BYTES = 64 * LINE;         // in a step
constexpr int ROWS = (GATED ? 32 : 64) * PARTS;  // hidden columns or outputs of an item
constexpr int CONSUMER_WARPS = 4 * WARP_GROUPS;
constexpr int THREADS = 32 * CONSUMER_WARPS + 128;
// Of a thread: the launch's are as many for all, and what copying leaves goes to those that multiply.
constexpr int COPY_REGISTERS = 40, REGISTERS = 232;
constexpr int TURNED = 32;                    // tokens whose results are turned around at once
constexpr int RESULTS = GATED ? 1 : BLOCKS;   // of a warp group and a token, in 64s
static_assert(TILE % BOX == 0, "whole copies");

typedef Targets<TILE, LONE> ItemTargets;

struct Shared {
    u8 weights[STAGES][PARTS * PART_BYTES];
    u8 tokens[STAGES][TILE * LINE];
    u8 staging[WARP_GROUPS][RESULTS * TURNED * LINE];
    Target targets[WARP_GROUPS][LONE ? 128 * targets_of(TILE) : 1];
    Item items[STAGES];
    Hit hits[EXPERTS + 1];
    int warp_totals[THREADS / 32];
    u64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "what the launch asks for");

struct Layer {
    const TensorMap *tokens, *weights;
    const int* list;
    u16* out;
    float limit, alpha, beta;
    int rows, depth;
    const Target* targets;
    u16* sums;

    DEVICE int blocks() const { return ceil_div(rows, ROWS); }
};
