// Slots sorted by expert: what the launches that do it have in common.
//
// A slot is one of a token's TOP_K choices. Those of local experts get positions: expert by expert, in order of the
// slots, each expert's first a multiple of 4. So that no block waits for another, each finds for itself how many slots
// every expert has, and how many of those come before its own: by looking through all, or, if CHUNKS, where a launch
// before it (`count.cu`) has counted those of each CHUNKS-th part of the tokens, by adding those up and looking through
// the slots of its own part alone.
//
// Nothing depends on the order in which threads run: what they add together are whole numbers.
//
// Compile-time constants: EXPERTS (local), NUM_IDS (ids from there on are left out, as -1 is), TOP_K, HAS_MAP, IDS64,
// CHUNKS (0: none).
#pragma once

#include "shares.cuh"
#include "warps.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int TOGETHER = 8;               // ids of a thread that are on their way at once
constexpr int ROUND = THREADS / TOP_K;    // tokens that get positions together
constexpr int EACH = (EXPERTS + THREADS - 1) / THREADS;  // experts of a thread
static_assert(TOP_K <= THREADS, "a token's slots in a round");

struct Slots {
    int total[EXPERTS], before[EXPERTS], start[EXPERTS];
    int position[ROUND * TOP_K];
    int warp_sums[WARPS];
};

struct Call {
    const void* ids;
    const int* expert_map;
    int slots;

    DEVICE long long id(int slot) const {
        return IDS64 ? static_cast<const long long*>(ids)[slot] : static_cast<const int*>(ids)[slot];
    }
    // The local expert of an id, or -1.
    DEVICE int expert(long long id) const {
        if (id < 0 || id >= NUM_IDS) return -1;
        return HAS_MAP ? expert_map[id] : static_cast<int>(id);
    }
};

// Sum of `value` over all threads before this one.
DEVICE int sum_before(Slots& shared, int value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int up_to = sum_up_to(value, lane);
    if (lane == 31) shared.warp_sums[warp] = up_to;
    __syncthreads();
    int sum = up_to - value;
    for (int w = 0; w < warp; w++) sum += shared.warp_sums[w];
    __syncthreads();
    return sum;
}

// Calls `add` with the expert of each slot from `begin` to `end` that has one, and the slot.
template <class Add> DEVICE void look_through(const Call& call, int begin, int end, Add add) {
    for (int first = begin + static_cast<int>(threadIdx.x); first < end; first += TOGETHER * THREADS) {
        long long ids[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int slot = first + i * THREADS;
            ids[i] = slot < end ? call.id(slot) : -1;
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int expert = call.expert(ids[i]);
            if (expert >= 0) add(expert, first + i * THREADS);
        }
    }
}

// Slots of each expert, and those before `own`, by looking through all.
DEVICE void count_all(const Call& call, Slots& shared, int own) {
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) shared.total[e] = shared.before[e] = 0;
    __syncthreads();
    look_through(call, 0, call.slots, [&](int expert, int slot) {
        add_shared(&shared.total[expert], 1);
        if (slot < own) add_shared(&shared.before[expert], 1);
    });
    __syncthreads();
}

// The same from counts of chunks, `[CHUNKS, EXPERTS]`, of `each` slots.
DEVICE void count_chunks(const Call& call, Slots& shared, const int* counts, int each, int own) {
    const int chunk = own / each;
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        int total = 0, before = 0;
#pragma unroll 16
        for (int c = 0; c < CHUNKS; c++) {
            const int count = counts[c * EXPERTS + e];
            total += count;
            if (c < chunk) before += count;
        }
        shared.total[e] = total;
        shared.before[e] = before;
    }
    __syncthreads();
    look_through(call, chunk * each, own, [&](int expert, int) { add_shared(&shared.before[expert], 1); });
    __syncthreads();
}

// Each expert's first position.
DEVICE void start_experts(Slots& shared) {
    int padded = 0;
    for (int i = 0; i < EACH; i++) {
        const int e = EACH * threadIdx.x + i;
        if (e < EXPERTS) padded += (shared.total[e] + 3) / 4 * 4;
    }
    int start = sum_before(shared, padded);
    for (int i = 0; i < EACH; i++) {
        const int e = EACH * threadIdx.x + i;
        if (e >= EXPERTS) break;
        shared.start[e] = start;
        start += (shared.total[e] + 3) / 4 * 4;
    }
    __syncthreads();
}

// Where each expert's positions begin, and how many of those come before the first of a block's tokens.
DEVICE void start_block(const Call& call, Slots& shared, const int* counts, int each_chunk, int first_token) {
    if (CHUNKS) count_chunks(call, shared, counts, each_chunk, first_token * TOP_K);
    else count_all(call, shared, first_token * TOP_K);
    start_experts(shared);
}

// An expert's place in a list in which those whose items have more tokens come first, so that items of like sizes are dealt
// out together. Of each expert `before` has how many.
DEVICE int place_of(const Slots& shared, int expert) {
    const int own = shared.before[expert];
    int place = 0;
    for (int e = 0; e < EXPERTS; e++) place += shared.before[e] > own || (shared.before[e] == own && e < expert);
    return place;
}

// How many experts have slots, and of each three numbers: expert, first position, end position. In the order of the experts;
// or by their items, of at most MOST tokens.
template <int MOST> DEVICE void list_experts(Slots& shared, int* list) {
    if constexpr (MOST > 0) {
        for (int e = threadIdx.x; e < EXPERTS; e += THREADS) shared.before[e] = even_share(shared.total[e], MOST);
        // All see these after the sum.
    }
    int hit = 0;
    for (int i = 0; i < EACH; i++) {
        const int e = EACH * threadIdx.x + i;
        hit += e < EXPERTS && shared.total[e] > 0;
    }
    int n = sum_before(shared, hit);
    for (int i = 0; i < EACH; i++) {
        const int e = EACH * threadIdx.x + i;
        if (e >= EXPERTS || shared.total[e] == 0) continue;
        int* entry = list + 1 + 3 * (MOST ? place_of(shared, e) : n);
        entry[0] = e;
        entry[1] = shared.start[e];
        entry[2] = shared.start[e] + shared.total[e];
        n++;
    }
    if (threadIdx.x == THREADS - 1) list[0] = n;
}

// What the block that writes the list does.
template <int MOST>
DEVICE void list_all(const Call& call, Slots& shared, const int* counts, int each_chunk, int* list) {
    start_block(call, shared, counts, each_chunk, 0);
    list_experts<MOST>(shared, list);
}

// The experts of some tokens' slots, to be replaced by the positions.
DEVICE void find_experts(const Call& call, Slots& shared, int first_slot, int count) {
    if (threadIdx.x < count) shared.position[threadIdx.x] = call.expert(call.id(first_slot + static_cast<int>(threadIdx.x)));
}

// Positions of the slots of some tokens, in their order, by a warp; also to memory. Calls `told` with a slot's number and
// its position.
template <class Told> DEVICE void place_slots(Slots& shared, int count, int* position, Told told) {
    const int lane = threadIdx.x;
    for (int n = 0; n < count; n += 32) {
        const bool inside = n + lane < count;
        const int expert = inside ? shared.position[n + lane] : -1;
        const u32 same = __match_any_sync(ALL, expert);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int at = expert < 0 ? -1 : shared.start[expert] + shared.before[expert] + rank;
        __syncwarp();
        if (expert >= 0 && rank == 0) shared.before[expert] += __popc(same);
        if (inside) shared.position[n + lane] = position[n + lane] = at;
        if (at >= 0) told(n + lane, at);
        __syncwarp();
    }
}
