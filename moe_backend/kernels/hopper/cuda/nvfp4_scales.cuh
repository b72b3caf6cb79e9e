// Block scales of NVFP4 weights to shared memory, for flow.cu and pairs_nvfp4.cu: of a row those of a step, 16.
//
// Compile-time constants: PADDED (there may be fewer hidden columns than a multiple of 256).
#pragma once

#include "common.cuh"

// Where the nth 32 hidden columns begin: of each 256 columns eight of each 64. They lie side by side in the order of
// hidden columns (`device._nvfp4_position`).
DEVICE int first_column(int nth) { return nth / 8 * 256 + nth % 8 * 8; }

// Of a gate or an up row: row r of the 64 that make 32 hidden columns, `first` the first of these; of a warp's 16
// rows eight are gate's, eight up's. Zeros for rows of padding.
//
// scales: `[E, (gate, up), rows, columns]`.
DEVICE void copy_gate_up_scales(u8* to, const u8* scales, int rows, int columns, int expert, int first, int r,
                                int column) {
    const int hidden = first + r / 16 * 64 + r % 8;
    const bool there = !PADDED || hidden < rows;
    const int row = (2 * expert + r / 8 % 2) * rows + (there ? hidden : 0);
    copy_sixteen(to, scales + static_cast<long long>(row) * columns + column, there);
}

// Of an output row; if PADDED there may be fewer in the last step, in fours, and zeros behind them.
//
// scales: `[rows, columns]`.
DEVICE void copy_down_scales(u8* to, const u8* scales, int columns, int row, int column) {
    const u8* from = scales + static_cast<long long>(row) * columns;
    if (PADDED) {
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            const bool there = column + i < columns;
            copy_four(to + i, from + (there ? column + i : 0), there);
        }
    } else {
        copy_sixteen(to, from + column, true);
    }
}
