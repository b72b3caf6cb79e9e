// Both grouped GEMMs of an FP8 mixture-of-experts layer in one persistent launch, weights first.
//
// Earlier launches have sorted the slots by expert: `tokens` are their quantised activations in that
// order, `list` says which experts were hit and where their positions begin and end. This launch makes
// `hidden` of them, quantised per position and GROUP columns, and of that `partial`, the experts'
// outputs before the routing weights; a later launch sums those over a token's slots.
//
// Operands. With few tokens per expert time goes by bytes of weights, so weights are the first operand,
// 64 rows of an MMA, and tokens the narrow side, as many columns as the tile has tokens, to a multiple
// of eight. The accelerator brings gate and up rows in turns of eight, so that a thread has the gate
// (row g of an MMA's 16 rows a warp) and the up (row g + 8) of a hidden column.
//
// Items. One of the first GEMM is PARTS parts of 32 hidden columns, one of the second PARTS parts of 64
// output rows, each for all of K and for a tile of an expert's tokens: up to MOST, the expert's tokens
// split evenly. Items are claimed from a counter in order: all of the first GEMM, then all of the
// second; tiles that share weights follow each other, then blocks of an expert. A running block alone
// has claimed what others wait for, so waiting ends whichever blocks run together.
//
// From one GEMM to the other nothing drains: an item of the second waits only for its own expert's
// hidden columns (`ready` counts the items that have made some), mostly long done, and its weights
// are on their way meanwhile.
//
// Roles. A warp claims items, shortly before they are needed, so that blocks end together; another
// copies; WARP_GROUPS warp groups multiply, the parts of an item dealt out among them. A step is 128
// columns of K: its weights, tokens and scales are a stage of the ring, completed by one barrier. What
// the item is comes with its first stage; an item without parts is the end. Every sum of SUB products is
// scaled in fp32: by the weights' scale, which is the same for all rows of a part (of gate and of up
// rows), and by the token's.
//
// Each item is made by one block in a fixed order, so results repeat bit for bit.
//
// Compile-time constants: WARP_GROUPS (2 to 4) and BLOCKS (parts of each: 1 to 3), MOST (tokens of a tile:
// 8, 16, 32, 64, 96 or 128), as far as registers go: BLOCKS * MOST up to 256, 128 and 64 for 2, 3 and 4 warp
// groups; STAGES, EXPERTS (room in the list), ACTIVATION (its kind), N13, K13, N2, K2 (rows and columns of a
// weight scale), SHARED_BYTES (what the launch asks for).
#include "common.cuh"
#include "wgmma.cuh"

constexpr int STEP = 128;                    // columns of K, bytes
constexpr int PART_BYTES = 64 * STEP;        // of a part's step: 64 rows
constexpr int PARTS = WARP_GROUPS * BLOCKS;  // of an item
constexpr int GROUP = 32 * PARTS;            // hidden columns of an item, which share a scale
constexpr int ROWS = 64 * PARTS;             // output rows of an item
constexpr int CONSUMER_WARPS = 4 * WARP_GROUPS;
constexpr int CONSUMERS = 32 * CONSUMER_WARPS;
constexpr int THREADS = CONSUMERS + 128;
// Of a thread: the launch's are as many for all, and what copying leaves goes to those that multiply.
constexpr int COPY_REGISTERS = 56;
constexpr int REGISTERS = WARP_GROUPS == 2 ? 224 : WARP_GROUPS == 3 ? 152 : 104;
constexpr int PRODUCTS = WARP_GROUPS == 4 ? 32 : 64;  // registers for sums that are not scaled yet
constexpr int QUEUE = 2;                 // items claimed and not yet copied
constexpr unsigned ALL = 0xFFFFFFFFu;    // lanes
constexpr float E4M3_MAX = 448.0f;

DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int most(int a, int b) { return a > b ? a : b; }
DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Products that are summed before they are scaled: those that have one scale of weights and of tokens.
constexpr int SUB13 = least(STEP, K13);
constexpr int SUB2 = least(least(STEP, K2), GROUP % 128 == 0 ? 128 : GROUP % 64 == 0 ? 64 : 32);
static_assert(N13 % 32 == 0 && N2 % 64 == 0, "one scale for the rows of a part");
static_assert(STEP % SUB13 == 0 && K13 % SUB13 == 0 && SUB13 % 32 == 0, "one scale for SUB13 columns");
static_assert(STEP % SUB2 == 0 && K2 % SUB2 == 0 && GROUP % SUB2 == 0 && SUB2 % 32 == 0, "the same for SUB2");
static_assert(GROUP >= 64, "two scales of a token for a step at most");
constexpr int MOST_SUMS = WARP_GROUPS == 2 ? 256 : WARP_GROUPS == 3 ? 128 : 64;
static_assert(MOST % 8 == 0 && MOST <= 128 && BLOCKS * MOST <= MOST_SUMS, "registers");

// Scales of a part's weights in a step: of the first GEMM gate's and up's.
constexpr int SCALES13 = 2 * (STEP / SUB13);
constexpr int SCALES2 = STEP / SUB2;
constexpr int PART_SCALES = most(SCALES13, SCALES2);

// Tokens whose outputs are turned around at once.
constexpr int TURNED = least(MOST, PARTS <= 4 ? 32 : 16);
constexpr int CODE_STRIDE = GROUP + 16;  // bytes; an odd multiple of 16, against bank conflicts
constexpr int STAGING_BYTES = most(most(PARTS * TURNED * 128, MOST * CODE_STRIDE), 4 * CONSUMER_WARPS * MOST);

struct alignas(16) Item {
    int parts;   // 0: there are no more
    int gated;   // of the first GEMM
    int ready;   // its tokens are there
    int hit;     // number of the expert in the list
    int expert;
    int block;   // of hidden columns, or of output rows
    int start;   // first position
    int tokens;

    // As many as are copied and multiplied, perhaps beyond the expert's own.
    DEVICE int columns() const { return ceil_div(tokens, 8) * 8; }
};

struct alignas(16) Hit {
    int expert, start, end;
    int tiles_before;
};

struct Shared {
    u8 matrices[STAGES][PARTS * PART_BYTES + MOST * STEP];
    u8 staging[STAGING_BYTES];
    float token_scales[STAGES][2][MOST];
    float weight_scales[STAGES][PARTS * PART_SCALES];
    Item items[STAGES];
    Item queue[QUEUE];
    Hit hits[EXPERTS + 1];
    float codes_per_unit[MOST];
    int warp_totals[THREADS / 32];
    u64 full[STAGES], empty[STAGES];  // of the ring
    u64 queued[QUEUE], taken[QUEUE];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "what the launch asks for");

struct Layer {
    const TensorMap *w13, *w2;
    const TensorMap *tokens32, *tokens8, *hidden32, *hidden8;  // boxes of 32 and of 8 positions
    const float *w13_scale, *w2_scale, *token_scale;
    const int* list;
    int stride;
    int *ticket, *ready;
    u8* hidden;
    float* hidden_scale;
    u16* partial;
    float limit, alpha, beta;
    int H, I, positions;
    int scale_rows13, scale_columns13, scale_rows2, scale_columns2;

    DEVICE int blocks13() const { return ceil_div(I, GROUP); }
    DEVICE int blocks2() const { return ceil_div(H, ROWS); }
    DEVICE int depth(bool gated) const { return gated ? H : I; }
    DEVICE int steps(bool gated) const { return ceil_div(depth(gated), STEP); }
};

// A place in the ring, and the parity of its turn.
struct Ring {
    int stage = 0;
    int phase = 0;

    DEVICE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// --- The list of experts ---

// Sum of `value` over this lane and those before it.
DEVICE int sum_up_to(int value, int lane) {
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(ALL, value, by);
        if (lane >= by) value += other;
    }
    return value;
}

// All threads: the list to shared memory, with sums of tiles. How many experts it has.
DEVICE int read_list(const Layer& layer, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int count = layer.list[0];
    int before = 0;
    for (int first = 0; first < count; first += THREADS) {
        const int i = first + static_cast<int>(threadIdx.x);
        Hit hit = {0, 0, 0, 0};
        if (i < count) {
            const int* entry = layer.list + 1 + i * layer.stride;
            hit = {entry[0], entry[1], entry[2], 0};
        }
        const int tiles = ceil_div(hit.end - hit.start, MOST);
        const int up_to = sum_up_to(tiles, lane);
        if (lane == 31) shared.warp_totals[warp] = up_to;
        __syncthreads();
        hit.tiles_before = before + up_to - tiles;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) hit.tiles_before += shared.warp_totals[w];
            before += shared.warp_totals[w];
        }
        if (i < count) shared.hits[i] = hit;
        __syncthreads();
    }
    if (threadIdx.x == 0) shared.hits[count] = {0, 0, 0, before};
    __syncthreads();
    return count;
}

// The expert of which tile `tile` of all is.
DEVICE int find_hit(const Shared& shared, int count, int tile) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (shared.hits[middle].tiles_before <= tile) low = middle;
        else high = middle;
    }
    return low;
}

DEVICE Item find_item(const Layer& layer, const Shared& shared, int count, int ticket) {
    const int tiles = shared.hits[count].tiles_before;
    Item item = {};
    item.gated = ticket < tiles * layer.blocks13();
    if (!item.gated) ticket -= tiles * layer.blocks13();
    const int blocks = item.gated ? layer.blocks13() : layer.blocks2();
    if (ticket >= tiles * blocks) return item;
    item.hit = find_hit(shared, count, ticket / blocks);
    const Hit hit = shared.hits[item.hit];
    const int own_tiles = shared.hits[item.hit + 1].tiles_before - hit.tiles_before;
    const int inside = ticket - hit.tiles_before * blocks;
    const int each = 8 * ceil_div(hit.end - hit.start, 8 * own_tiles);
    item.block = inside / own_tiles;
    item.expert = hit.expert;
    item.start = hit.start + inside % own_tiles * each;
    item.tokens = min(each, hit.end - item.start);
    item.parts = item.gated ? min(PARTS, ceil_div(layer.I - item.block * GROUP, 32))
                            : min(PARTS, (layer.H - item.block * ROWS) / 64);
    return item;
}

// --- Claiming ---

// Whether an expert's hidden columns are there; or, if it must, waits until they are.
DEVICE bool hidden_ready(const Layer& layer, const Shared& shared, int hit, bool must) {
    const int tiles = shared.hits[hit + 1].tiles_before - shared.hits[hit].tiles_before;
    const int items = tiles * layer.blocks13();
    if (must) wait_until_at_least(layer.ready + hit, items);
    return must || load_acquire(layer.ready + hit) >= items;
}

// Claims the next item when the last steps of the one before are about to be copied, or with items of few
// steps one item earlier: it takes about as long as copying two steps.
DEVICE void claim(const Layer& layer, Shared& shared, int count) {
    const int lane = threadIdx.x % 32;
    int ticket = blockIdx.x;
    for (int n = 0;; n++) {
        Item item = find_item(layer, shared, count, ticket);
        if (item.parts > 0) item.ready = item.gated || hidden_ready(layer, shared, item.hit, false);
        if (lane == 0) {
            shared.queue[n % QUEUE] = item;
            barrier_arrive(&shared.queued[n % QUEUE]);
        }
        if (item.parts == 0) return;
        const int before = layer.steps(item.gated) > 2 ? n : n - 1;
        if (before >= 0) barrier_wait(&shared.taken[before % QUEUE], before / QUEUE & 1);
        const int claimed = lane == 0 ? add_relaxed(layer.ticket, 1) : 0;
        ticket = __shfl_sync(ALL, claimed, 0) + gridDim.x;
    }
}

// --- Copying ---

// The first and the last row of `hidden_scale` that a step of the second GEMM needs.
DEVICE int first_group(int k0) { return k0 / GROUP; }
DEVICE int last_group(const Layer& layer, int k0) { return (min(k0 + STEP, layer.I) - 1) / GROUP; }

// Bytes of token scales from a row: positions end with the array.
DEVICE int scale_bytes(const Layer& layer, const Item& item) {
    return 4 * min(item.columns(), layer.positions - item.start);
}

template <bool GATED>
DEVICE void copy_weight_scales(const Layer& layer, const Item& item, float* to, int k0, int lane) {
    constexpr int SCALES = GATED ? SCALES13 : SCALES2;
#pragma unroll
    for (int first = 0; first < PARTS * SCALES; first += 32) {
        const int i = first + lane, part = i / SCALES, nth = i % SCALES;
        if (part >= item.parts) continue;
        const float* from;
        if (GATED) {
            const int row13 = (item.block * GROUP + part * 32) / N13;
            const int row = (2 * item.expert + nth % 2) * layer.scale_rows13 + row13;
            const int column = min((k0 + nth / 2 * SUB13) / K13, layer.scale_columns13 - 1);
            from = layer.w13_scale + row * layer.scale_columns13 + column;
        } else {
            const int row = item.expert * layer.scale_rows2 + (item.block * ROWS + part * 64) / N2;
            const int column = min((k0 + nth * SUB2) / K2, layer.scale_columns2 - 1);
            from = layer.w2_scale + row * layer.scale_columns2 + column;
        }
        copy_float(to + part * PART_SCALES + nth, from);
    }
}

// A step's weights with their scales; of the step's barrier all but the tokens' copies.
template <bool GATED>
DEVICE void copy_weights(const Layer& layer, Shared& shared, const Item& item, int stage, int k0) {
    const int lane = threadIdx.x % 32;
    u64* full = &shared.full[stage];
    if (lane == 0) {
        const int rows = GATED ? 1 : 1 + last_group(layer, k0) - first_group(k0);
        const int bytes = item.parts * PART_BYTES + item.columns() * STEP;
        barrier_expect(full, bytes + rows * scale_bytes(layer, item));
        u8* to = shared.matrices[stage];
#pragma unroll
        for (int part = 0; part < PARTS; part++, to += PART_BYTES) {
            if (part >= item.parts) break;
            const int eight = item.block * (GROUP / 8) + part * 4;
            if (GATED) copy_box(to, layer.w13, k0, 0, 0, eight, item.expert, full);
            else copy_box(to, layer.w2, k0, item.expert * layer.H + item.block * ROWS + part * 64, full);
        }
    }
    copy_weight_scales<GATED>(layer, item, shared.weight_scales[stage], k0, lane);
    arrive_with_copies(full);
}

// A step's tokens and their scales, by one thread.
template <bool GATED>
DEVICE void copy_tokens(const Layer& layer, Shared& shared, const Item& item, int stage, int k0) {
    u64* full = &shared.full[stage];
    u8* to = shared.matrices[stage] + PARTS * PART_BYTES;
    const TensorMap* map32 = GATED ? layer.tokens32 : layer.hidden32;
    const TensorMap* map8 = GATED ? layer.tokens8 : layer.hidden8;
    const int rows = item.columns();
    int row = 0;
#pragma unroll 1
    for (; row + 32 <= rows; row += 32) copy_box(to + row * STEP, map32, k0, item.start + row, full);
#pragma unroll 1
    for (; row < rows; row += 8) copy_box(to + row * STEP, map8, k0, item.start + row, full);
    const float* scales = GATED ? layer.token_scale : layer.hidden_scale;
    const int first = GATED ? k0 / STEP : first_group(k0);
    const int last = GATED ? first : last_group(layer, k0);
#pragma unroll 1
    for (int group = first; group <= last; group++) {
        const float* from = scales + static_cast<long long>(group) * layer.positions + item.start;
        copy_bulk(shared.token_scales[stage][group - first], from, scale_bytes(layer, item), full);
    }
}

// All steps of an item, the nth of the queue. Tokens fall behind the weights, up to the whole ring, while
// they are not ready.
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
        if (!GATED && !ready) {
            const bool must = k0 + STEP >= depth || k0 + STEP - done == STAGES * STEP;
            ready = hidden_ready(layer, shared, item.hit, must);
            if (ready) fence_async_global();
        }
        for (; ready && done <= k0; done += STEP, behind.advance()) {
            if (lane == 0) copy_tokens<GATED>(layer, shared, item, behind.stage, done);
        }
    }
}

DEVICE void copy(const Layer& layer, Shared& shared) {
    const int lane = threadIdx.x % 32;
    Ring ring;
    for (int n = 0;; n++) {
        barrier_wait(&shared.queued[n % QUEUE], n / QUEUE & 1);
        const Item item = shared.queue[n % QUEUE];
        __syncwarp();
        if (item.parts == 0) break;
        if (item.gated) copy_item<true>(layer, shared, item, n, ring);
        else copy_item<false>(layer, shared, item, n, ring);
    }
    barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
    if (lane == 0) {
        shared.items[ring.stage].parts = 0;
        barrier_arrive(&shared.full[ring.stage]);
    }
    arrive_with_copies(&shared.full[ring.stage]);
}

// --- The consumers ---

// Number of a consumer's warp group, and of its warp and lane therein.
struct Place {
    int group, warp, lane;

    DEVICE int row() const { return lane / 4; }
    DEVICE int column() const { return lane % 4 * 2; }
};

// sums += products * scale of the weights * scale of the token; two scales of weights: of row g, and
// of row g + 8.
template <int N>
DEVICE void add_scaled(float (&sums)[N / 2], const float (&products)[N / 2], float weight, float weight8,
                       const float* token_scales) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float2 token = *reinterpret_cast<const float2*>(token_scales + 8 * j);
        sums[4 * j] += products[4 * j] * (weight * token.x);
        sums[4 * j + 1] += products[4 * j + 1] * (weight * token.y);
        sums[4 * j + 2] += products[4 * j + 2] * (weight8 * token.x);
        sums[4 * j + 3] += products[4 * j + 3] * (weight8 * token.y);
    }
}

// A part's products of one step.
template <int N, bool GATED>
DEVICE void add_step(float (&sums)[N / 2], u64 weights, u64 tokens, const float* weight_scales,
                     const float* token_scales, int k0, int depth) {
    constexpr int SUB = GATED ? SUB13 : SUB2;
    constexpr int TOGETHER = least(STEP / SUB, N / 2 * 4 <= PRODUCTS ? 4 : N / 2 * 2 <= PRODUCTS ? 2 : 1);
#pragma unroll
    for (int first = 0; first < STEP / SUB; first += TOGETHER) {
        if (first > 0 && k0 + first * SUB >= depth) break;
        float products[TOGETHER][N / 2];
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
#pragma unroll
            for (int k = 0; k < SUB; k += 32) {
                const int column = (first + n) * SUB + k;
                wgmma_fp8<N>(products[n], columns_on(weights, column), columns_on(tokens, column), k > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
            wgmma_touch(products[n]);
            const int nth = first + n;
            // Columns past the last are zeros, and so have no scale of their own.
            const int group = GATED ? 0 : min(k0 + nth * SUB, depth - 1) / GROUP - k0 / GROUP;
            add_scaled<N>(sums, products[n], weight_scales[GATED ? 2 * nth : nth],
                          weight_scales[GATED ? 2 * nth + 1 : nth], token_scales + group * MOST);
        }
        wgmma_touch(sums);  // before the next products overwrite these
    }
}

// Makes of lanes 4g+t, of which each has a byte for each of four tokens, lanes with a token's bytes of
// four lanes with the same t: those of g % 4 = 0 the first token's, and so on.
DEVICE u32 turn_bytes(u32 word, int g) {
    const u32 next = __shfl_xor_sync(ALL, word, 4);
    word = __byte_perm(word, next, g & 1 ? 0x3715 : 0x6240);
    const u32 other = __shfl_xor_sync(ALL, word, 8);
    return __byte_perm(word, other, g & 2 ? 0x3276 : 0x5410);
}

// Hidden columns of a thread's sums, and of each token the largest of a warp.
template <int N>
DEVICE void activate_sums(const Layer& layer, float (&sums)[BLOCKS][N / 2], float* largest,
                          const Place& place) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float amax[2] = {0.0f, 0.0f};
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                float& gate = sums[b][4 * j + c];
                const float up = sums[b][4 * j + 2 + c];
                gate = activate<ACTIVATION>(gate, up, layer.limit, layer.alpha, layer.beta);
                amax[c] = fmaxf(amax[c], fabsf(gate));
            }
            amax[c] = fmaxf(amax[c], __shfl_xor_sync(ALL, amax[c], 4));
            amax[c] = fmaxf(amax[c], __shfl_xor_sync(ALL, amax[c], 8));
            amax[c] = fmaxf(amax[c], __shfl_xor_sync(ALL, amax[c], 16));
        }
        if (place.row() == 0) {
            *reinterpret_cast<float2*>(largest + 8 * j + place.column()) = make_float2(amax[0], amax[1]);
        }
    }
}

// A token's scale from all warps' largest; by one thread for each token.
DEVICE void scale_token(const Layer& layer, Shared& shared, const Item& item, int token) {
    const float* largest = reinterpret_cast<const float*>(shared.staging);
    float amax = 0.0f;
#pragma unroll
    for (int warp = 0; warp < CONSUMER_WARPS; warp++) amax = fmaxf(amax, largest[warp * MOST + token]);
    // Bounded, so that 0 stays 0 also where amax is hardly a number.
    shared.codes_per_unit[token] = amax > 0.0f ? fminf(E4M3_MAX / amax, 1e38f) : 1.0f;
    const float scale = amax > 0.0f ? amax / E4M3_MAX : 1.0f;
    layer.hidden_scale[static_cast<long long>(item.block) * layer.positions + item.start + token] = scale;
}

// A part's hidden columns as codes, to its 32 bytes of each token's row.
template <int N>
DEVICE void stage_codes(const Shared& shared, const float (&values)[N / 2], u8* to, const Place& place) {
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
        const bool two = j + 1 < N / 8;
        const int k = two ? j + 1 : j;
        const float* factors = shared.codes_per_unit + place.column();
        const float2 a = *reinterpret_cast<const float2*>(factors + 8 * j);
        const float2 b = *reinterpret_cast<const float2*>(factors + 8 * k);
        const float* second = values + 4 * k;
        u32 word = to_fp8(values[4 * j] * a.x, values[4 * j + 1] * a.y, second[0] * b.x, second[1] * b.y);
        const int g = place.row();
        word = turn_bytes(word, g);
        const int token = 8 * j + 4 * (g & 2) + place.column() + (g & 1);
        u8* row = to + token * CODE_STRIDE;
        if (two || (g & 2) == 0) *reinterpret_cast<u32*>(row + 8 * place.warp + (g & 4)) = word;
    }
}

// The end of an item of the first GEMM. Waits for all warp groups; with that, and since no item of the
// second comes before one of the first, the staging memory is free when it begins.
template <int N>
DEVICE void store_hidden(const Layer& layer, Shared& shared, const Item& item, float (&sums)[BLOCKS][N / 2],
                         const Place& place) {
    const int thread = 128 * place.group + 32 * place.warp + place.lane;
    float* largest = reinterpret_cast<float*>(shared.staging);
    activate_sums<N>(layer, sums, largest + thread / 32 * MOST, place);
    named_sync(1, CONSUMERS);
    if (thread < item.tokens) scale_token(layer, shared, item, thread);
    named_sync(1, CONSUMERS);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        stage_codes<N>(shared, sums[b], shared.staging + 32 * (WARP_GROUPS * b + place.group), place);
    }
    named_sync(1, CONSUMERS);
    constexpr int PIECES = GROUP / 16;
    for (int i = thread; i < item.tokens * PIECES; i += CONSUMERS) {
        const int token = i / PIECES, at = i % PIECES * 16;
        const int column = item.block * GROUP + at;
        if (column < layer.I) {
            const u8* from = shared.staging + token * CODE_STRIDE + at;
            u8* to = layer.hidden + static_cast<long long>(item.start + token) * layer.I + column;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        }
    }
    fence_async_global();
    named_sync(1, CONSUMERS);
    if (thread == 0) add_release(layer.ready + item.hit, 1);
}

// The end of an item of the second GEMM, for a warp group.
template <int N>
DEVICE void store_rows(const Layer& layer, Shared& shared, const Item& item,
                       const float (&sums)[BLOCKS][N / 2], const Place& place) {
    constexpr int PART = TURNED * 128;
    u8* turned = shared.staging + place.group * BLOCKS * PART;
    // Of a token's 64 outputs, eight pieces of 16 bytes, which change places with the token: against
    // bank conflicts.
    const int piece = 2 * place.warp + (place.lane >> 3 & 1), token = place.lane & 7;
    u8* row = turned + token * 128 + (piece ^ token) * 16;
    // What a thread stores: a piece of every 16th token.
    const int thread = 32 * place.warp + place.lane, n = thread >> 3, c = thread & 7;
    const u8* from = turned + n * 128 + (c ^ (n & 7)) * 16;
    u16* to = layer.partial + static_cast<long long>(item.start + n) * layer.H + item.block * ROWS + c * 8;
#pragma unroll
    for (int first = 0; first < N; first += TURNED) {
        const int tokens = least(N - first, TURNED);
        named_sync(2 + place.group, 128);  // what was here before has been stored
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int j = first / 8; j < (first + tokens) / 8; j++) {
                const float(&d)[N / 2] = sums[b];
                store_transposed(row + b * PART + (8 * j - first) * 128, to_bf16(d[4 * j], d[4 * j + 1]),
                                 to_bf16(d[4 * j + 2], d[4 * j + 3]));
            }
        }
        named_sync(2 + place.group, 128);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int part = WARP_GROUPS * b + place.group;
            if (part >= item.parts) continue;
#pragma unroll
            for (int m = 0; m < tokens; m += 16) {
                if (first + m + n >= item.tokens) continue;
                *reinterpret_cast<uint4*>(to + static_cast<long long>(first + m) * layer.H + part * 64) =
                    *reinterpret_cast<const uint4*>(from + b * PART + m * 128);
            }
        }
    }
}

template <int N, bool GATED>
DEVICE void multiply_item(const Layer& layer, Shared& shared, const Item& item, Ring& ring, Place place) {
    const int depth = layer.depth(GATED);
    float sums[BLOCKS][N / 2];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[b][i] = 0.0f;
    }
    for (int k0 = 0; k0 < depth; k0 += STEP) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        const u8* matrices = shared.matrices[ring.stage];
        const u64 tokens = shared_matrix(matrices + PARTS * PART_BYTES);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int part = WARP_GROUPS * b + place.group;
            if (part < item.parts) {
                add_step<N, GATED>(sums[b], shared_matrix(matrices + part * PART_BYTES), tokens,
                                   shared.weight_scales[ring.stage] + part * PART_SCALES,
                                   shared.token_scales[ring.stage][0] + place.column(), k0, depth);
            }
        }
        fence_async_shared();  // the scales are read before others are copied there
        __syncwarp();
        if (place.lane == 0) barrier_arrive(&shared.empty[ring.stage]);
        ring.advance();
    }
    compute_here(place.lane);
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

// w13: `[E, I / 8, (gate, up), 8, H]` e4m3 in boxes of 1, 4, 2, 8 and 128; w2: `[E * H, I]` in boxes of 64
// and 128. tokens, hidden: `[positions, H]` and `[positions, I]` e4m3 in boxes of 32, of 8 and 128. All with
// the 128-byte swizzle.
// w13_scale: `[E, (gate, up), scale_rows13, scale_columns13]`; w2_scale: `[E, scale_rows2, scale_columns2]`.
// token_scale: `[H / 128, positions]`; hidden_scale: `[I / GROUP, positions]`; positions a multiple of 4, and
// so every expert's first.
// list: how many experts, and of each `stride` numbers: expert, first position, end position.
// counters: `[1 + experts hit]`, zero before.
// partial: `[positions, H]` bf16. H is a multiple of 64, I of 16.
KERNEL void __launch_bounds__(THREADS, 1) flow(
    const GRID_CONSTANT TensorMap w13, const GRID_CONSTANT TensorMap w2,
    const GRID_CONSTANT TensorMap tokens32, const GRID_CONSTANT TensorMap tokens8,
    const GRID_CONSTANT TensorMap hidden32, const GRID_CONSTANT TensorMap hidden8,
    const float* w13_scale, const float* w2_scale, const float* token_scale, const int* list, int* counters,
    u8* hidden, float* hidden_scale, u16* partial, float limit, float alpha, float beta, int stride, int H,
    int I, int positions, int scale_rows13, int scale_columns13, int scale_rows2, int scale_columns2) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Layer layer = {&w13, &w2, &tokens32, &tokens8, &hidden32, &hidden8, w13_scale, w2_scale,
                         token_scale, list, stride, counters, counters + 1, hidden, hidden_scale, partial,
                         limit, alpha, beta, H, I, positions, scale_rows13, scale_columns13,
                         scale_rows2, scale_columns2};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&shared.full[s], 1 + 32);
            barrier_init(&shared.empty[s], CONSUMER_WARPS);
        }
        for (int q = 0; q < QUEUE; q++) {
            barrier_init(&shared.queued[q], 1);
            barrier_init(&shared.taken[q], 1);
        }
        barriers_ready();
        prefetch_map(&w13);
        prefetch_map(&w2);
        prefetch_map(&tokens32);
        prefetch_map(&tokens8);
        prefetch_map(&hidden32);
        prefetch_map(&hidden8);
    }
    let_next_start();
    wait_for_launches();
    const int count = read_list(layer, shared);
    // The same for all lanes, which the compiler is to know.
    const int warp = __shfl_sync(ALL, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp >= CONSUMER_WARPS) {
        leave_registers<COPY_REGISTERS>();
        if (warp == CONSUMER_WARPS) copy(layer, shared);
        if (warp == CONSUMER_WARPS + 1) claim(layer, shared, count);
    } else {
        take_registers<REGISTERS>();
        consume(layer, shared, {warp / 4, warp % 4, static_cast<int>(threadIdx.x) % 32});
    }
}
