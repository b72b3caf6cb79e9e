// once.cu: its sizes, from the macros, and what a stage and the rest of shared memory hold.
#pragma once

#include "common.cuh"

#if FORMAT != 1  // only fp8 makes use of them
#define N13 16
#define K13 128
#define N2 16
#define K2 128
#endif

constexpr int H = SIZE_H, I = SIZE_I;
constexpr int CLERKS = 2;  // warps that store hidden columns
constexpr int THREADS = (CONSUMERS + CLERKS + COPYING) * 32;
constexpr int TOKENS = 8 * TOKEN_BLOCKS;
constexpr int SLOTS = TOKENS * TOP_K;
constexpr int HITS = SLOTS < EXPERTS ? SLOTS : EXPERTS;
constexpr int UNITS = I / 8;  // of a hit
constexpr int GROUPS = 32;    // of hits, at most, that have a counter each: a line of memory, a lane's each
constexpr int ROWS = 16 * ROW_GROUPS;
constexpr u32 ABSENT = 0xFFFFFFFF;  // as a routing weight: the token is not routed to the hit

constexpr bool NARROW = FORMAT == FP8 && (K2 % 128 != 0 || I % 64 != 0);
constexpr int NIBBLES = FORMAT == BF16 ? 4 : FORMAT == FP8 ? 2 : 1;  // of a weight
constexpr int GRANULE = FORMAT == BF16 ? 64 : 128;  // columns that a warp multiplies at a time
constexpr int GRANULE_BYTES = GRANULE * NIBBLES / 2;
constexpr int LOADS = GRANULE / 32;                // of a lane: eight columns of a token, 16 bytes
constexpr int WORDS = 4 * LOADS;                   // of a lane's operand b
constexpr int STEP = FORMAT == NVFP4 ? 2 : 1;      // granules whose block scales are 16 bytes
constexpr int SUB = NARROW ? 32 : 128;             // columns of w2 that are summed before they are scaled

DEVICE constexpr int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }
DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
// The size of a part if n granules are split into as few and equal parts as may be, of `most` at most.
DEVICE constexpr int equal_parts(int n, int most) { return up_to(ceil_div(n, ceil_div(n, most)), STEP); }
// Rows this far apart do not meet in a bank: of 16-byte loads, of 8-byte loads.
DEVICE constexpr int padded(int n) { return up_to(n - 64, 128) + 64; }
DEVICE constexpr int padded_narrow(int n) { return up_to(n - 32, 128) + 32; }

// A stage of the first GEMM: CHUNK_GRANULES of 16 rows.
constexpr int ROW1 = H * NIBBLES / 2;
constexpr int GRANULES1 = ceil_div(H, GRANULE);
constexpr int CHUNK_GRANULES = equal_parts(GRANULES1, larger(CHUNK / GRANULE_BYTES / STEP, 1) * STEP);
constexpr int CHUNKS = ceil_div(GRANULES1, CHUNK_GRANULES);
constexpr int CHUNK_BYTES = smaller(CHUNK_GRANULES * GRANULE_BYTES, ROW1);
constexpr int STRIDE1 = padded(CHUNK_BYTES);
// NVFP4's block scales of 16 rows: 256 bytes of each two granules, as `codes.py` has them.
constexpr int SCALE_STEP = 256;
// Every warp has equally many granules of every chunk.
constexpr bool EVEN = GRANULES1 == CHUNKS * CHUNK_GRANULES && CHUNK_GRANULES % CONSUMERS == 0;

// What is in shared memory beside the ring.
constexpr int TOKEN_STRIDE = padded(2 * H);
constexpr int TOKENS_BYTES = TOKENS * TOKEN_STRIDE;
constexpr int SUMS = CONSUMERS * TOKEN_BLOCKS * 32;  // float4s: of the first GEMM, of all warps
constexpr int WEIGHTS_BYTES = HITS * TOKENS * 4;
constexpr int MAP = HAS_MAP ? up_to(NUM_IDS, 32) : 0, FACTORS = FORMAT == NVFP4 ? HITS : 0;
constexpr int TABLES_BYTES =
    4 * (up_to(EXPERTS, 32) + up_to(HITS, 4) + up_to(SLOTS, 4) + MAP + 4 * FACTORS + 4);
constexpr int BESIDES = TOKENS_BYTES + SUMS * 16 + WEIGHTS_BYTES + TABLES_BYTES;
constexpr int ROOM = SHARED_BYTES - BESIDES - 64;

// A stage of the second GEMM: a slice of a hit's rows, or PIECES hits.
constexpr int ROW2 = I * NIBBLES / 2;
constexpr int GRANULES2 = ceil_div(I, GRANULE);
// Copies of less than 1 KB cost more than they bring (45 cycles each, measured on an H200), so a stage
// may be somewhat larger than one of the first GEMM, if three of them fit.
constexpr int STAGE2_BYTES = larger(16 * CHUNK_BYTES, smaller(24 * CHUNK, ROOM / 3));
constexpr int MOST_GRANULES = larger(STAGE2_BYTES / ROWS / GRANULE_BYTES / STEP, 1) * STEP;
constexpr int SLICE_GRANULES = equal_parts(GRANULES2, MOST_GRANULES);
constexpr int SLICES = ceil_div(GRANULES2, SLICE_GRANULES);
constexpr int SLICE_BYTES = smaller(SLICE_GRANULES * GRANULE_BYTES, ROW2);
constexpr bool WHOLE = SLICES == 1 && ROW2 < 512;  // one copy for all rows of a hit
constexpr int STRIDE2 = WHOLE ? ROW2 : NARROW ? padded_narrow(SLICE_BYTES) : padded(SLICE_BYTES);
constexpr int SLICE_SCALES = 2 * SLICE_BYTES;  // of 16 rows
constexpr int PIECE = ROWS * STRIDE2;
constexpr int PIECES = SLICES > 1 ? 1 : larger(16 * STRIDE1 / PIECE, 1);
constexpr int SUBS = ceil_div(smaller(SLICE_GRANULES * GRANULE, I), SUB);  // of a slice
constexpr int SCALE_COLUMNS13 = ceil_div(H, K13), SCALE_ROWS13 = ceil_div(I, N13);
constexpr int SCALE_COLUMNS2 = ceil_div(I, K2), SCALE_ROWS2 = ceil_div(H, N2);

constexpr int SCALES1 = FORMAT == FP8 ? 2 * CHUNK_GRANULES * 4 : FORMAT == NVFP4 ? 2 * CHUNK_BYTES : 0;
constexpr int PIECE_SCALES = FORMAT == FP8     ? ROW_GROUPS * SUBS * 4
                             : FORMAT == NVFP4 ? ROW_GROUPS * SLICE_SCALES
                                               : 0;
constexpr int STAGE_DATA = larger(16 * STRIDE1, PIECES * PIECE);
constexpr int STAGE = up_to(STAGE_DATA + larger(SCALES1, PIECES * PIECE_SCALES), 128);

// As many stages as have about so many bytes of w13. More on their way make memory slower, measured on an H200: at
// hidden 4096 three stages are faster than two, four or five, with bf16 at 6144 two than three.
constexpr int ON_THEIR_WAY = (FORMAT == BF16 ? 80 : 112) * 1024, STAGE1 = 16 * STRIDE1;
constexpr int STAGES = smaller(ROOM / (STAGE + 32), (ON_THEIR_WAY + STAGE1 / 2) / STAGE1);

static_assert(STAGES >= 2, "the tokens leave too little shared memory for the ring");
static_assert(STAGES * STAGE + TOKENS_BYTES + SUMS * 16 >= SUMS * ROW_GROUPS * 16, "no room for the last sums");
static_assert(CONSUMERS > 0 && (CONSUMERS & (CONSUMERS - 1)) == 0 && CONSUMERS <= 16, "CONSUMERS");
static_assert(EXPERTS <= 1024 && (HAS_MAP || NUM_IDS == EXPERTS), "EXPERTS");
static_assert(H % (FORMAT == BF16 ? 32 : FORMAT == FP8 ? 128 : 256) == 0, "SIZE_H");
static_assert(I % (FORMAT == NVFP4 ? 256 : 32) == 0, "SIZE_I");
static_assert(K13 % 128 == 0 && N13 % 8 == 0 && N2 % 16 == 0, "N13, K13, N2");
static_assert(K2 % 128 == 0 || K2 == 32 || K2 == 64, "K2");
static_assert(!WEIGHT_ON_INPUT || TOP_K == 1, "a routing weight can be on the input of one expert only");
