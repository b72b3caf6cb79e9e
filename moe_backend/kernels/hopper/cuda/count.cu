// How many slots of each part of a call's tokens every expert has; `slots.cuh` has the rest, and the constants.
#include "slots.cuh"

// ids: `[tokens, TOP_K]`; expert_map: `[NUM_IDS]` if HAS_MAP; counts: `[chunks, EXPERTS]`, a block for each chunk of `each`
// slots.
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
