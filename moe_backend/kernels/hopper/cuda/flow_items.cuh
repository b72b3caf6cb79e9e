// flow.cu: the items that there are, and the warp that claims them.
#pragma once

#include "flow_shared.cuh"

DEVICE Item find_item(const Layer& layer, const Shared& shared, int count, int ticket) {
    const int tiles = shared.hits[count].before;
    Item item = {};
    item.gated = ticket < tiles * layer.blocks13();
    if (!item.gated) ticket -= tiles * layer.blocks13();
    const int blocks = item.gated ? layer.blocks13() : layer.blocks2();
    if (ticket >= tiles * blocks) return item;
    item.hit = find_hit(shared.hits, count, ticket / blocks);
    const Hit hit = shared.hits[item.hit];
    const int own_tiles = shared.hits[item.hit + 1].before - hit.before;
    const int inside = ticket - hit.before * blocks;
    const int each = 8 * ceil_div(hit.end - hit.start, 8 * own_tiles);
    item.block = inside / own_tiles;
    item.expert = hit.expert;
    item.start = hit.start + inside % own_tiles * each;
    item.tokens = min(each, hit.end - item.start);
    item.parts = item.gated ? min(PARTS, ceil_div(layer.I - item.block * GROUP, 32))
                            : min(PARTS, (layer.H - item.block * ROWS) / 64);
    return item;
}

// Whether an expert's hidden columns are there; or, if it must, waits until they are.
DEVICE bool hidden_ready(const Layer& layer, const Shared& shared, int hit, bool must) {
    const int tiles = shared.hits[hit + 1].before - shared.hits[hit].before;
    const int items = tiles * layer.blocks13();
    if (must) wait_until_at_least(layer.ready + hit, items);
    return must || load_acquire(layer.ready + hit) >= items;
}

// Claims the next item when the last steps of the one before are about to be copied, or with items of few
// steps one item earlier: it takes about as long as copying two or three steps. Lane 0 brings the first claim, so
// that a block which does not run yet has nothing that others wait for.
DEVICE void claim(const Layer& layer, Shared& shared, int count, int claimed) {
    const int lane = threadIdx.x % 32;
    for (int n = 0;; n++) {
        const int ticket = __shfl_sync(ALL, claimed, 0);
        Item item = find_item(layer, shared, count, ticket);
        if (item.gated) {
            int* tokens = shared.tokens[n % (QUEUE + 1)];
            for (int i = lane; i < item.columns(); i += 32) {
                tokens[i] = layer.token_of[item.start + min(i, item.tokens - 1)];
            }
            __syncwarp();
        }
        if (item.parts > 0) item.ready = item.gated || hidden_ready(layer, shared, item.hit, false);
        if (lane == 0) {
            shared.queue[n % QUEUE] = item;
            barrier_arrive(&shared.queued[n % QUEUE]);
        }
        if (item.parts == 0) return;
        const int before = layer.steps(item.gated) > 2 ? n : n - 1;
        if (before >= 0) barrier_wait(&shared.taken[before % QUEUE], before / QUEUE & 1);
        if (lane == 0) claimed = take_ticket(layer.ticket);
    }
}
