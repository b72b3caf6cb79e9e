// pairs_nvfp4.cu: its sizes, what the layer is, and what is in shared memory.
#pragma once

#include "nvfp4_scales.cuh"
#include "outputs.cuh"
#include "pairs_items.cuh"

constexpr int STEP = 256;                     // columns of K whose codes come together
constexpr int LINE = 128;                     // bytes of a row in shared memory: 256 codes, or 64 bf16
constexpr int BOX = 16;                       // tokens of a copy
constexpr int BOX_BYTES = BOX * LINE;
constexpr int MATRIX_BYTES = TILE * LINE;     // 64 columns of a tile's tokens; a half of a step has two such
constexpr int WARP_GROUPS = 2, BLOCKS = 2;    // that multiply; parts of each
constexpr int PARTS = WARP_GROUPS * BLOCKS;   // of an item
constexpr int PART_BYTES = 64 * LINE;         // in a step
constexpr int ROWS = (GATED ? 32 : 64) * PARTS;               // hidden columns or outputs of an item
constexpr int CONSUMER_WARPS = 4 * WARP_GROUPS;
constexpr int THREADS = 32 * CONSUMER_WARPS + 128;
// Of a thread: the launch's are as many for all, and what copying leaves goes to those that multiply.
constexpr int COPY_REGISTERS = 40, REGISTERS = 232;
constexpr int TURNED = 32;                    // tokens whose results are turned around at once
constexpr int HIDDEN_BYTES = 64 * BLOCKS + 16;  // of a token, a warp group's; odd 16s, against bank conflicts
constexpr int STAGING_BYTES = TURNED * (GATED ? HIDDEN_BYTES : BLOCKS * LINE);  // of a warp group

typedef RingOf<CODES> CodeRing;
typedef Targets<TILE, LONE> ItemTargets;

struct Shared {
    u8 tokens[STAGES][2 * MATRIX_BYTES];
    u8 codes[CODES][PARTS * PART_BYTES];
    u8 scales[CODES][PARTS * PART_SCALES];
    u8 staging[WARP_GROUPS][STAGING_BYTES];
    Target targets[WARP_GROUPS][LONE ? 128 * targets_of(TILE) : 1];
    Item items[STAGES];
    Hit hits[EXPERTS + 1];
    int warp_totals[THREADS / 32];
    u64 full[STAGES], empty[STAGES];  // of tokens
    u64 codes_full[CODES], codes_empty[CODES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "what the launch asks for");

struct Layer {
    const TensorMap *tokens, *weights;
    const TensorMap* scales;
    const float* weight_global;
    const int* list;
    u16* out;
    float limit, alpha, beta;
    int rows, depth;
    const Target* targets;
    u16* sums;

    DEVICE int blocks() const { return ceil_div(rows, ROWS); }
    DEVICE int steps() const { return depth / STEP; }
};
