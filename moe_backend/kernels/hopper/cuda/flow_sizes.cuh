// flow.cu: its sizes, from the macros.
#pragma once

#include "hits.cuh"
#if FORMAT != 1
#include "nvfp4_scales.cuh"
#endif

constexpr int LINE = 128;                                 // bytes of a row's codes in a step
constexpr int STEP = FORMAT == NVFP4 ? 256 : 128;         // columns of K
constexpr int TOKEN_BYTES = FORMAT == NVFP4 ? 512 : 128;  // of a token in a step: bf16, or e4m3
constexpr int PART_BYTES = 64 * LINE;                     // of a part's step: 64 rows
constexpr int PARTS = WARP_GROUPS * BLOCKS;  // of an item
constexpr int GROUP = 32 * PARTS;            // hidden columns of an item, which share a scale if they have one
constexpr int ROWS = 64 * PARTS;             // output rows of an item
constexpr int CONSUMER_WARPS = 4 * WARP_GROUPS;
constexpr int CONSUMERS = 32 * CONSUMER_WARPS;
constexpr int THREADS = CONSUMERS + 128;
// Of a thread: the launch's are as many for all, and what copying leaves goes to those that multiply.
constexpr int COPY_REGISTERS = 56;
constexpr int REGISTERS = WARP_GROUPS == 2 ? 224 : WARP_GROUPS == 3 ? 152 : 104;
constexpr int GATHERERS = 2;             // warps that bring tokens
constexpr int AT_ONCE = 64;              // columns of MMAs in a step that wait together for their scales
constexpr int QUEUE = 2;                 // items claimed and not yet copied


constexpr int MOST_SUMS = WARP_GROUPS == 2 ? 256 : WARP_GROUPS == 3 ? 128 : 64;
static_assert(MOST % 8 == 0 && MOST <= 128 && BLOCKS * MOST <= MOST_SUMS, "registers");

#if FORMAT == 1

// Products that are summed before they are scaled: those that have one scale of weights and of tokens.
constexpr int SUB13 = least(STEP, K13);
constexpr int SUB2 = least(least(STEP, K2), GROUP % 128 == 0 ? 128 : GROUP % 64 == 0 ? 64 : 32);
static_assert(N13 % 32 == 0 && N2 % 64 == 0, "one scale for the rows of a part");
static_assert(STEP % SUB13 == 0 && K13 % SUB13 == 0 && SUB13 % 32 == 0, "one scale for SUB13 columns");
static_assert(STEP % SUB2 == 0 && K2 % SUB2 == 0 && GROUP % SUB2 == 0 && SUB2 % 32 == 0, "the same for SUB2");
static_assert(GROUP >= 64, "two scales of a token for a step at most");

// Scales of a part's weights in a step: of the first GEMM gate's and up's.
constexpr int SCALES13 = 2 * (STEP / SUB13);
constexpr int SCALES2 = STEP / SUB2;
constexpr int PART_SCALES = most(SCALES13, SCALES2);

typedef float Scale;
typedef float Scales;  // w13's and w2's, as the launch has them
constexpr int SCALE_BYTES = 0;  // of a step, that the accelerator brings
constexpr int SCALED_STAGES = STAGES, SCALED = MOST;       // tokens that have scales, in how many stages
constexpr int HIDDEN_BYTES = GROUP + 16;                   // of a token, staged; odd 16s, against bank conflicts
constexpr int TURNED = least(MOST, PARTS <= 4 ? 32 : 16);  // tokens whose outputs are turned around at once

#else

static_assert(PARTS == 2 || PARTS == 4, "items that divide 256 hidden columns, and 256 output rows");
typedef u8 Scale;
typedef TensorMap Scales;
constexpr int SCALE_BYTES = PARTS * PART_SCALES;
constexpr int SCALED_STAGES = 1, SCALED = 1;  // tokens have none; arrays are not empty
constexpr int HIDDEN_BYTES = 2 * GROUP + 16;  // as above
constexpr int TURNED = least(MOST, 16);       // less, so that four stages fit with tiles of 32 tokens

#endif

constexpr int STAGING_BYTES = most(most(PARTS * TURNED * 128, MOST * HIDDEN_BYTES), 4 * CONSUMER_WARPS * MOST);
