// pairs_fp8.cu: the items that there are, and the warp that keeps the ring filled.
#pragma once

#include "pairs_fp8_shared.cuh"

// Items of an expert for a pair of blocks: two tiles of tokens at a time with one block of weight rows, and the
// tile that is left with two blocks of rows.
DEVICE int items_of(int tokens, int blocks) {
    const int tiles = ceil_div(tokens, TILE);
    return tiles / 2 * blocks + tiles % 2 * ceil_div(blocks, 2);
}

// The pair's nth item, as block `rank` of the pair sees it.
DEVICE Item find_item(const Layer& layer, const Shared& shared, int count, int n, int rank) {
    Item item = {};
    if (n >= shared.hits[count].before) return item;
    const Hit hit = shared.hits[find_hit(shared.hits, count, n)];
    const int tiles = ceil_div(hit.end - hit.start, TILE), doubles = tiles / 2, blocks = layer.blocks();
    const int inside = n - hit.before;
    int tile = tiles - 1;
    if (inside < doubles * blocks) {
        item.shares_weights = 1;
        item.block = inside / doubles;
        tile = inside % doubles * 2 + rank;
    } else {
        item.block = (inside - doubles * blocks) * 2 + rank;
    }
    item.kind = item.block < blocks ? WORK : IDLE;
    item.expert = hit.expert;
    item.start = hit.start + tile * TILE;
    item.tokens = min(TILE, hit.end - item.start);
    item.chunks = layer.rows - item.block * CHUNKS * CHUNK_ROWS > CHUNK_ROWS ? 2 : 1;
    return item;
}

// A step's weight scales, by a lane each.
DEVICE void copy_weight_scale(const Layer& layer, const Item& item, float* to, int k0, int lane) {
    if (lane >= MANY * SCALES || item.kind != WORK) return;
    const int sub = lane / SCALES, chunk = lane % SCALES / SEGMENTS, row = lane % SEGMENTS * SEGMENT;
    const int matrix = GATED ? 2 * item.expert + row / BOX : item.expert;
    const int first = (item.block * CHUNKS + chunk) * CHUNK_ROWS + (GATED ? row % BOX : row);
    const int scale_row = min(first / SCALE_N, layer.scale_rows - 1);
    const int column = min((k0 + sub * SUB) / SCALE_K, layer.scale_columns - 1);
    copy_float(to + lane, layer.weight_scale + (static_cast<long long>(matrix) * layer.scale_rows + scale_row) *
                                                   layer.scale_columns + column);
}

// A chunk's weights, for this block or for both.
DEVICE void copy_chunk(const Layer& layer, const Item& item, u8* to, int chunk, int k0, u64* full) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = (item.block * CHUNKS + chunk) * CHUNK_ROWS + (GATED ? 0 : i * BOX);
        const int matrix = GATED ? 2 * item.expert + i : item.expert;
        u8* box = to + chunk * CHUNK_BYTES + i * BOX_BYTES;
        if (item.shares_weights) copy_box_to_all<STREAMED>(box, layer.weights, k0, row, matrix, full, 3);
        else copy_box<STREAMED>(box, layer.weights, k0, row, matrix, full);
    }
}

// A step's copies, by one thread.
DEVICE void copy_step(const Layer& layer, Shared& shared, const Item& item, int stage, int k0, int rank) {
    u64* full = &shared.full[stage];
    const int halves = item.tokens > HALF ? 2 : 1;
    const bool works = item.kind == WORK;
    barrier_expect(full, halves * HALF_BYTES + (works ? item.chunks * CHUNK_BYTES + 4 * TILE : 0));
    for (int half = 0; half < halves; half++) {
        u8* to = shared.tokens[stage] + half * HALF_BYTES;
        const int row = item.start + half * HALF;
        if (item.shares_weights) copy_box(to, layer.tokens, k0, row, full);
        else if (half == rank) copy_box_to_all(to, layer.tokens, k0, row, full, 3);
    }
    if (!works) return;
    for (int chunk = 0; chunk < item.chunks; chunk++) {
        if (!item.shares_weights || chunk == rank) copy_chunk(layer, item, shared.weights[stage], chunk, k0, full);
    }
    const float* scales = layer.token_scale + static_cast<long long>(k0 / STEP) * layer.positions + item.start;
    copy_bulk(shared.token_scales[stage], scales, 4 * TILE, full);
}

DEVICE void copy(const Layer& layer, Shared& shared, int count) {
    const int lane = threadIdx.x % 32, rank = cluster_rank();
    Ring ring;
    for (int n = blockIdx.x / 2;; n += gridDim.x / 2) {
        const Item item = find_item(layer, shared, count, n, rank);
        if (item.kind == END) break;
        for (int k0 = 0; k0 < layer.depth; k0 += STEP, ring.advance()) {
            // Both blocks have read what was there: what one copies may land in the other.
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            if (lane == 0) {
                if (k0 == 0) shared.items[ring.stage] = item;
                copy_step(layer, shared, item, ring.stage, k0, rank);
            }
            copy_weight_scale(layer, item, shared.weight_scales[ring.stage], k0, lane);
            arrive_with_copies(&shared.full[ring.stage]);
        }
    }
    barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
    if (lane == 0) {
        shared.items[ring.stage].kind = END;
        barrier_arrive(&shared.full[ring.stage]);
    }
    arrive_with_copies(&shared.full[ring.stage]);
    __syncwarp();  // together to the end, where blocks meet
}
