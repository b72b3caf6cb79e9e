// What several kernels do with the lanes of a warp.
#pragma once

#include "common.cuh"

constexpr unsigned ALL = 0xFFFFFFFFu;  // lanes

// Sum of `value` over this lane and those before it.
DEVICE int sum_up_to(int value, int lane) {
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(ALL, value, by);
        if (lane >= by) value += other;
    }
    return value;
}
