// once.cu: which experts the tokens are routed to, and with which weights.
#pragma once

#include "once_shared.cuh"

DEVICE void clear_tables(const Shared& s) {
    if (threadIdx.x == 0) *s.finished() = 0;
    u32* weights = reinterpret_cast<u32*>(s.weights());
    for (int n = threadIdx.x; n < HITS * TOKENS; n += blockDim.x) weights[n] = ABSENT;
    for (int n = threadIdx.x; n < up_to(EXPERTS, 32); n += blockDim.x) s.ranks()[n] = 0;
}

// What every block reads and L2 has long forgotten: memory is a microsecond away.
DEVICE void prefetch_tables(const Problem& p) {
    int byte = threadIdx.x * 128;
    if (HAS_MAP && byte < NUM_IDS * 4) prefetch(reinterpret_cast<const u8*>(p.expert_map) + byte);
    if (FORMAT != NVFP4) return;
    if (byte < EXPERTS * 8) prefetch(reinterpret_cast<const u8*>(p.w13_global) + byte);
    if (byte < EXPERTS * 4) prefetch(reinterpret_cast<const u8*>(p.w2_global) + byte);
}

DEVICE int valid_id(const Problem& p, int slot) {
    long long id = IDS64 ? static_cast<const long long*>(p.ids)[slot] : static_cast<const int*>(p.ids)[slot];
    return id >= 0 && id < NUM_IDS ? static_cast<int>(id) : -1;
}

// Numbers the experts that are hit in ascending order, and returns how many there are.
DEVICE int list_hits(const Shared& s, int lane) {
    constexpr int WORDS_OF_32 = ceil_div(EXPERTS, 32);
    u32 mine = 0;  // the hits among experts 32 lane..
#pragma unroll 16
    for (int i = 0; i < WORDS_OF_32; ++i) {
        u32 word = __ballot_sync(0xFFFFFFFF, s.ranks()[i * 32 + lane] != 0);
        if (lane == i) mine = word;
    }
    int before = __popc(mine);
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
        int other = __shfl_sync(0xFFFFFFFF, before, (lane - apart) & 31);
        if (lane >= apart) before += other;
    }
    int count = __shfl_sync(0xFFFFFFFF, before, 31);
    before -= __popc(mine);
#pragma unroll 16
    for (int i = 0; i < WORDS_OF_32; ++i) {
        u32 word = __shfl_sync(0xFFFFFFFF, mine, i);
        int rank = __shfl_sync(0xFFFFFFFF, before, i) + __popc(word & ((1u << lane) - 1));
        if (word >> lane & 1) {
            s.ranks()[i * 32 + lane] = rank;
            s.hit_experts()[rank] = i * 32 + lane;
        }
    }
    return count;
}

// The whole map comes together with the ids: looking ids up in memory would be one more trip there.
DEVICE void bring_map(const Shared& s, const Problem& p, int lane) {
    constexpr int ROUNDS = ceil_div(NUM_IDS, 32);
    int expert[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) expert[i] = i * 32 + lane < NUM_IDS ? p.expert_map[i * 32 + lane] : -1;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) s.map()[i * 32 + lane] = expert[i];
}

// By the leading producer: which experts are hit; returns how many.
DEVICE int route(const Shared& s, const Problem& p, int lane) {
    constexpr int ROUNDS = ceil_div(SLOTS, 32);
    int slots = p.tokens * TOP_K, expert[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) expert[i] = i * 32 + lane < slots ? valid_id(p, i * 32 + lane) : -1;
    if (HAS_MAP) {
        bring_map(s, p, lane);
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i)
        if (HAS_MAP && expert[i] >= 0) expert[i] = s.map()[expert[i]];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        int slot = i * 32 + lane;
        bool here = expert[i] >= 0 && expert[i] < EXPERTS;
        if (slot < slots) s.slot_experts()[slot] = here ? expert[i] : -1;
        if (here) s.ranks()[expert[i]] = 1;
    }
    __syncwarp();
    int hits = list_hits(s, lane);
    if (lane == 0) *s.hits() = hits;
    __syncwarp();
    if (lane == 0) barrier_arrive(s.listed());
    return hits;
}

// By the consumers, once the hits are listed: the weights of (hit, token). The first of a token's
// slots that names an expert takes the others' weights along.
DEVICE void note_weights(const Shared& s, const Problem& p) {
    for (int slot = threadIdx.x; slot < p.tokens * TOP_K; slot += CONSUMERS * 32) {
        int token = slot / TOP_K, k = slot % TOP_K;
        const int* experts = s.slot_experts() + token * TOP_K;
        int expert = experts[k];
        if (expert < 0) continue;
        float weight = p.topk_weights[slot];
        bool first = true;
#pragma unroll
        for (int other = 0; other < TOP_K; ++other) {
            if (other == k || experts[other] != expert) continue;
            first = first && other > k;
            weight += p.topk_weights[token * TOP_K + other];
        }
        if (first) s.weights()[s.ranks()[expert] * TOKENS + token] = WEIGHT_ON_INPUT ? 1.0f : weight;
    }
}

// By the consumers, likewise: the decoder owes 2**8 to the global scales.
DEVICE void note_factors(const Shared& s, const Problem& p) {
    for (int hit = threadIdx.x; hit < *s.hits(); hit += CONSUMERS * 32) {
        int expert = s.hit_experts()[hit];
        float gate = p.w13_global[2 * expert], up = p.w13_global[2 * expert + 1], down = p.w2_global[expert];
        s.factors()[hit] = make_float4(gate * 256.0f, up * 256.0f, down * 256.0f, 0.0f);
    }
}
