// The slots of a call sorted by expert, and its tokens quantised or their columns reordered, in one launch.
//
// A slot is one of a token's TOP_K choices. Those of local experts get positions: expert by expert, in order
// of the slots, each expert's first a multiple of 4. So that no block waits for another, each counts for itself
// how many slots every expert has, and how many of those come before its own. The last block writes the list
// of experts; each other has `each` tokens, gives their slots positions and quantises them, per 128 columns, to
// e4m3, or keeps them in bf16 with columns in the order of the NVFP4 decoder; tokens without a local expert are left
// out.
//
// With many slots (CHUNKS) a launch before it has counted those of each CHUNKS-th part of the tokens, and a block
// adds those up; it looks through the slots of its own part alone. With SORTED, where slots are always counted, a token
// goes to the positions of all its slots, so that the accelerator can bring it.
//
// Nothing depends on the order in which threads run: what they add together are whole numbers.
//
// Compile-time constants: EXPERTS (local), NUM_IDS (ids from there on are left out, as -1 is), TOP_K, HAS_MAP,
// IDS64, WEIGHT_ON_INPUT (with TOP_K 1), QUANTISED, CHUNKS (0: none), SORTED, DESCENDING (the list), PIECES (of 256
// columns, which a warp has on their way).
#include "warps.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int PART = 256 * PIECES;        // columns of a token that a warp brings at once
constexpr int TOGETHER = 8;               // ids of a thread that are on their way at once
constexpr int ROUND = THREADS / TOP_K;    // tokens that get positions together
constexpr int EACH = (EXPERTS + THREADS - 1) / THREADS;  // experts of a thread
static_assert(TOP_K <= THREADS, "a token's slots in a round");

struct Shared {
    int total[EXPERTS], before[EXPERTS], start[EXPERTS];
    int position[ROUND * TOP_K];
    int warp_sums[WARPS];
    alignas(16) u32 ordered[QUANTISED ? 1 : WARPS][128];  // a warp's 256 columns
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
DEVICE int sum_before(Shared& shared, int value) {
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
DEVICE void count_all(const Call& call, Shared& shared, int own) {
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) shared.total[e] = shared.before[e] = 0;
    __syncthreads();
    look_through(call, 0, call.slots, [&](int expert, int slot) {
        add_shared(&shared.total[expert], 1);
        if (slot < own) add_shared(&shared.before[expert], 1);
    });
    __syncthreads();
}

// The same from counts of chunks, `[CHUNKS, EXPERTS]`, of `each` slots.
DEVICE void count_chunks(const Call& call, Shared& shared, const int* counts, int each, int own) {
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
DEVICE void start_experts(Shared& shared) {
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

// An expert's place in a list in which those that have more slots come first, so that items of like sizes are dealt out
// together.
DEVICE int place_of(const Shared& shared, int expert) {
    const int own = shared.total[expert];
    int place = 0;
    for (int e = 0; e < EXPERTS; e++) place += shared.total[e] > own || (shared.total[e] == own && e < expert);
    return place;
}

// How many experts have slots, and of each three numbers: expert, first position, end position.
DEVICE void list_experts(Shared& shared, int* list) {
    int hit = 0;
    for (int i = 0; i < EACH; i++) {
        const int e = EACH * threadIdx.x + i;
        hit += e < EXPERTS && shared.total[e] > 0;
    }
    int n = sum_before(shared, hit);
    for (int i = 0; i < EACH; i++) {
        const int e = EACH * threadIdx.x + i;
        if (e >= EXPERTS || shared.total[e] == 0) continue;
        int* entry = list + 1 + 3 * (DESCENDING ? place_of(shared, e) : n);
        entry[0] = e;
        entry[1] = shared.start[e];
        entry[2] = shared.start[e] + shared.total[e];
        n++;
    }
    if (threadIdx.x == THREADS - 1) list[0] = n;
}

// Positions of the slots of some tokens, in their order, by a warp.
DEVICE void place_slots(const Call& call, Shared& shared, int first_slot, int count, int* position, int* token_of) {
    const int lane = threadIdx.x;
    for (int n = 0; n < count; n += 32) {
        const bool inside = n + lane < count;
        const int expert = inside ? shared.position[n + lane] : -1;
        const u32 same = __match_any_sync(ALL, expert);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int at = expert < 0 ? -1 : shared.start[expert] + shared.before[expert] + rank;
        __syncwarp();
        if (expert >= 0 && rank == 0) shared.before[expert] += __popc(same);
        if (inside) {
            shared.position[n + lane] = at;
            position[first_slot + n + lane] = at;
            if (at >= 0) token_of[at] = (first_slot + n + lane) / TOP_K;
        }
        __syncwarp();
    }
}

// Eight columns of a token.
struct Piece {
    uint4 bits;

    DEVICE void load(const u16* x, long long token, int column, int H) {
        bits = column < H ? *reinterpret_cast<const uint4*>(x + token * H + column) : make_uint4(0, 0, 0, 0);
    }
};

// A warp's part of a token: of each 256 columns a lane has eight.
struct Part {
    Piece pieces[PIECES];

    DEVICE void load(const u16* x, long long token, int part, int lane, int H) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) pieces[i].load(x, token, part * PART + 256 * i + 8 * lane, H);
    }
};

// Whether one of a round's tokens has a local expert, for a warp.
DEVICE bool is_local(const Shared& shared, int token, int lane) {
    bool local = false;
    for (int k = lane; k < TOP_K; k += 32) local = local || shared.position[token * TOP_K + k] >= 0;
    return __ballot_sync(ALL, local) != 0;
}

// Where a token goes: to its own row, or to those of its slots; and rows that there are.
struct Rows {
    int token, rows;
    const int* positions;

    template <class Store> DEVICE void each(Store store) const {
        if constexpr (SORTED) {
#pragma unroll 1
            for (int k = 0; k < TOP_K; k++) {
                if (positions[k] >= 0) store(static_cast<long long>(positions[k]));
            }
        } else {
            store(static_cast<long long>(token));
        }
    }
};

// A thread's eight columns as codes, and the largest number, which they share with those of 15 more threads.
struct Codes {
    uint2 bits;
    float amax;

    DEVICE void quantise(const Piece& piece, float weight) {
        const u32 pairs[4] = {piece.bits.x, piece.bits.y, piece.bits.z, piece.bits.w};
        float values[8];
        amax = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            values[2 * i] = low_bf16(pairs[i]);
            values[2 * i + 1] = high_bf16(pairs[i]);
            if (WEIGHT_ON_INPUT) values[2 * i] *= weight, values[2 * i + 1] *= weight;
            amax = fmaxf(amax, fmaxf(fabsf(values[2 * i]), fabsf(values[2 * i + 1])));
        }
#pragma unroll
        for (int by = 1; by < 16; by *= 2) amax = fmaxf(amax, __shfl_xor_sync(ALL, amax, by));
        const float factor = codes_per_unit(amax);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] *= factor;
        bits = {to_fp8(values[0], values[1], values[2], values[3]), to_fp8(values[4], values[5], values[6], values[7])};
    }
};

// A warp's part of a token quantised; what goes to several rows is made once.
DEVICE void store_codes(const Part& part, float weight, const Rows& to, int column, int H, u8* operand,
                        float* operand_scale) {
    constexpr int AT_ONCE = SORTED ? PIECES : 1;
#pragma unroll
    for (int first = 0; first < PIECES; first += AT_ONCE) {
        Codes codes[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) codes[i].quantise(part.pieces[first + i], weight);
        to.each([&](long long row) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int own = column + 256 * (first + i);
                if (own >= H) continue;
                *reinterpret_cast<uint2*>(operand + row * H + own) = codes[i].bits;
                if (column % 128 != 0) continue;
                operand_scale[static_cast<long long>(own / 128) * to.rows + row] = unit_of_codes(codes[i].amax);
            }
        });
    }
}

// A warp's 256 columns in the order in which the decoder of NVFP4 yields codes: of a thread's eight, neighbours in
// one of four times 64, the even ones come before all odd ones.
DEVICE uint4 reorder(const Piece& piece, float weight, u32* ordered) {
    u32 pairs[4] = {piece.bits.x, piece.bits.y, piece.bits.z, piece.bits.w};
    if (WEIGHT_ON_INPUT) {
#pragma unroll
        for (u32& pair : pairs) pair = to_bf16(low_bf16(pair) * weight, high_bf16(pair) * weight);
    }
    const int lane = threadIdx.x % 32;
    u32* to = ordered + lane % 8 * 8 + lane / 8;
#pragma unroll
    for (int i = 0; i < 2; i++) {  // columns 0 and 4, then 2 and 6; and the odd ones after these
        to[4 * i] = __byte_perm(pairs[i], pairs[2 + i], 0x5410);
        to[64 + 4 * i] = __byte_perm(pairs[i], pairs[2 + i], 0x7632);
    }
    __syncwarp();
    const uint4 bits = *reinterpret_cast<const uint4*>(ordered + 4 * lane);
    __syncwarp();
    return bits;
}

// A warp's part of a token in that order.
DEVICE void store_reordered(const Part& part, float weight, u32* ordered, const Rows& to, int column, int H,
                            u8* operand) {
    uint4 bits[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) bits[i] = reorder(part.pieces[i], weight, ordered);
    to.each([&](long long row) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int own = column + 256 * i;
            if (own < H) *reinterpret_cast<uint4*>(operand + (row * H + own) * 2) = bits[i];
        }
    });
}

// Slots of each expert in each chunk of `each` slots: `[CHUNKS, EXPERTS]`, a block for a chunk.
KERNEL void __launch_bounds__(THREADS, 2) count(const void* ids, const int* expert_map, int* counts, int slots, int each) {
    SHARED_MEMORY(memory);
    int* found = reinterpret_cast<int*>(memory);
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) found[e] = 0;
    __syncthreads();
    wait_for_launches();
    let_next_start();
    const int begin = min(static_cast<int>(blockIdx.x) * each, slots);
    const Call call = {ids, expert_map, slots};
    look_through(call, begin, min(begin + each, slots), [&](int expert, int) { add_shared(&found[expert], 1); });
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) counts[blockIdx.x * EXPERTS + e] = found[e];
}

// x: `[tokens, H]` bf16, H a multiple of 8, and of 256 if not QUANTISED; ids: `[tokens, TOP_K]`; expert_map: `[NUM_IDS]` if HAS_MAP;
// topk_weights: `[tokens, 1]` if WEIGHT_ON_INPUT.
// counts: of `count`, if CHUNKS, with chunks of so many slots, a multiple of a block's.
// operand: `[rows, H]`, e4m3 with operand_scale, `[H / 128, rows]`, or bf16: rows are tokens, or if SORTED positions.
// position: `[tokens, TOP_K]`, -1 for slots that are left out; token_of: `[positions]`.
// counters: so many zeros for the launch to come.
KERNEL void __launch_bounds__(THREADS, 2) route(
    const u16* x, const void* ids, const int* expert_map, const float* topk_weights, u8* operand,
    float* operand_scale, int* position, int* token_of, int* list, int* counters, const int* counts, int num_counters,
    int tokens, int rows, int each, int each_chunk, int H) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    wait_for_launches();
    let_next_start();
    const Call call = {ids, expert_map, tokens * TOP_K};
    const int blocks = gridDim.x - 1, block = blockIdx.x;
    if (block == blocks) {
        for (int i = threadIdx.x; i < num_counters; i += THREADS) counters[i] = 0;
        if (CHUNKS) count_chunks(call, shared, counts, each_chunk, 0);
        else count_all(call, shared, 0);
        start_experts(shared);
        list_experts(shared, list);
        return;
    }
    const int begin = block * each, end = min(begin + each, tokens);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = (H + PART - 1) / PART;
    Part next;
    next.load(x, min(begin + warp / parts, end - 1), warp % parts, lane, H);  // on its way while slots are counted
    if (CHUNKS) count_chunks(call, shared, counts, each_chunk, begin * TOP_K);
    else count_all(call, shared, begin * TOP_K);
    start_experts(shared);
    for (int first = begin; first < end; first += ROUND) {
        const int round = min(ROUND, end - first), slot = first * TOP_K + static_cast<int>(threadIdx.x);
        if (threadIdx.x < round * TOP_K) shared.position[threadIdx.x] = call.expert(call.id(slot));
        __syncthreads();
        if (threadIdx.x < 32) place_slots(call, shared, first * TOP_K, round * TOP_K, position, token_of);
        __syncthreads();
        // A warp takes parts of tokens; those without a local expert are not read.
        if (first != begin) next.load(x, min(first + warp / parts, end - 1), warp % parts, lane, H);
        for (int job = warp; job < round * parts; job += WARPS) {
            const Part part = next;
            const int inside = job / parts, after = (job + WARPS) / parts;
            if (after < round && is_local(shared, after, lane)) {
                next.load(x, first + after, (job + WARPS) % parts, lane, H);
            }
            if (!is_local(shared, inside, lane)) continue;
            const int token = first + inside;
            const float weight = WEIGHT_ON_INPUT ? topk_weights[token] : 1.0f;
            const Rows to = {token, rows, shared.position + inside * TOP_K};
            const int column = job % parts * PART + 8 * lane;
            if (QUANTISED) store_codes(part, weight, to, column, H, operand, operand_scale);
            else store_reordered(part, weight, shared.ordered[warp], to, column, H, operand);
        }
        __syncthreads();
    }
}
