// The slots of a call sorted by expert (`slots.cuh`), where slots were counted beforehand. `spread.cu` brings tokens to the
// positions.
//
// The last block writes the list of experts; each other has `each` tokens and gives their slots positions.
//
// Compile-time constants: those of slots.cuh; TILE (the list: experts whose items, of at most so many tokens, have
// more come first; 0: in their order), LONE (targets are wanted), WEIGHT_ON_INPUT (the routing weights have been applied).
#include "slots.cuh"
#include "targets.cuh"

// Where outputs of this thread's slot go; slots and weights are those of a round's tokens.
DEVICE void aim(const Slots& shared, int slots, int first_token, const float* weights, Target* targets) {
    const int own = threadIdx.x;
    if (own >= slots || shared.position[own] < 0) return;
    const int token = own / TOP_K;
    int local = 0;
    for (int k = 0; k < TOP_K; k++) local += shared.position[token * TOP_K + k] >= 0;
    const bool alone = local == 1;
    targets[shared.position[own]] = {alone ? first_token + token : -1, alone && !WEIGHT_ON_INPUT ? weights[own] : 1.0f};
}

// ids: `[tokens, TOP_K]`; expert_map: `[NUM_IDS]` if HAS_MAP; topk_weights: `[tokens, TOP_K]`, read if LONE.
// counts: of `count`, with chunks of so many slots, a multiple of a block's.
// position: `[tokens, TOP_K]`, -1 for slots that are left out; targets: `[positions]`, if LONE.
KERNEL void __launch_bounds__(THREADS, 2) sort(const void* ids, const int* expert_map, const float* topk_weights,
                                                int* position, Target* targets, int* list, const int* counts, int tokens,
                                                int each, int each_chunk) {
    SHARED_MEMORY(memory);
    Slots& shared = *reinterpret_cast<Slots*>(memory);
    wait_for_launches();
    let_next_start();
    const Call call = {ids, expert_map, tokens * TOP_K};
    const int blocks = gridDim.x - 1, block = blockIdx.x;
    if (block == blocks) {
        list_all<TILE>(call, shared, counts, each_chunk, list);
        return;
    }
    const int begin = block * each, end = min(begin + each, tokens);
    start_block(call, shared, counts, each_chunk, begin);
    for (int first = begin; first < end; first += ROUND) {
        const int first_slot = first * TOP_K, slots = min(ROUND, end - first) * TOP_K;
        find_experts(call, shared, first_slot, slots);
        __syncthreads();
        if (threadIdx.x < 32) place_slots(shared, slots, position + first_slot, [](int, int) {});
        __syncthreads();
        if (LONE) aim(shared, slots, first, topk_weights + first_slot, targets);
        __syncthreads();
    }
}
