// One grouped GEMM of a bf16 mixture-of-experts layer for many tokens per expert, weights first.
//
// Slots are sorted by expert and their activations lie in that order, so that the accelerator brings tokens as well
// as weights. `list` says which experts were hit and where their positions begin and end. The first GEMM (GATED) makes
// hidden columns; the second the experts' outputs before the routing weights, and if LONE, of tokens with one slot here,
// the sums themselves.
//
// Tokens are the narrow side of the MMAs, in 16s, about 128 in eights, and an expert's are split evenly
// (`pairs_items.cuh`): as the wide side, 64 of an MMA, 130 would cost as much as 192. An item has up to 192, so that
// experts with some 128 slots each still read their weights once.
//
// Pairs. Two blocks on neighbouring multiprocessors, a cluster, work side by side on blocks of weight rows of an expert,
// with the same tokens, of which each brings a half to both.
//
// An item is, for one block, up to TILE tokens with 256 weight rows in four parts of 64, for all of K. Of the first GEMM a
// part is 32 hidden columns: eights of gate and of up rows in turn, so that a thread has both of a hidden column.
//
// Roles. A warp copies; two warp groups multiply, with two parts each and all tokens. A step is 64 columns of K; its weights
// and tokens are a stage of the ring, completed by one barrier, and free when both blocks' MMAs have read theirs.
//
// Each item is made by one block in a fixed order, so results repeat bit for bit.
//
// Compile-time constants: GATED, STAGES, TILE, EXPERTS (room in the list), ACTIVATION (its kind), LONE (outputs have
// targets: `targets.cuh`), SHARED_BYTES (what the launch asks for). In clusters of two blocks.
#include "pairs_bf16_copies.cuh"
#include "pairs_bf16_epilogues.cuh"
#include "pairs_bf16_products.cuh"
#include "pairs_begin.cuh"

template <int N>
DEVICE void multiply_item(const Layer& layer, Shared& shared, const Item& item, Ring& ring, const Place& place) {
    float sums[BLOCKS][N / 2];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[b][i] = 0.0f;
    }
    const ItemTargets targets(layer.targets, item.start, item.tokens, place);  // on their way meanwhile
    add_steps<N>(sums, layer, shared, ring, place);
    store<N>(layer, shared, item, sums, targets, place);
}

// The narrowest MMA that holds the item's tokens.
template <int N>
DEVICE void multiply_narrowly(const Layer& layer, Shared& shared, const Item& item, Ring& ring, const Place& place) {
    if constexpr (N >= TILE) {
        multiply_item<TILE>(layer, shared, item, ring, place);
    } else if (item.tokens <= N) {
        multiply_item<N>(layer, shared, item, ring, place);
    } else {
        multiply_narrowly<N + (N < 96 || N >= 160 ? 16 : 8)>(layer, shared, item, ring, place);
    }
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
                release(&shared.empty[ring.stage], place.lane);
            }
        } else {
            multiply_narrowly<16>(layer, shared, item, ring, place);
        }
    }
    __syncwarp();  // together to the end, where blocks meet
}

// tokens: `[positions, K]` bf16 in boxes of 16 rows; weights, bf16: w13, `[E, (gate, up), N, K]`, its eights of gate and of
// up rows in turn, in boxes of 1, 16, 2 and 8 rows, or w2, `[E, N, K]`, in boxes of 1 and 256; all 128 bytes wide with
// the 128-byte swizzle.
// list: how many experts, and of each three numbers: expert, first position, end position.
// out: `[positions, N]` bf16: hidden columns, or outputs. N and K are multiples of 8.
// If LONE the second GEMM reads targets, `[positions]`, and of those that have a row writes it in sums, `[tokens, N]` bf16,
// not in out.
KERNEL void __launch_bounds__(THREADS, 1) pairs_bf16(
    const GRID_CONSTANT TensorMap tokens, const GRID_CONSTANT TensorMap weights, const int* list, u16* out, float limit,
    float alpha, float beta, int N, int K, const Target* targets, u16* sums) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Layer layer = {&tokens, &weights, list, out, limit, alpha, beta, N, K, targets, sums};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&shared.full[s], 1);
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
