// pairs_fp8.cu: its sizes, what an item is, what the layer is, and what is in shared memory.
#pragma once

#include "hits.cuh"
#include "targets.cuh"

constexpr int STEP = 128;                      // columns of K, and bytes of a row's codes in a step
constexpr int TILE = 128, HALF = 64;           // tokens of a tile, of a warp group
constexpr int HALF_BYTES = HALF * STEP;
constexpr int CHUNK = 128, CHUNKS = 2;         // weight rows of a product, and such chunks of an item
constexpr int BOX = 64, BOX_BYTES = BOX * STEP;  // weight rows of a copy
constexpr int CHUNK_BYTES = CHUNK * STEP;
// Of a chunk in each matrix, and of an item: hidden columns, which share a scale, or outputs.
constexpr int CHUNK_ROWS = GATED ? BOX : CHUNK, ROWS = CHUNKS * CHUNK_ROWS;
constexpr int CONSUMER_WARPS = 8;
constexpr int CONSUMERS = 32 * CONSUMER_WARPS;
constexpr int THREADS = CONSUMERS + 128;
// Of a thread: the launch's are as many for all, and what copying leaves goes to those that multiply.
constexpr int COPY_REGISTERS = 24, REGISTERS = 240;

// Products that are summed before they are scaled, and weight rows of a chunk that share a scale for sure; so
// many scales have an item's weights in a step.
constexpr int SUB = least(STEP, SCALE_K), MANY = STEP / SUB;
constexpr int SEGMENT = least(SCALE_N, CHUNK_ROWS), SEGMENTS = CHUNK / SEGMENT;
constexpr int SCALES = CHUNKS * SEGMENTS;
static_assert(SCALE_N % SEGMENT == 0 && CHUNK % SEGMENT == 0 && SEGMENT % 32 == 0, "one scale for SEGMENT rows");
static_assert(STEP % SUB == 0 && SCALE_K % SUB == 0 && SUB % 32 == 0, "one scale for SUB columns");
static_assert(MANY * SCALES <= 32, "a lane for each scale");

enum { END = 0, WORK = 1, IDLE = 2 };

struct alignas(16) Item {
    int kind;            // END: there are no more; IDLE: only the other block of the pair has work
    int shares_weights;  // with the other block, whose tokens are others; or else tokens
    int expert;
    int block;           // of hidden columns, or of output rows
    int start;           // first position
    int tokens;
    int chunks;          // that have rows
};

struct Shared {
    u8 weights[STAGES][CHUNKS * CHUNK_BYTES];
    u8 tokens[STAGES][2 * HALF_BYTES];
    float token_scales[STAGES][TILE];
    float weight_scales[STAGES][MANY * SCALES];
    Item items[STAGES];
    Hit hits[EXPERTS + 1];
    float largest[2][HALF];
    int warp_totals[THREADS / 32];
    u64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "what the launch asks for");

struct Layer {
    const TensorMap *tokens, *weights;
    const float *token_scale, *weight_scale;
    const int* list;
    void* out;
    float* out_scale;
    float limit, alpha, beta;
    int rows, depth, positions, scale_rows, scale_columns;
    const Target* targets;
    u16* sums;

    DEVICE int blocks() const { return ceil_div(rows, ROWS); }
};

// Number of a consumer's warp group, and of its warp and lane therein.
struct Place {
    int group, warp, lane;

    DEVICE int row() const { return 16 * warp + lane / 4; }  // of a half's tokens; and eight rows on
    DEVICE int column() const { return lane % 4; }           // of four
};
