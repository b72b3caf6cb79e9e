// once.cu: the warps that keep the ring filled.
#pragma once

#include "once_routing.cuh"

// One of the block's warps that copy. The first leads: it routes, claims, and says what a stage is for.
struct Producer {
    int part, lane;

    DEVICE bool leads() const { return part == 0; }
};

// Waits for a stage to be free and promises so many bytes of copies to it.
DEVICE void begin_stage(const Shared& s, const Turn& turn, int unit, int bytes, const Producer& me) {
    if (!me.leads()) {
        barrier_wait(s.assigned(turn.stage), turn.phase);
        return;
    }
    barrier_wait(s.empty(turn.stage), turn.phase ^ 1);
    if (me.lane == 0) {
        *s.unit(turn.stage) = unit;
        barrier_expect(s.full(turn.stage), bytes);
        barrier_arrive(s.assigned(turn.stage));
    }
    __syncwarp();
}

// Everyone arrives, so that no stage comes round while a warp still has to look at it.
DEVICE void end_stage(const Shared& s, Turn& turn, const Producer& me) {
    if (!me.leads()) {
        __syncwarp();
        if (me.lane == 0) barrier_arrive(s.full(turn.stage));
    } else if (FORMAT == FP8) {
        arrive_with_copies(s.full(turn.stage));
    }
    turn.next();
}

DEVICE void bring_unit(const Shared& s, const Problem& p, Turn& turn, int unit, const Producer& me) {
    int expert = s.hit_experts()[unit / UNITS], column = unit % UNITS * 8;
    int lane = me.lane, row = lane % 16, weight_row = (row < 8 ? 0 : I - 8) + column + row;
    long long at = static_cast<long long>(expert) * (2 * I) + weight_row;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        int bytes = min(CHUNK_BYTES, ROW1 - chunk * CHUNK_BYTES);
        begin_stage(s, turn, unit, 16 * bytes + (FORMAT == NVFP4 ? 2 * bytes : 0), me);
        u64* full = s.full(turn.stage);
        u8* scales = s.stage_scales(turn.stage);
        if (lane < 16 && row % COPYING == me.part) {
            copy_bulk<true>(s.stage(turn.stage) + row * STRIDE1, p.w13 + at * ROW1 + chunk * CHUNK_BYTES, bytes, full);
        }
        if (FORMAT == NVFP4 && lane == 16 && me.leads()) {
            long long before = (static_cast<long long>(expert) * UNITS + unit % UNITS) * ROW1 + chunk * CHUNK_BYTES;
            copy_bulk<true>(scales, p.w13_scale + 2 * before, 2 * bytes, full);
        }
        if (FORMAT == FP8 && me.leads()) {
            const float* gate =
                reinterpret_cast<const float*>(p.w13_scale) +
                (static_cast<long long>(expert) * 2 * SCALE_ROWS13 + column / N13) * SCALE_COLUMNS13;
            for (int n = lane; n < 2 * CHUNK_GRANULES; n += 32) {
                int up = n / CHUNK_GRANULES, granule = chunk * CHUNK_GRANULES + n % CHUNK_GRANULES;
                const float* scale = gate + up * SCALE_ROWS13 * SCALE_COLUMNS13 + granule * 128 / K13;
                if (granule < GRANULES1) copy_float(reinterpret_cast<float*>(scales) + n, scale);
            }
        }
        end_stage(s, turn, me);
    }
}

// This block's rows of w2 for `pieces` hits from `hit` on, or of one hit the granules from `granule` on.
DEVICE void bring_rows(const Shared& s, const Problem& p, Turn& turn, int hit, int pieces, int granule,
                       const Producer& me) {
    int rows = output_rows(), first = blockIdx.x * ROWS;
    int from = granule * GRANULE_BYTES, bytes = min(SLICE_BYTES, ROW2 - from);
    begin_stage(s, turn, SECOND_GEMM, pieces * rows * (bytes + (FORMAT == NVFP4 ? bytes / 8 : 0)), me);
    u64* full = s.full(turn.stage);
    for (int n = me.lane * COPYING + me.part; n < pieces * (WHOLE ? 1 : ROWS); n += 32 * COPYING) {
        int piece = WHOLE ? n : n / ROWS, row = WHOLE ? 0 : n % ROWS, copied = WHOLE ? rows * bytes : bytes;
        if (row >= rows) continue;
        long long at = (static_cast<long long>(s.hit_experts()[hit + piece]) * H + first + row) * ROW2 + from;
        copy_bulk<true>(s.stage(turn.stage) + piece * PIECE + row * STRIDE2, p.w2 + at, copied, full);
        // Of 16 rows, or, if whole rows are copied, of all of the block's: those of 16 follow each other then.
        if (FORMAT == NVFP4 && (SLICES == 1 ? row == 0 : row % 16 == 0)) {
            long long before = (static_cast<long long>(s.hit_experts()[hit + piece]) * H + first + row) / 16 * ROW2 + from;
            copy_bulk<true>(s.stage_scales(turn.stage) + piece * PIECE_SCALES + row / 16 * SLICE_SCALES,
                            p.w2_scale + 2 * before, 2 * bytes * (SLICES == 1 ? rows / 16 : 1), full);
        }
    }
    if (FORMAT == FP8 && me.leads()) {
        float* scales = reinterpret_cast<float*>(s.stage_scales(turn.stage));
        for (int n = me.lane; n < pieces * ROW_GROUPS * SUBS; n += 32) {
            int piece = n / (ROW_GROUPS * SUBS), row = first + n / SUBS % ROW_GROUPS * 16;
            int column = granule * GRANULE + n % SUBS * SUB;
            if (row >= H || column >= I) continue;
            long long at = static_cast<long long>(s.hit_experts()[hit + piece]) * SCALE_ROWS2 + row / N2;
            copy_float(scales + n,
                       reinterpret_cast<const float*>(p.w2_scale) + at * SCALE_COLUMNS2 + column / K2);
        }
    }
    end_stage(s, turn, me);
}

// The last block to come here leaves the counters as the next launch wants them.
DEVICE void leave_counters(const Shared& s, const Problem& p, int hits, int lane) {
    wait_for_shared(s.finished(), Groups(hits).count());
    int before = lane == 0 ? add_release(p.exited, 1) : 0;
    if (__shfl_sync(0xFFFFFFFF, before, 0) != static_cast<int>(gridDim.x) - 1) return;
    __syncwarp();  // what lane 0 has seen comes before what other lanes write
    p.done[lane] = 0;
    if (lane != 0) return;
    *p.ticket = 0;
    *p.exited = 0;
}

DEVICE void bring_all_rows(const Shared& s, const Problem& p, Turn& turn, int hits, const Producer& me) {
    if (hits == 0 || output_rows() <= 0) {  // the consumers still wait for a stage
        begin_stage(s, turn, SECOND_GEMM, 0, me);
        end_stage(s, turn, me);
        return;
    }
    for (int hit = 0; hit < hits; hit += PIECES)
#pragma unroll 1
        for (int slice = 0; slice < SLICES; ++slice)
            bring_rows(s, p, turn, hit, min(PIECES, hits - hit), slice * SLICE_GRANULES, me);
}

DEVICE void lead(const Shared& s, const Problem& p, const Producer& me) {
    int claimed = me.lane == 0 ? take_ticket(p.ticket) : 0;  // is there when routing is done
    int hits = route(s, p, me.lane), units = hits * UNITS;
    Turn turn;
    while (true) {
        int unit = __shfl_sync(0xFFFFFFFF, claimed, 0);
        if (unit >= units) break;
        if (me.lane == 0) claimed = take_ticket(p.ticket);
        bring_unit(s, p, turn, unit, me);
    }
    bring_all_rows(s, p, turn, hits, me);
    leave_counters(s, p, hits, me.lane);
}

DEVICE void help(const Shared& s, const Problem& p, const Producer& me) {
    Turn turn;
    while (true) {
        barrier_wait(s.assigned(turn.stage), turn.phase);
        int unit = *s.unit(turn.stage);
        if (unit == SECOND_GEMM) break;
        bring_unit(s, p, turn, unit, me);
    }
    bring_all_rows(s, p, turn, *s.hits(), me);
}
