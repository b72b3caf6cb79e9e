// The slots of a call sorted by expert, and its tokens quantised or their columns reordered, in one launch.
//
// A slot is one of a token's TOP_K choices. Those of local experts get positions: expert by expert, in order
// of the slots, each expert's first a multiple of 4. So that no block waits for another, each counts for itself
// how many slots every expert has, and how many of those come before its own. The last block writes the list
// of experts; each other has `each` tokens, gives their slots positions and quantises them, per 128 columns, to
// e4m3, or keeps them in bf16 with columns in the order of the NVFP4 decoder; tokens without a local expert are left
// out.
//
// Nothing depends on the order in which threads run: what they add together are whole numbers.
//
// Compile-time constants: EXPERTS (local), NUM_IDS (ids from there on are left out, as -1 is), TOP_K, HAS_MAP,
// IDS64, WEIGHT_ON_INPUT (with TOP_K 1), QUANTISED.
#include "warps.cuh"

constexpr int THREADS = 512;
constexpr int TOGETHER = 8;               // ids of a thread that are on their way at once
constexpr int ROUND = THREADS / TOP_K;    // tokens that get positions together
constexpr int EACH = (EXPERTS + THREADS - 1) / THREADS;  // experts of a thread
static_assert(TOP_K <= THREADS, "a token's slots in a round");

struct Shared {
    int total[EXPERTS], before[EXPERTS], start[EXPERTS];
    int position[ROUND * TOP_K];
    int warp_sums[THREADS / 32];
    alignas(16) u32 ordered[QUANTISED ? 1 : THREADS / 32][128];  // a warp's 256 columns
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

// Slots of each expert, and those before `own`; and each expert's first position.
DEVICE void count_slots(const Call& call, Shared& shared, int own) {
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) shared.total[e] = shared.before[e] = 0;
    __syncthreads();
    for (int first = threadIdx.x; first < call.slots; first += TOGETHER * THREADS) {
        long long ids[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int slot = first + i * THREADS;
            ids[i] = slot < call.slots ? call.id(slot) : -1;
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int expert = call.expert(ids[i]);
            if (expert < 0) continue;
            add_shared(&shared.total[expert], 1);
            if (first + i * THREADS < own) add_shared(&shared.before[expert], 1);
        }
    }
    __syncthreads();
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
        int* entry = list + 1 + 3 * n++;
        entry[0] = e;
        entry[1] = shared.start[e];
        entry[2] = shared.start[e] + shared.total[e];
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

// A thread's eight columns as codes, with the scale that they share with those of 15 more threads.
DEVICE void quantise(const Piece& piece, float weight, long long token, int column, int H, int tokens, u8* operand,
                     float* operand_scale) {
    const u32 pairs[4] = {piece.bits.x, piece.bits.y, piece.bits.z, piece.bits.w};
    float values[8], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = low_bf16(pairs[i]);
        values[2 * i + 1] = high_bf16(pairs[i]);
        if (WEIGHT_ON_INPUT) values[2 * i] *= weight, values[2 * i + 1] *= weight;
        amax = fmaxf(amax, fmaxf(fabsf(values[2 * i]), fabsf(values[2 * i + 1])));
    }
#pragma unroll
    for (int by = 1; by < 16; by *= 2) amax = fmaxf(amax, __shfl_xor_sync(ALL, amax, by));
    if (column >= H) return;
    const float factor = codes_per_unit(amax);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= factor;
    *reinterpret_cast<uint2*>(operand + token * H + column) = {to_fp8(values[0], values[1], values[2], values[3]),
                                                               to_fp8(values[4], values[5], values[6], values[7])};
    if (column % 128 == 0) {
        operand_scale[static_cast<long long>(column / 128) * tokens + token] = unit_of_codes(amax);
    }
}

// A warp's 256 columns in the order in which the decoder of NVFP4 yields codes: of a thread's eight, neighbours in
// one of four times 64, the even ones come before all odd ones.
DEVICE void reorder(const Piece& piece, float weight, u32* ordered, long long token, int column, int H, u8* operand) {
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
    if (column < H) *reinterpret_cast<uint4*>(operand + (token * H + column) * 2) = bits;
    __syncwarp();
}

// A thread's eight columns of a token as the GEMMs want them.
DEVICE void prepare(Shared& shared, const Piece& piece, float weight, long long token, int column, int H, int tokens,
                    u8* operand, float* operand_scale) {
    if (QUANTISED) quantise(piece, weight, token, column, H, tokens, operand, operand_scale);
    else reorder(piece, weight, shared.ordered[threadIdx.x / 32], token, column, H, operand);
}

// x: `[tokens, H]` bf16, H a multiple of 8, and of 256 if not QUANTISED; ids: `[tokens, TOP_K]`; expert_map: `[NUM_IDS]` if HAS_MAP;
// topk_weights: `[tokens, 1]` if WEIGHT_ON_INPUT.
// operand: `[tokens, H]`, e4m3 with operand_scale, `[H / 128, tokens]`, or bf16.
// position: `[tokens, TOP_K]`, -1 for slots that are left out; token_of: `[positions]`.
// counters: so many zeros for the launch to come.
KERNEL void __launch_bounds__(THREADS, 2) route(
    const u16* x, const void* ids, const int* expert_map, const float* topk_weights, u8* operand,
    float* operand_scale, int* position, int* token_of, int* list, int* counters, int num_counters, int tokens,
    int each, int H) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    wait_for_launches();
    let_next_start();
    const Call call = {ids, expert_map, tokens * TOP_K};
    const int blocks = gridDim.x - 1, block = blockIdx.x;
    if (block == blocks) {
        for (int i = threadIdx.x; i < num_counters; i += THREADS) counters[i] = 0;
        count_slots(call, shared, 0);
        list_experts(shared, list);
        return;
    }
    const int begin = block * each, end = min(begin + each, tokens), column = 8 * static_cast<int>(threadIdx.x);
    Piece next;
    next.load(x, begin, column, H);  // on its way while slots are counted
    count_slots(call, shared, begin * TOP_K);
    for (int first = begin; first < end; first += ROUND) {
        const int count = min(ROUND, end - first) * TOP_K, slot = first * TOP_K + static_cast<int>(threadIdx.x);
        if (threadIdx.x < count) shared.position[threadIdx.x] = call.expert(call.id(slot));
        __syncthreads();
        if (threadIdx.x < 32) place_slots(call, shared, first * TOP_K, count, position, token_of);
        __syncthreads();
        for (int token = first; token < min(first + ROUND, end); token++) {
            const Piece piece = next;
            if (token + 1 < end) next.load(x, token + 1, column, H);
            const int* positions = shared.position + (token - first) * TOP_K;
            bool local = false;
            for (int k = 0; k < TOP_K; k++) local = local || positions[k] >= 0;
            if (!local) continue;
            const float weight = WEIGHT_ON_INPUT ? topk_weights[token] : 1.0f;
            prepare(shared, piece, weight, token, column, H, tokens, operand, operand_scale);
            for (int c = column + 8 * THREADS; c - column < H; c += 8 * THREADS) {
                Piece more;
                more.load(x, token, c, H);
                prepare(shared, more, weight, token, c, H, tokens, operand, operand_scale);
            }
        }
        __syncthreads();
    }
}
