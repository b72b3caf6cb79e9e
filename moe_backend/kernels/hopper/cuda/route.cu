// The slots of a call sorted by expert (`slots.cuh`), and its tokens quantised or their columns reordered (`tokens.cuh`), in
// one launch.
//
// The last block writes the list of experts; each other has `each` tokens, gives their slots positions and brings them into
// form, each into its own row; tokens without a local expert are left out.
//
// Compile-time constants: those of both.
#include "slots.cuh"
#include "tokens.cuh"

struct Shared : Slots {
    alignas(16) u32 ordered[REORDERED ? WARPS : 1][ORDERED];
};

// Whether one of a round's tokens has a local expert, for a warp.
DEVICE bool is_local(const Slots& shared, int token, int lane) {
    bool local = false;
    for (int k = lane; k < TOP_K; k += 32) local = local || shared.position[token * TOP_K + k] >= 0;
    return __ballot_sync(ALL, local) != 0;
}

// Where a token goes.
struct OwnRow {
    static constexpr bool MANY = false;
    int token;

    template <class Store> DEVICE void each(Store store) const { store(static_cast<long long>(token)); }
};

// x: `[tokens, H]` bf16, H a multiple of 8, and of 256 if REORDERED; ids: `[tokens, TOP_K]`; expert_map: `[NUM_IDS]` if HAS_MAP;
// topk_weights: `[tokens, 1]` if WEIGHT_ON_INPUT.
// counts: of `count`, if CHUNKS, with chunks of so many slots, a multiple of a block's.
// operand: `[tokens, H]`, e4m3 with operand_scale, `[H / 128, tokens]`, or bf16.
// position: `[tokens, TOP_K]`, -1 for slots that are left out; token_of: `[positions]`.
// counters: so many zeros for the launch to come.
KERNEL void __launch_bounds__(THREADS, 2) route(
    const u16* x, const void* ids, const int* expert_map, const float* topk_weights, u8* operand,
    float* operand_scale, int* position, int* token_of, int* list, int* counters, const int* counts, int num_counters,
    int tokens, int each, int each_chunk, int H) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    wait_for_launches();
    let_next_start();
    const Call call = {ids, expert_map, tokens * TOP_K};
    const int blocks = gridDim.x - 1, block = blockIdx.x;
    if (block == blocks) {
        for (int i = threadIdx.x; i < num_counters; i += THREADS) counters[i] = 0;
        list_all<0>(call, shared, counts, each_chunk, list);
        return;
    }
    const int begin = block * each, end = min(begin + each, tokens);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = (H + PART - 1) / PART;
    Part next;
    next.load(x, min(begin + warp / parts, end - 1), warp % parts, lane, H);  // on its way while slots are counted
    start_block(call, shared, counts, each_chunk, begin);
    for (int first = begin; first < end; first += ROUND) {
        const int round = min(ROUND, end - first);
        find_experts(call, shared, first * TOP_K, round * TOP_K);
        __syncthreads();
        if (threadIdx.x < 32) {
            place_slots(shared, round * TOP_K, position + first * TOP_K,
                        [&](int slot, int at) { token_of[at] = first + slot / TOP_K; });
        }
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
            const int token = first + inside, column = job % parts * PART + 8 * lane;
            const float weight = WEIGHT_ON_INPUT ? topk_weights[token] : 1.0f;
            store_part(part, weight, shared.ordered[REORDERED ? warp : 0], OwnRow{token}, column, H, tokens, operand,
                       operand_scale);
        }
        __syncthreads();
    }
}
