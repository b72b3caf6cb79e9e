// Tokens to the positions of all their slots (`sort.cu`), quantised, their columns reordered, or as they are (`tokens.cuh`), so that the
// accelerator can bring them.
//
// A warp has a part of a token; blocks are many and short, since how many positions a token has differs.
//
// Compile-time constants: those of tokens.cuh; TOP_K.
#include "tokens.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int LISTS = (TOP_K + 31) / 32;  // a lane's slots of a token

// A token's positions, for a warp.
struct Positions {
    static constexpr bool MANY = true;
    int own[LISTS];
    u32 local[LISTS];  // lanes that have one

    // Whether there are any.
    DEVICE bool load(const int* position, int lane) {
        bool any = false;
#pragma unroll
        for (int n = 0; n < LISTS; n++) {
            own[n] = 32 * n + lane < TOP_K ? position[32 * n + lane] : -1;
            local[n] = __ballot_sync(ALL, own[n] >= 0);
            any = any || local[n] != 0;
        }
        return any;
    }
    template <class Store> DEVICE void each(Store store) const {
#pragma unroll
        for (int n = 0; n < LISTS; n++) {
            for (u32 left = local[n]; left != 0; left &= left - 1) {
                store(static_cast<long long>(__shfl_sync(ALL, own[n], __ffs(left) - 1)));
            }
        }
    }
};

// x: `[tokens, H]` bf16, H a multiple of 8, and of 256 if REORDERED; position: `[tokens, TOP_K]`, -1 for slots that are
// left out; topk_weights: `[tokens, 1]` if WEIGHT_ON_INPUT.
// operand: `[rows, H]`, e4m3 with operand_scale, `[H / 128, rows]`, or bf16. A warp for each part of each token.
KERNEL void __launch_bounds__(THREADS, 4) spread(const u16* x, const int* position, const float* topk_weights, u8* operand,
                                                 float* operand_scale, int tokens, int rows, int H) {
    SHARED_MEMORY(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = (H + PART - 1) / PART;
    const int job = static_cast<int>(blockIdx.x) * WARPS + warp, token = job / parts, part = job % parts;
    wait_for_launches();
    let_next_start();
    if (token >= tokens) return;
    Positions to;
    if (!to.load(position + static_cast<long long>(token) * TOP_K, lane)) return;
    Part own;
    own.load(x, token, part, lane, H);
    const float weight = WEIGHT_ON_INPUT ? topk_weights[token] : 1.0f;
    u32* ordered = reinterpret_cast<u32*>(memory) + warp * ORDERED;
    store_part(own, weight, ordered, to, part * PART + 8 * lane, H, rows, operand, operand_scale);
}
