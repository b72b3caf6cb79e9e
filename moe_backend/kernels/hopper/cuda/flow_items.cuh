// flow.cu: the items that there are, and the warp that claims them.
#pragma once

#include "flow_shared.cuh"

// Experts' items in turn: of the first GEMM, and of the second of the expert that was hit `lag` places before. If
// INTERLEAVED the blocks have one more item each in between, at least, so that few find hidden columns missing; or else
// all of the first come first.
struct Order {
    int count, lag, blocks13, blocks2;

    DEVICE Order(const Layer& layer, int count) : count(count), blocks13(layer.blocks13()), blocks2(layer.blocks2()) {
        lag = INTERLEAVED ? min(count, ceil_div(static_cast<int>(gridDim.x), blocks13)) : count;
    }
    // Items before those of turn n, of `count + lag` turns.
    DEVICE int before(const Hit* hits, int n) const {
        return hits[min(n, count)].before * blocks13 + hits[max(n - lag, 0)].before * blocks2;
    }
    // The turn of a ticket.
    DEVICE int turn(const Hit* hits, int ticket) const {
        int low = 0, high = count + lag;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (before(hits, middle) <= ticket) low = middle;
            else high = middle;
        }
        return low;
    }
};

DEVICE Item find_item(const Layer& layer, const Shared& shared, int count, int ticket) {
    const Order order(layer, count);
    Item item = {};
    if (ticket >= order.before(shared.hits, count + order.lag)) return item;
    const int turn = order.turn(shared.hits, ticket);
    int inside = ticket - order.before(shared.hits, turn);
    const int first = turn < count ? (shared.hits[turn + 1].before - shared.hits[turn].before) * order.blocks13 : 0;
    item.gated = inside < first;
    if (!item.gated) inside -= first;
    item.hit = item.gated ? turn : turn - order.lag;
    const Hit hit = shared.hits[item.hit];
    const int own_tiles = shared.hits[item.hit + 1].before - hit.before;
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
