// One grouped GEMM of an NVFP4 mixture-of-experts layer for many tokens per expert, weights first.
//
// Slots are sorted by expert and their activations lie in that order, in bf16 with columns in the decoder's order, so
// that the accelerator brings tokens as well as weights. `list` says which experts were hit and where their positions
// begin and end. The first GEMM (GATED) makes hidden columns; the second the experts' outputs before the routing
// weights, and if LONE, of tokens with one slot here, the sums themselves.
//
// Pairs. Tokens are four times as long as weights here: for a step of 256 columns 128 tokens are 64 KB, 256 rows of
// weights 36 KB with their scales, more than L2 has for a multiprocessor in the time of the MMAs. So two blocks on
// neighbouring multiprocessors, a cluster, work side by side on blocks of weight rows of an expert, with the same
// tokens, of which each brings a half to both.
//
// An item is, for one block, up to 128 tokens with four parts of 64 weight rows, for all of K: an expert's tokens are
// split evenly, in eights. Of the first GEMM a part is 32 hidden columns. Items are dealt out in turn.
//
// Roles. A warp copies weights, another tokens; two warp groups multiply, with two parts each. Weights come in steps of
// 256 columns, tokens in halves of a step, each in a ring of its own. Codes times block scales are bf16, exactly, in
// registers, where they are the first operands of the MMAs; the experts' global scales multiply an item's sums.
//
// Each item is made by one block in a fixed order, so results repeat bit for bit.
//
// Compile-time constants: GATED, CODES and STAGES (steps of weights, halves of steps of tokens, that shared memory
// holds), EXPERTS (room in the list), ACTIVATION (its kind), LONE (outputs have targets: `targets.cuh`), STREAMED (L2
// gives weights up first), SHARED_BYTES (what the launch asks for). In clusters of two blocks.
#include "pairs_nvfp4_copies.cuh"
#include "pairs_nvfp4_epilogues.cuh"
#include "pairs_nvfp4_products.cuh"
#include "pairs_begin.cuh"

template <int N>
DEVICE void multiply_item(const Layer& layer, Shared& shared, const Item& item, CodeRing& codes, Ring& ring,
                          const Place& place) {
    float sums[BLOCKS][N / 2];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[b][i] = 0.0f;
    }
    const Scales scales(layer, item);  // on their way meanwhile, as are the targets
    const ItemTargets targets(layer.targets, item.start, item.tokens, place);
    add_steps<N>(sums, layer, shared, codes, ring, place);
    scales.apply(sums);
#if GATED
    store_hidden<N>(layer, shared, item, sums, place);
#else
    store_rows<N>(layer, shared, item, sums, targets, place);
#endif
}

// The narrowest MMA that holds the item's tokens.
template <int N>
DEVICE void multiply_narrowly(const Layer& layer, Shared& shared, const Item& item, CodeRing& codes, Ring& ring,
                              const Place& place) {
    if constexpr (N >= TILE) {
        multiply_item<TILE>(layer, shared, item, codes, ring, place);
    } else if (item.tokens <= N) {
        multiply_item<N>(layer, shared, item, codes, ring, place);
    } else {
        multiply_narrowly<N + (N < 64 ? 16 : 8)>(layer, shared, item, codes, ring, place);
    }
}

// A warp of those that multiply, until there are no more items.
DEVICE void consume(const Layer& layer, Shared& shared, const Place& place) {
    CodeRing codes;
    Ring ring;
    while (true) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        const Item item = shared.items[ring.stage];
        if (item.kind == END) break;
        if (item.kind == IDLE) {
            for (int half = 0; half < 2 * layer.steps(); half++, ring.advance()) {
                barrier_wait(&shared.full[ring.stage], ring.phase);
                release(&shared.empty[ring.stage], place.lane);
            }
        } else {
            multiply_narrowly<16>(layer, shared, item, codes, ring, place);
        }
    }
    __syncwarp();  // together to the end, where blocks meet
}

// tokens: `[positions, K]` bf16 in boxes of 16 and 128 bytes; weights, in bytes of two codes: w13,
// `[E, I / 64, (gate, up), 64, H / 2]`, in boxes of 1, 4, 2, 8 and 128, or w2, `[E * H, I / 2]`, in boxes of 64 and
// 128; all with the 128-byte swizzle.
// scales: block scales as in `nvfp4_scales.cuh`; weight_global: `[E, (gate, up)]` or `[E]`.
// list: how many experts, and of each three numbers: expert, first position, end position.
// out: `[positions, N]` bf16: hidden columns in the decoder's order, or outputs. N and K are multiples of 256; what there
// is of hidden columns in w13 and w2 may end before, after a multiple of 64.
// If LONE the second GEMM reads targets, `[positions]`, and of those that have a row writes it in sums, `[tokens, N]` bf16,
// not in out.
KERNEL void __launch_bounds__(THREADS, 1) pairs_nvfp4(
    const GRID_CONSTANT TensorMap tokens, const GRID_CONSTANT TensorMap weights, const GRID_CONSTANT TensorMap scales,
    const float* weight_global, const int* list, u16* out, float limit, float alpha, float beta, int N, int K,
    const Target* targets, u16* sums) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Layer layer = {&tokens, &weights, &scales, weight_global, list, out,
                         limit, alpha, beta, N, K, targets, sums};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.empty[s], 2 * CONSUMER_WARPS);
        }
        for (int s = 0; s < CODES; s++) {
            barrier_init(&shared.codes_full[s], 1);
            barrier_init(&shared.codes_empty[s], CONSUMER_WARPS);
        }
        barriers_ready();
        prefetch_map(&tokens);
        prefetch_map(&weights);
        prefetch_map(&scales);
    }
    const int count = begin(shared, list, layer.blocks());
    // The same for all lanes, which the compiler is to know.
    const int warp = __shfl_sync(ALL, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp >= CONSUMER_WARPS) {
        leave_registers<COPY_REGISTERS>();
        if (warp == CONSUMER_WARPS) copy_tokens(layer, shared, count);
        if (warp == CONSUMER_WARPS + 1) copy_codes(layer, shared, count);
    } else {
        take_registers<REGISTERS>();
        consume(layer, shared, {warp / 4, warp % 4, static_cast<int>(threadIdx.x) % 32});
    }
    cluster_sync();  // the other block reaches into this one's shared memory until it has ended as well
}
