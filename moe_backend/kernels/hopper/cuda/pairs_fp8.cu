// One grouped GEMM of an FP8 mixture-of-experts layer for many tokens per expert, tokens first.
//
// Slots are sorted by expert and their activations lie in that order, so that the accelerator brings tokens as well
// as weights. `list` says which experts were hit and where their positions begin and end. The first GEMM (GATED)
// makes hidden columns, quantised per ROWS of them; the second the experts' outputs before the routing weights, and if
// LONE, of tokens with one slot here, the sums themselves.
//
// Pairs. With full tiles the time goes by what L2 gives: a step of 128 tokens and 256 weight rows is 48 KB for 1,024
// cycles of MMAs, twice what L2 has for each multiprocessor. So two blocks on neighbouring multiprocessors, a
// cluster, work side by side and bring what both need once, each a half of it to both: two tiles of an expert's
// tokens share the weights; the tile that is left, or the only one, is shared by two blocks of weight rows.
//
// An item is, for one block, up to 128 tokens with 256 weight rows in two chunks of 128: of the first GEMM 64 gate
// and 64 up rows each, so that a thread has both of a hidden column. Items are dealt out in turn.
//
// Roles. A warp copies; two warp groups multiply, 64 tokens each with both chunks. With up to 64 tokens each has all
// of them and one chunk. A step is STEP columns of K; its weights, tokens and scales are a stage of the ring,
// completed by one barrier, and free when both blocks have read theirs. While one warp group scales its products the
// tensor cores work for the other.
//
// Each item is made by one block in a fixed order, so results repeat bit for bit.
//
// Compile-time constants: GATED, STAGES, EXPERTS (room in the list), ACTIVATION (its kind), SCALE_N, SCALE_K (rows and
// columns of a weight scale), LONE (outputs have targets: `targets.cuh`), STREAMED (L2 gives weights up first),
// SHARED_BYTES (what the launch asks for). In clusters of two blocks.
#include "pairs_fp8_copies.cuh"
#include "pairs_fp8_products.cuh"
#include "pairs_fp8_epilogues.cuh"
#include "pairs_begin.cuh"

template <bool FEW>
DEVICE void multiply_item(const Layer& layer, Shared& shared, const Item& item, Ring& ring, const Place& place) {
    Sums sums[FEW ? 1 : CHUNKS];
#pragma unroll
    for (auto& chunk : sums) {
#pragma unroll
        for (float& sum : chunk) sum = 0.0f;
    }
#if GATED
    add_steps<FEW>(sums, layer, shared, item.chunks, ring, place);
    store_hidden<FEW>(layer, shared, item, sums, place);
#else
    const Rows<FEW> rows(layer, item, place);  // on their way meanwhile
    add_steps<FEW>(sums, layer, shared, item.chunks, ring, place);
    rows.store(layer, item, sums, place);
#endif
}

// A warp of those that multiply, until there are no more items.
DEVICE void consume(const Layer& layer, Shared& shared, const Place& place) {
    Ring ring;
    while (true) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        const Item item = shared.items[ring.stage];
        if (item.kind == END) break;
        if (item.kind == IDLE) {
            for (int k0 = 0; k0 < layer.depth; k0 += STEP, ring.advance()) {
                barrier_wait(&shared.full[ring.stage], ring.phase);
                release(shared, ring.stage, place);
            }
        } else if (item.tokens <= HALF) {
            multiply_item<true>(layer, shared, item, ring, place);
        } else {
            multiply_item<false>(layer, shared, item, ring, place);
        }
    }
    __syncwarp();  // together to the end, where blocks meet
}

// tokens: `[positions, K]` e4m3 in boxes of 64 and 128; weights: `[experts * (gate, up), N, K]`, or without the pair,
// in boxes of 1, 64 and 128; all with the 128-byte swizzle.
// token_scale: `[K / 128, positions]`; weight_scale: `[E, (gate, up), scale_rows, scale_columns]`, or without the pair.
// list: how many experts, and of each three numbers: expert, first position (a multiple of 4), end position.
// out: hidden columns, `[positions, N]` e4m3 with out_scale `[N / ROWS, positions]`; or outputs, `[positions, N]` bf16.
// If LONE the second GEMM reads targets, `[positions]`, and of those that have a row writes it in sums, `[tokens, N]` bf16,
// not in out.
// K is a multiple of 16, N of 8. Positions are a multiple of 4, and token_scale ends 512 bytes after its last.
KERNEL void __launch_bounds__(THREADS, 1) pairs_fp8(
    const GRID_CONSTANT TensorMap tokens, const GRID_CONSTANT TensorMap weights, const float* token_scale,
    const float* weight_scale, const int* list, void* out, float* out_scale, float limit, float alpha, float beta,
    int N, int K, int positions, int scale_rows, int scale_columns, const Target* targets, u16* sums) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Layer layer = {&tokens, &weights, token_scale, weight_scale, list, out, out_scale,
                         limit, alpha, beta, N, K, positions, scale_rows, scale_columns, targets, sums};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&shared.full[s], 1 + 32);
            barrier_init(&shared.empty[s], 2 * CONSUMER_WARPS);
        }
        barriers_ready();
        prefetch_map(&tokens);
        prefetch_map(&weights);
    }
    const int count = begin(shared, list, layer.blocks());
    // The same for all lanes, which the compiler is to know.
    const int warp = __shfl_sync(ALL, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp >= CONSUMER_WARPS) {
        leave_registers<COPY_REGISTERS>();
        if (warp == CONSUMER_WARPS) copy(layer, shared, count);
    } else {
        take_registers<REGISTERS>();
        consume(layer, shared, {warp / 4, warp % 4, static_cast<int>(threadIdx.x) % 32});
    }
    cluster_sync();  // the other block reaches into this one's shared memory until it has ended as well
}
