// pairs_bf16.cu, pairs_nvfp4.cu: the items that there are, and who gets which.
//
// An item is, for one block, up to TILE tokens of an expert, which are split evenly, in eights, with one block of weight
// rows. Both blocks of a pair have the same tokens.
//
// Compile-time constants: TILE.
#pragma once

#include "hits.cuh"
#include "shares.cuh"

enum { END = 0, WORK = 1, IDLE = 2 };

struct alignas(16) Item {
    int kind;    // END: there are no more; IDLE: only the other block of the pair has work
    int expert;
    int block;   // of hidden columns, or of output rows
    int start;   // first position
    int tokens;
};

// Items of an expert for a pair of blocks: tiles of its tokens, each with two blocks of weight rows at a time.
DEVICE int items_of(int tokens, int blocks) { return ceil_div(tokens, TILE) * ceil_div(blocks, 2); }

// The pair's nth item, as block `rank` of the pair sees it, of those of `count` experts. Tiles that share weights follow
// each other.
DEVICE Item find_item(const Hit* hits, int count, int blocks, int n, int rank) {
    Item item = {};
    if (n >= hits[count].before) return item;
    const Hit hit = hits[find_hit(hits, count, n)];
    const int tokens = hit.end - hit.start, tiles = ceil_div(tokens, TILE), inside = n - hit.before;
    const int each = even_share(tokens, TILE);
    item.block = inside / tiles * 2 + rank;
    item.kind = item.block < blocks ? WORK : IDLE;
    item.expert = hit.expert;
    item.start = hit.start + inside % tiles * each;
    item.tokens = min(each, hit.end - item.start);
    return item;
}

// The nth item of a pair, of those that are dealt out in turn, there and back: the pair that is last in one round is
// first in the next. As experts are listed by the size of their items (`sort.cu`; more than 512 in
// their own order) all get about as much.
DEVICE int deal(int n) {
    const int pair = blockIdx.x / 2, pairs = gridDim.x / 2;
    return n * pairs + (n % 2 ? pairs - 1 - pair : pair);
}

// A warp's MMAs, which alone read it, have read all of a stage that belongs to this barrier: both blocks may copy there.
DEVICE void release(u64* empty, int lane) {
    __syncwarp();
    if (lane < 2) barrier_arrive_at(empty, lane);
}
