// flow.cu: the warps that keep the ring filled.
#pragma once

#if FORMAT == 1
#include "flow_fp8_copies.cuh"
#else
#include "flow_nvfp4_copies.cuh"
#endif

// The nth item that was claimed, for a warp.
DEVICE Item take_item(Shared& shared, int n) {
    barrier_wait(&shared.queued[n % QUEUE], n / QUEUE & 1);
    const Item item = shared.queue[n % QUEUE];
    __syncwarp();
    return item;
}

// A warp that brings tokens for the first GEMM. It goes along with the second, so that the ring does not turn without it:
// a barrier tells a turn from the next one, but not from the one after that.
DEVICE void gather(const Layer& layer, Shared& shared, int warp) {
    const int lane = threadIdx.x % 32;
    Ring ring;
    for (int n = 0;; n++) {
        const Item item = take_item(shared, n);
        if (item.parts == 0) return;
        const int steps = layer.steps(item.gated);
        for (int step = 0; step < steps; step++, ring.advance()) {
            if (step == max(steps - 2, 0) && lane == 0) barrier_arrive(&shared.taken[n % QUEUE]);
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            if (item.gated) {
                const int* tokens = shared.tokens[n % (QUEUE + 1)];
                gather_step(layer, shared, item.columns(), tokens, ring.stage, step * STEP, warp, lane);
                arrive_with_copies(&shared.full[ring.stage]);
            } else {
                __syncwarp();  // the ring must not turn twice while a lane waits
                if (lane == 0) barrier_arrive(&shared.full[ring.stage], 32);
            }
        }
    }
}

// A step's weights with their scales; of the step's barrier all but the arrivals of the warps that bring tokens, and what
// `copy_hidden` brings.
template <bool GATED>
DEVICE void copy_weights(const Layer& layer, Shared& shared, const Item& item, int stage, int k0) {
    const int lane = threadIdx.x % 32;
    u64* full = &shared.full[stage];
    if (lane == 0) {
        barrier_expect(full, item.parts * PART_BYTES + SCALE_BYTES + (GATED ? 0 : hidden_bytes(layer, item, k0)));
        u8* to = shared.matrices[stage];
#pragma unroll
        for (int part = 0; part < PARTS; part++, to += PART_BYTES) {
            if (part >= item.parts) break;
            copy_part<GATED>(layer, item, to, part, k0, full);
        }
    }
    copy_weight_scales<GATED>(layer, item, shared.weight_scales[stage], k0, lane, full);
    arrive_with_copies(full);
}

// All steps of an item, the nth of the queue. Hidden columns fall behind the weights, up to the whole ring,
// while they are not ready.
template <bool GATED>
DEVICE void copy_item(const Layer& layer, Shared& shared, const Item& item, int n, Ring& ring) {
    const int lane = threadIdx.x % 32;
    const int depth = layer.depth(GATED), leave_at = max(layer.steps(GATED) - 2, 0) * STEP;
    Ring behind = ring;
    int done = 0;
    bool ready = item.ready;
    if (!GATED && ready) fence_async_global();
    for (int k0 = 0; k0 < depth; k0 += STEP) {
        if (k0 == leave_at && lane == 0) barrier_arrive(&shared.taken[n % QUEUE]);
        barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
        if (k0 == 0 && lane == 0) shared.items[ring.stage] = item;
        copy_weights<GATED>(layer, shared, item, ring.stage, k0);
        ring.advance();
        if constexpr (!GATED) {
            if (!ready) {
                const bool must = k0 + STEP >= depth || k0 + STEP - done == STAGES * STEP;
                ready = hidden_ready(layer, shared, item.hit, must);
                if (ready) fence_async_global();
            }
            for (; ready && done <= k0; done += STEP, behind.advance()) {
                if (lane == 0) copy_hidden(layer, shared, item, behind.stage, done);
            }
        }
    }
}

DEVICE void copy(const Layer& layer, Shared& shared) {
    const int lane = threadIdx.x % 32;
    Ring ring;
    for (int n = 0;; n++) {
        const Item item = take_item(shared, n);
        if (item.parts == 0) break;
        if (item.gated) copy_item<true>(layer, shared, item, n, ring);
        else copy_item<false>(layer, shared, item, n, ring);
    }
    barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
    if (lane == 0) {
        shared.items[ring.stage].parts = 0;
        barrier_arrive(&shared.full[ring.stage], 1 + 32 * GATHERERS);
    }
    arrive_with_copies(&shared.full[ring.stage]);
}
