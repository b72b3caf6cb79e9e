// A whole mixture-of-experts layer in one launch, for few tokens.
//
// With few tokens a layer is as fast as its weights can be read, plus all that happens while none are
// on their way. So one block per multiprocessor reads weights from its first microsecond to its last:
// producer warps keep a ring of stages in shared memory filled with bulk copies, first with rows of
// w13, then at once with rows of w2, which need nothing of the first GEMM; consumer warps multiply.
// A warp takes tens of cycles for each copy that it starts, so some warps share the rows of a stage.
//
// Routing: one producer of every block reads all ids, makes the ascending list of the experts that any
// token is routed to ("hits") and begins to copy. Meanwhile the consumers bring the tokens to shared
// memory, and then note the routing weight of every (hit, token). Every token is a column of every
// product, routed to the expert or not: eight tokens are the narrowest MMA, and gathering would cost
// more than the MMAs. Columns do not mix, so whatever a token holds stays in its own results, and those
// of pairs that are not routed are not stored.
//
// First GEMM: a unit is eight hidden columns of one hit: 16 weight rows, eight of gate and their eight
// of up, so a thread has gate and up of the same hidden column. Blocks claim units in order from a
// counter in global memory, the first one too, one ahead of need: only a running block holds units and
// it waits for nobody before they are done, so the launch cannot hang however few blocks run at a time. The warps
// split a unit's K by granules and leave their sums in shared memory. Two clerks, further warps, take turns
// at adding, activating and storing them: until all blocks can see a unit's hidden columns takes about as
// long as reading its weights, and consumers do not wait for that. Hidden columns go to global memory in
// bf16, already times the routing weight (and NVFP4's global scale of w2), which leaves a plain sum to the
// rest.
//
// Second GEMM: every block owns ROW_GROUPS x 16 rows of the output and sums over all hits, so nothing
// is added across blocks. Its warps split (hit, granule of K) items and load the hidden columns of each
// one item ahead of need, as soon as its hit has them all: there is a counter for each hit, or for a few
// neighbours, which a clerk watches once its block has no more units. Sums over the warps come last. All
// sums are in an order that is fixed: which block computed a unit does not show, and results repeat bit for
// bit.
//
// Operands: activations are bf16 and stay so, and codes of weights become bf16 in registers, exactly:
// of FP8 alone, whose scales are for fp32 sums of 128 columns; of NVFP4 times their block's scale. Lane
// 4g+t takes 16 bytes of weight row g and of row g+8 at the same place, 4 lanes side by side. An MMA
// wants of it columns 2t, 2t+1, 2t+8 and 2t+9, and gets four of those that it has, in the order in which
// they are decoded: a permutation of K, in which tokens and hidden columns are stored (once_tokens.cuh),
// so that a lane reads eight that it wants, 16 bytes, at a time, again 4 lanes side by side.
// Where an FP8 scale covers only 32 or 64 columns of w2 ("narrow"), lanes take 8 bytes of weights, so
// that two MMAs stay within one scale.
//
// Rows in shared memory are padded against bank conflicts, except where a whole piece of w2 is so
// small that one copy brings it.
//
// Macros: FORMAT 0 bf16, 1 fp8, 2 nvfp4; SIZE_H, SIZE_I; EXPERTS (local), NUM_IDS (global), TOP_K;
// TOKEN_BLOCKS: of eight tokens; ROW_GROUPS: 16 ROW_GROUPS gridDim.x >= SIZE_H; ACTIVATION, HAS_MAP,
// IDS64, WEIGHT_ON_INPUT; N13, K13, N2, K2 (fp8): rows and columns that a weight scale covers;
// CONSUMERS: warps that multiply; COPYING: producers; CHUNK: bytes of a weight row in a stage;
// SHARED_BYTES: the launch's dynamic shared memory.
// Threads: 32 (CONSUMERS + CLERKS + COPYING), in this order.
#include "once_copies.cuh"
#include "once_first_gemm.cuh"
#include "once_routing.cuh"
#include "once_second_gemm.cuh"
#include "once_tokens.cuh"

// A warp that multiplies.
DEVICE void consume(const Shared& s, const Problem& p, int warp, int lane) {
    bring_tokens(s, p, warp, lane);
    barrier_wait(s.listed(), 0);
    note_weights(s, p);
    if (FORMAT == NVFP4) note_factors(s, p);
    named_sync(1, CONSUMERS * 32);
    Turn turn;
    int count = 0;
    for (;; ++count) {
        barrier_wait(s.full(turn.stage), turn.phase);
        int unit = *s.unit(turn.stage);
        if (unit == SECOND_GEMM) break;
        first_gemm(s, p, turn, unit, count, warp, lane);
    }
    dismiss_clerks(s, count, warp, lane);
    if (output_rows() <= 0) return;
    Sums sums[ROW_GROUPS];
#pragma unroll
    for (int r = 0; r < ROW_GROUPS; ++r) clear(sums[r]);
    second_gemm(sums, s, p, turn, *s.hits(), warp, lane);
    store_output(sums, s, p, warp, lane);
}

// x, out: bf16 [tokens, H]. ids: [tokens, TOP_K]. topk_weights: fp32, likewise. expert_map: int32
// [NUM_IDS]. w13_scale, w2_scale: fp32 (fp8) or e4m3 (nvfp4, whose weights lie as in `codes.py`). w13_global:
// [EXPERTS, 2], w2_global: [EXPERTS]. hidden: bf16 [HITS * TOKENS, I] for the launch's own use. counters: 96 ints, zero before
// and after: tickets, those of the groups of hits, exits, each from a line of 128 bytes on.
KERNEL void __launch_bounds__(THREADS, 1)
    moe_once(const u8* x, const void* ids, const int* expert_map, const float* topk_weights, const u8* w13,
             const u8* w13_scale, const float* w13_global, const u8* w2, const u8* w2_scale,
             const float* w2_global, u16* hidden, u16* out, int* counters, int tokens, float limit,
             float alpha, float beta) {
    SHARED_MEMORY(memory);
    Shared s{memory};
    Problem p{x,        ids,       expert_map, topk_weights, w13,      w13_scale,     w13_global,    w2,
              w2_scale, w2_global, hidden,     out,          counters, counters + 32, counters + 64, tokens,
              limit,    alpha,     beta};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(s.full(i), COPYING + (FORMAT == FP8 ? 32 : 0));
            barrier_init(s.assigned(i), 1);
            barrier_init(s.empty(i), CONSUMERS);
        }
        barrier_init(s.listed(), 1);
        for (int i = 0; i < CLERKS; ++i) {
            barrier_init(s.summed(i), CONSUMERS);
            barrier_init(s.taken(i), 1);
        }
        barriers_ready();
    }
    prefetch_tables(p);
    clear_tables(s);
    __syncthreads();
    wait_for_launches();
    let_next_start();
    int other = warp - CONSUMERS;
    if (warp < CONSUMERS)
        consume(s, p, warp, lane);
    else if (other < CLERKS)
        keep_books(s, p, other, lane);
    else if (other == CLERKS)
        lead(s, p, {0, lane});
    else
        help(s, p, {other - CLERKS, lane});
}
