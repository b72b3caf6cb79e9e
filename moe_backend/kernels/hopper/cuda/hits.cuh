// What kernels that work through experts in order have in common: which experts were hit, and the ring of stages.
//
// Compile-time constants: STAGES.
#pragma once

#include "warps.cuh"

DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int most(int a, int b) { return a > b ? a : b; }
DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// An expert that was hit, its positions, and how many pieces of work come before its own.
struct alignas(16) Hit {
    int expert, start, end;
    int before;
};

// All THREADS threads: the list of experts to shared memory, in the order that it has, and after the last how many
// pieces there are. `list`: how many experts, and of each three numbers, expert, first position and end position;
// `pieces`: of an expert with so many positions; `totals`: room for a number of each warp. Returns how many experts.
template <int THREADS, class Pieces>
DEVICE int read_list(const int* list, Hit* hits, int* totals, Pieces pieces) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = list[0];
    int before = 0;
    for (int first = 0; first < count; first += THREADS) {
        const int i = first + static_cast<int>(threadIdx.x);
        Hit hit = {0, 0, 0, 0};
        if (i < count) {
            const int* entry = list + 1 + 3 * i;
            hit = {entry[0], entry[1], entry[2], 0};
        }
        const int own = pieces(hit.end - hit.start);
        const int up_to = sum_up_to(own, lane);
        if (lane == 31) totals[warp] = up_to;
        __syncthreads();
        hit.before = before + up_to - own;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) hit.before += totals[w];
            before += totals[w];
        }
        if (i < count) hits[i] = hit;
        __syncthreads();
    }
    if (threadIdx.x == 0) hits[count] = {0, 0, 0, before};
    __syncthreads();
    return count;
}

// The expert whose piece of work is the nth of all.
DEVICE int find_hit(const Hit* hits, int count, int n) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (hits[middle].before <= n) low = middle;
        else high = middle;
    }
    return low;
}

// A place in a ring, and the parity of its turn.
template <int LENGTH> struct RingOf {
    int stage = 0;
    int phase = 0;

    DEVICE void advance() {
        if (++stage == LENGTH) {
            stage = 0;
            phase ^= 1;
        }
    }
};
typedef RingOf<STAGES> Ring;
