// Block scales of NVFP4 weights to shared memory, for flow.cu and pairs_nvfp4.cu: those of a step's rows.
//
// They lie as `codes.py` has them: of 16 rows and a step of 256 columns 256 bytes, one after another for a part's four
// warps, and for an item's parts.
//
// Compile-time constant: STREAMED.
#pragma once

#include "common.cuh"

constexpr int PART_SCALES = 64 * 16;  // bytes of a part's in a step

// Where the nth 32 hidden columns begin: of each 256 columns eight of each 64. They lie side by side in the order of
// hidden columns (`device._nvfp4_position`).
DEVICE int first_column(int nth) { return nth / 8 * 256 + nth % 8 * 8; }

// Of the gate and up rows of PARTS parts from the nth on, which are of one 256 hidden columns. By one thread, as below.
//
// scales: `[E, steps, 8, I / 64, 256]` in boxes of 1, 1, PARTS, 4 and 256; beyond I zeros.
DEVICE void copy_gate_up_scales(u8* to, const TensorMap* scales, int expert, int nth, int step, u64* full) {
    copy_box<STREAMED>(to, scales, 0, nth / 8 * 4, nth % 8, step, expert, full);
}

// Of PARTS times 64 output rows from `row` on, of all experts' rows.
//
// scales: `[steps, E * H / 16, 256]` in boxes of 1, 4 * PARTS and 256.
DEVICE void copy_down_scales(u8* to, const TensorMap* scales, int row, int step, u64* full) {
    copy_box<STREAMED>(to, scales, 0, row / 16, step, full);
}
