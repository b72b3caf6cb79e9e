// Both grouped GEMMs of an FP8 or NVFP4 mixture-of-experts layer in one persistent launch, weights first.
//
// An earlier launch has brought the `tokens` into the GEMMs' form and sorted their slots by expert, so that each
// slot has a position: `list` says which experts were hit and where their positions begin and end, `token_of` which
// token each is of. This launch makes `hidden` of them and of that `partial`, the experts' outputs before the routing
// weights; a later launch sums those over a token's slots.
//
// Operands. With few tokens per expert time goes by bytes of weights, so weights are the first operand,
// 64 rows of an MMA, and tokens the narrow side: the narrowest of 8, 16, 24, 32, 48, 64, 96 and 128
// columns that holds the tile's tokens. The accelerator brings gate and up rows in turns of eight, so that a
// thread has the gate (row g of an MMA's 16 rows a warp) and the up (row g + 8) of a hidden column.
//
// Items. One of the first GEMM is PARTS parts of 32 hidden columns, one of the second PARTS parts of 64
// output rows, each for all of K and for a tile of an expert's tokens: up to MOST, the expert's tokens
// split evenly. Items are claimed from a counter in order, a block's first one too: all of the first
// GEMM, then all of the second, or, if INTERLEAVED, those of the second between later ones of the first; tiles that
// share weights follow each other, then blocks of an expert. An item waits only for some that were claimed before it,
// and a running block alone has claimed them, so waiting ends whichever blocks run together.
//
// From one GEMM to the other nothing drains: an item of the second waits only for its own expert's
// hidden columns (`ready` counts the items that have made some), mostly long done, and its weights
// are on their way meanwhile.
//
// Roles. A warp claims items, shortly before they are needed, so that blocks end together; another
// copies, and two fetch tokens for the first GEMM from wherever they are; WARP_GROUPS warp groups
// multiply, the parts of an item dealt out among them. A step is STEP columns of K: its weights, tokens and
// scales are a stage of the ring, completed by one barrier. What the item is comes with its first stage; an
// item without parts is the end.
//
// Formats. FP8 weights meet tokens and hidden columns in e4m3, quantised per 128 and GROUP columns. Every sum of
// SUB products is scaled in fp32: by the weights' scale, which is the same for all rows of a part (of gate and of
// up rows), and by the token's. NVFP4 weights meet bf16: codes times block scales are bf16, exactly, in registers;
// the experts' global scales multiply an item's sums. (`flow_fp8_*.cuh`, `flow_nvfp4_*.cuh`.)
//
// Each item is made by one block in a fixed order, so results repeat bit for bit.
//
// Compile-time constants: FORMAT, WARP_GROUPS (2 to 4) and BLOCKS (parts of each: 1 to 3; NVFP4: 2 or 4 parts in all),
// MOST (tokens of a tile: 8, 16, 32, 64, 96 or 128), as far as registers go: BLOCKS * MOST up to 256, 128 and 64 for 2,
// 3 and 4 warp groups; STAGES, EXPERTS (room in the list), ACTIVATION (its kind), SHARED_BYTES (what the launch asks
// for), INTERLEAVED (FP8 alone), STREAMED (L2 gives weights up first); FP8: N13, K13, N2, K2 (rows and columns of a
// weight scale).
#include "flow_copies.cuh"
#include "flow_epilogues.cuh"
#include "flow_items.cuh"
#if FORMAT == 1
#include "flow_fp8_products.cuh"
#define SCALE_PARAMETER const float*
#define SCALE_POINTER(scales) scales
#else
#include "flow_nvfp4_products.cuh"
#define SCALE_PARAMETER const GRID_CONSTANT TensorMap
#define SCALE_POINTER(scales) &scales
#endif

// All of an item, by a warp group.
template <int N, bool GATED>
DEVICE void multiply_item(const Layer& layer, Shared& shared, const Item& item, Ring& ring, Place place) {
    float sums[BLOCKS][N / 2];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[b][i] = 0.0f;
    }
    add_steps<N, GATED>(sums, layer, shared, item, ring, place);
    compute_here(place.lane);
    scale_sums<N, GATED>(sums, layer, item);
    if (GATED) store_hidden<N>(layer, shared, item, sums, place);
    else store_rows<N>(layer, shared, item, sums, place);
}

// The narrowest MMA that holds the item's tokens.
template <int N, bool GATED>
DEVICE void multiply_narrowly(const Layer& layer, Shared& shared, const Item& item, Ring& ring,
                              const Place& place) {
    constexpr int WIDER = N + (N < 32 ? 8 : N < 64 ? 16 : 32);
    if constexpr (N >= MOST) {
        multiply_item<MOST, GATED>(layer, shared, item, ring, place);
    } else if (item.tokens <= N) {
        multiply_item<N, GATED>(layer, shared, item, ring, place);
    } else {
        multiply_narrowly<WIDER, GATED>(layer, shared, item, ring, place);
    }
}

// A warp of those that multiply, until there are no more items.
DEVICE void consume(const Layer& layer, Shared& shared, const Place& place) {
    Ring ring;
    while (true) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        const Item item = shared.items[ring.stage];
        if (item.parts == 0) break;
        if (item.gated) multiply_narrowly<8, true>(layer, shared, item, ring, place);
        else multiply_narrowly<8, false>(layer, shared, item, ring, place);
    }
}

// FP8. w13: `[E, I / 8, (gate, up), 8, H]` e4m3 in boxes of 1, 4, 2, 8 and 128; w2: `[E * H, I]` in boxes of 64
// and 128; hidden32, hidden8: `[positions, I]` e4m3 in boxes of 32, of 8 and 128. All with the 128-byte swizzle.
// tokens: `[num_tokens, H]` e4m3; token_scale: `[H / 128, num_tokens]`; hidden_scale: `[I / GROUP, positions]`.
// w13_scale: `[E, (gate, up), scale_rows13, scale_columns13]`; w2_scale: `[E, scale_rows2, scale_columns2]`.
// H is a multiple of 64, I of 16.
//
// NVFP4, in bytes of two codes, as in `codes.py`. w13: `[E, I / 64, (gate, up), 64, H / 2]` in boxes of 1, 4, 2, 8 and
// 128; w2: `[E * H, I / 2]` in boxes of 64 and 128; hidden8: `[I / 64, positions, 128]`, of 64 bf16, in boxes of 4, 8 and 128.
// tokens and hidden: bf16, `[num_tokens, H]` and `[positions, I]`, columns in the decoder's order.
// w13_scale, w2_scale: block scales as in `nvfp4_scales.cuh`; w13_global: `[E, (gate, up)]`; w2_global: `[E]`. H is a
// multiple of 256, and so is I; what there is in w13 and w2 may end before, after a multiple of 64. Hidden columns of
// padding are zeros.
//
// token_of: `[positions]`; positions a multiple of 4, and so every expert's first.
// list: how many experts, and of each three numbers: expert, first position, end position.
// counters: `[1 + experts hit]`, zero before.
// partial: `[positions, H]` bf16.
KERNEL void __launch_bounds__(THREADS, 1) flow(
    const GRID_CONSTANT TensorMap w13, const GRID_CONSTANT TensorMap w2,
    const GRID_CONSTANT TensorMap hidden32, const GRID_CONSTANT TensorMap hidden8,
    SCALE_PARAMETER w13_scale, SCALE_PARAMETER w2_scale, const float* w13_global, const float* w2_global, const u8* tokens,
    const float* token_scale, const int* list, const int* token_of, int* counters, u8* hidden,
    float* hidden_scale, u16* partial, float limit, float alpha, float beta, int H, int I, int num_tokens,
    int positions, int scale_rows13, int scale_columns13, int scale_rows2, int scale_columns2) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Layer layer = {&w13, &w2, &hidden32, &hidden8,
                         SCALE_POINTER(w13_scale), SCALE_POINTER(w2_scale), w13_global, w2_global,
                         tokens, token_scale, list, token_of, counters, counters + 1, hidden, hidden_scale, partial,
                         limit, alpha, beta, H, I, num_tokens, positions, scale_rows13, scale_columns13,
                         scale_rows2, scale_columns2};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&shared.full[s], 1 + 32 + 32 * GATHERERS);
            barrier_init(&shared.empty[s], CONSUMER_WARPS);
        }
        for (int q = 0; q < QUEUE; q++) {
            barrier_init(&shared.queued[q], 1);
            barrier_init(&shared.taken[q], 1 + GATHERERS);
        }
        barriers_ready();
        prefetch_map(&w13);
        prefetch_map(&w2);
        prefetch_map(&hidden32);
        prefetch_map(&hidden8);
    }
    wait_for_launches();
    let_next_start();  // only now: what follows reads what earlier launches wrote before it waits
    // The same for all lanes, which the compiler is to know.
    const int warp = __shfl_sync(ALL, static_cast<int>(threadIdx.x) / 32, 0);
    const bool claims = threadIdx.x == 32 * (CONSUMER_WARPS + 1);
    const int claimed = claims ? take_ticket(layer.ticket) : 0;  // is there when the list is
    const int count = read_list<THREADS>(list, shared.hits, shared.warp_totals,
                                         [](int tokens) { return ceil_div(tokens, MOST); });
    if (warp >= CONSUMER_WARPS) {
        leave_registers<COPY_REGISTERS>();
        if (warp == CONSUMER_WARPS) copy(layer, shared);
        if (warp == CONSUMER_WARPS + 1) claim(layer, shared, count, claimed);
        if (warp > CONSUMER_WARPS + 1) gather(layer, shared, warp - CONSUMER_WARPS - 2);
    } else {
        take_registers<REGISTERS>();
        consume(layer, shared, {warp / 4, warp % 4, static_cast<int>(threadIdx.x) % 32});
    }
}
