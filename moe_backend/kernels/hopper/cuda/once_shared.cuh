// once.cu: what a launch is given, where things are in shared memory, and turns in its ring.
#pragma once

#include "once_sizes.cuh"

struct Problem {
    const u8* x;
    const void* ids;
    const int* expert_map;
    const float* topk_weights;
    const u8 *w13, *w13_scale;
    const float* w13_global;
    const u8 *w2, *w2_scale;
    const float* w2_global;
    u16 *hidden, *out;
    int *ticket, *done, *exited;  // units claimed; of each group units done; blocks that are past them
    int tokens;
    float limit, alpha, beta;
};

// Where things are in shared memory; the ring comes first.
struct Shared {
    u8* ring;

    DEVICE u8* stage(int s) const { return ring + s * STAGE; }
    DEVICE u8* stage_scales(int s) const { return stage(s) + STAGE_DATA; }
    DEVICE u8* tokens() const { return ring + STAGES * STAGE; }
    DEVICE float4* sums() const { return reinterpret_cast<float4*>(tokens() + TOKENS_BYTES); }
    // [hit][token], ABSENT or a routing weight
    DEVICE float* weights() const { return reinterpret_cast<float*>(sums() + SUMS); }
    DEVICE int* hit_experts() const { return reinterpret_cast<int*>(weights() + HITS * TOKENS); }
    DEVICE int* slot_experts() const { return hit_experts() + up_to(HITS, 4); }
    // of each expert whether it is hit, then which hit it is
    DEVICE int* ranks() const { return slot_experts() + up_to(SLOTS, 4); }
    DEVICE int* map() const { return ranks() + up_to(EXPERTS, 32); }
    // of a hit NVFP4's factors of gate, of up and of the hidden columns
    DEVICE float4* factors() const { return reinterpret_cast<float4*>(map() + MAP); }
    DEVICE int* hits() const { return reinterpret_cast<int*>(factors() + FACTORS); }
    // how many groups of hits have all their hidden columns, up to the first that has not
    DEVICE int* finished() const { return hits() + 1; }
    DEVICE u64* full(int s) const { return reinterpret_cast<u64*>(hits() + 4) + s; }
    DEVICE u64* empty(int s) const { return full(STAGES) + s; }
    // what a stage is for is known; the hits are
    DEVICE u64* assigned(int s) const { return empty(STAGES) + s; }
    DEVICE u64* listed() const { return assigned(STAGES); }
    // sums for a clerk are there; it has read them
    DEVICE u64* summed(int b) const { return listed() + 1 + b; }
    DEVICE u64* taken(int b) const { return summed(CLERKS) + b; }
    // the unit whose sums they are
    DEVICE int* summed_unit(int b) const { return reinterpret_cast<int*>(taken(CLERKS)) + b; }
    // of a stage the unit that it belongs to, or one of
    DEVICE int* unit(int s) const { return summed_unit(CLERKS) + s; }
};

// In place of a unit: there are no more; for a clerk, to watch from then on.
constexpr int SECOND_GEMM = -1, WATCH = -2;

// The stage of the ring that comes next to a warp.
struct Turn {
    int stage = 0, phase = 0;
    DEVICE void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// Of consecutive hits, the least power of two that makes no more than GROUPS.
struct Groups {
    int hits, shift = 0;

    DEVICE explicit Groups(int hits) : hits(hits) {
        while ((hits - 1) >> shift >= GROUPS) ++shift;
    }
    DEVICE int of(int hit) const { return hit >> shift; }
    DEVICE int count() const { return (hits - 1 >> shift) + 1; }
    // How many units a group has.
    DEVICE int units(int group) const { return (min((group + 1) << shift, hits) - (group << shift)) * UNITS; }
};

// Of this block.
DEVICE int output_rows() { return min(ROWS, H - static_cast<int>(blockIdx.x) * ROWS); }

// By a warp that is done with it.
DEVICE void release_stage(const Shared& s, Turn& turn, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(s.empty(turn.stage));
    turn.next();
}
