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
// memory as the first GEMM wants them, e4m3 with a scale per 128 columns or bf16, and then note the
// routing weight of every (hit, token). Every token is a column of every product, routed to the expert
// or not: eight tokens are the narrowest MMA, and gathering would cost more than the MMAs. Columns do
// not mix, so whatever a token holds stays in its own results, and those of pairs that are not routed
// are not stored.
//
// First GEMM: a unit is eight hidden columns of one hit: 16 weight rows, eight of gate and their eight
// of up, so a thread has gate and up of the same hidden column. Blocks claim units in order from a
// counter in global memory, one ahead of need; only a running block holds units and it waits for
// nobody before they are done, so the launch cannot hang however few blocks run at a time. The warps
// split a unit's K by granules and leave sums in shared memory, double-buffered, where two more warps add,
// activate and store them. Hidden columns go to global memory in bf16, already
// times the routing weight (and NVFP4's global scale of w2), which leaves a plain sum to the rest.
//
// Second GEMM: every block owns ROW_GROUPS x 16 rows of the output and sums over all hits, so nothing
// is added across blocks. Its warps split (hit, granule of K) items; each quantises the hidden columns
// of its item itself (fp8), one item ahead of need. Sums over the warps come last. All sums are in an
// order that is fixed: which block computed a unit does not show, and results repeat bit for bit.
//
// Operands: lane 4g+t takes 16 bytes of weight row g, of row g+8 and of token g at the same place of
// K, 4 lanes side by side. What an MMA takes as columns 4t.. and 4t+16.. are then words next to each
// other: a permutation of K that both operands share. Where a scale covers only 32 or 64 columns of w2
// ("narrow"), lanes take 8 bytes, so that each MMA stays within one scale. NVFP4: of a word's eight
// codes, p and p+4 lie 16 bits apart and become a bf16 pair; tokens and hidden columns are stored in
// that order, and the 16 blocks of eight of 128 columns so that four lanes read 64 bytes side by side.
//
// Rows in shared memory are padded against bank conflicts, except where a whole piece of w2 is so
// small that one copy brings it.
//
// Macros: FORMAT 0 bf16, 1 fp8, 2 nvfp4; SIZE_H, SIZE_I; EXPERTS (local), NUM_IDS (global), TOP_K;
// TOKEN_BLOCKS: of eight tokens; ROW_GROUPS: 16 ROW_GROUPS gridDim.x >= SIZE_H; ACTIVATION, HAS_MAP,
// IDS64, WEIGHT_ON_INPUT; N13, K13, N2, K2 (fp8): rows and columns that a weight scale covers;
// SHARED_BYTES: the launch's dynamic shared memory, of which the ring takes what the rest leaves;
// and, if not as below, CONSUMERS: warps that multiply, CHUNK: bytes of a weight row in a stage.
// Threads: 32 (CONSUMERS + 1 to 4), the further warps are producers.
#include "common.cuh"

#ifndef CONSUMERS
#define CONSUMERS 8
#endif
#ifndef CHUNK
#define CHUNK 2048
#endif
#if FORMAT != 1 && !defined(N13)
#define N13 16
#define K13 128
#define N2 16
#define K2 128
#endif

enum { BF16 = 0, FP8 = 1, NVFP4 = 2 };

// --- Sizes ---

constexpr int H = SIZE_H, I = SIZE_I;
constexpr int CLERKS = 2, MOST_THREADS = (CONSUMERS + CLERKS + 4) * 32;
constexpr int TOKENS = 8 * TOKEN_BLOCKS;
constexpr int SLOTS = TOKENS * TOP_K;
constexpr int HITS = SLOTS < EXPERTS ? SLOTS : EXPERTS;
constexpr int UNITS = I / 8;  // of a hit
constexpr int ROWS = 16 * ROW_GROUPS;
constexpr u32 ABSENT = 0xFFFFFFFF;  // as a routing weight: the token is not routed to the hit

constexpr bool NARROW = FORMAT == FP8 && (K2 % 128 != 0 || I % 64 != 0);
constexpr int NIBBLES = FORMAT == BF16 ? 4 : FORMAT == FP8 ? 2 : 1;  // of a weight
constexpr int GRANULE = FORMAT == BF16 ? 64 : 128;  // columns that a warp multiplies at a time
constexpr int GRANULE_BYTES = GRANULE * NIBBLES / 2;
constexpr int LOADS = FORMAT == BF16 ? 2 : 4;      // of 16 bytes, eight bf16 columns, a lane and granule
constexpr int WORDS = FORMAT == BF16 ? 8 : 16;     // of a lane's operand b
constexpr int CHAINS = TOKEN_BLOCKS == 1 ? 2 : 1;  // of MMAs that wait for each other
constexpr int STEP = FORMAT == NVFP4 ? 2 : 1;      // granules whose block scales are 16 bytes
constexpr int SUB = NARROW ? 32 : 128;             // columns of w2 that are summed before they are scaled

DEVICE constexpr int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }
DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
// The size of a part if n granules are split into as few and equal parts as may be, of `most` at most.
DEVICE constexpr int equal_parts(int n, int most) { return up_to(ceil_div(n, ceil_div(n, most)), STEP); }
// Rows this far apart do not meet in a bank: of 16-byte loads, of 8-byte loads, of NVFP4's scales.
DEVICE constexpr int padded(int n) { return up_to(n - 64, 128) + 64; }
DEVICE constexpr int padded_narrow(int n) { return up_to(n - 32, 128) + 32; }
DEVICE constexpr int padded_scales(int n) { return up_to(n - 16, 32) + 16; }

// A stage of the first GEMM: CHUNK_GRANULES of 16 rows.
constexpr int ROW1 = H * NIBBLES / 2;
constexpr int GRANULES1 = ceil_div(H, GRANULE);
constexpr int CHUNK_GRANULES = equal_parts(GRANULES1, larger(CHUNK / GRANULE_BYTES / STEP, 1) * STEP);
constexpr int CHUNKS = ceil_div(GRANULES1, CHUNK_GRANULES);
constexpr int CHUNK_BYTES = smaller(CHUNK_GRANULES * GRANULE_BYTES, ROW1);
constexpr int STRIDE1 = padded(CHUNK_BYTES);
// Block scales of eight rows lie side by side in memory, and so they are copied if a stage has whole rows.
constexpr int SCALE_STRIDE1 = CHUNKS == 1 ? ROW1 / 8 : padded_scales(CHUNK_BYTES / 8);
// Every warp has equally many granules of every chunk.
constexpr bool EVEN = GRANULES1 == CHUNKS * CHUNK_GRANULES && CHUNK_GRANULES % CONSUMERS == 0;

// What is in shared memory beside the ring.
constexpr int TOKEN_STRIDE = padded(2 * H);
constexpr int TOKENS_BYTES = TOKENS * TOKEN_STRIDE;
constexpr int SUMS = CONSUMERS * TOKEN_BLOCKS * 32;  // float4s of a buffer of the first GEMM's sums
constexpr int WEIGHTS_BYTES = HITS * TOKENS * 4;
constexpr int MAP = HAS_MAP ? up_to(NUM_IDS, 32) : 0, FACTORS = FORMAT == NVFP4 ? HITS : 0;
constexpr int TABLES_BYTES =
    4 * (up_to(EXPERTS, 32) + up_to(HITS, 4) + up_to(SLOTS, 4) + MAP + 4 * FACTORS + 4);
constexpr int BESIDES = TOKENS_BYTES + 2 * SUMS * 16 + WEIGHTS_BYTES + TABLES_BYTES;
constexpr int ROOM = SHARED_BYTES - BESIDES - 64;

// A stage of the second GEMM: a slice of a hit's rows, or PIECES hits.
constexpr int ROW2 = I * NIBBLES / 2;
constexpr int GRANULES2 = ceil_div(I, GRANULE);
// Copies of less than 1 KB cost more than they bring (45 cycles each, measured on an H200), so a stage may be
// somewhat larger than one of the first GEMM, if three of them fit.
constexpr int STAGE2_BYTES = larger(16 * CHUNK_BYTES, smaller(24 * CHUNK, ROOM / 3));
constexpr int MOST_GRANULES = larger(STAGE2_BYTES / ROWS / GRANULE_BYTES / STEP, 1) * STEP;
constexpr int SLICE_GRANULES = equal_parts(GRANULES2, MOST_GRANULES);
constexpr int SLICES = ceil_div(GRANULES2, SLICE_GRANULES);
constexpr int SLICE_BYTES = smaller(SLICE_GRANULES * GRANULE_BYTES, ROW2);
constexpr bool WHOLE = SLICES == 1 && ROW2 < 512;  // one copy for all rows of a hit
constexpr int STRIDE2 = WHOLE ? ROW2 : NARROW ? padded_narrow(SLICE_BYTES) : padded(SLICE_BYTES);
constexpr int SCALE_STRIDE2 = SLICES == 1 ? ROW2 / 8 : padded_scales(SLICE_BYTES / 8);
constexpr int PIECE = ROWS * STRIDE2;
constexpr int PIECES = SLICES > 1 ? 1 : larger(16 * STRIDE1 / PIECE, 1);
constexpr int SUBS = ceil_div(smaller(SLICE_GRANULES * GRANULE, I), SUB);  // of a slice
constexpr int SCALE_COLUMNS13 = ceil_div(H, K13), SCALE_ROWS13 = ceil_div(I, N13);
constexpr int SCALE_COLUMNS2 = ceil_div(I, K2), SCALE_ROWS2 = ceil_div(H, N2);

constexpr int SCALES1 = FORMAT == FP8 ? 2 * CHUNK_GRANULES * 4 : FORMAT == NVFP4 ? 16 * SCALE_STRIDE1 : 0;
constexpr int PIECE_SCALES = FORMAT == FP8     ? ROW_GROUPS * SUBS * 4
                             : FORMAT == NVFP4 ? ROWS * SCALE_STRIDE2
                                               : 0;
constexpr int STAGE_DATA = larger(16 * STRIDE1, PIECES * PIECE);
constexpr int STAGE = up_to(STAGE_DATA + larger(SCALES1, PIECES * PIECE_SCALES), 128);

constexpr int STAGES = ROOM / (STAGE + 32);

static_assert(STAGES >= 2, "the tokens leave too little shared memory for the ring");
static_assert(STAGES * STAGE >= SUMS * ROW_GROUPS * 16, "the last sums do not fit into the ring");
static_assert(CONSUMERS > 0 && (CONSUMERS & (CONSUMERS - 1)) == 0 && CONSUMERS <= 16, "CONSUMERS");
static_assert(EXPERTS <= 1024 && (HAS_MAP || NUM_IDS == EXPERTS), "EXPERTS");
static_assert(H % (FORMAT == BF16 ? 32 : FORMAT == FP8 ? 128 : 256) == 0, "SIZE_H");
static_assert(I % (FORMAT == NVFP4 ? 256 : 32) == 0, "SIZE_I");
static_assert(K13 % 128 == 0 && N13 % 8 == 0 && N2 % 16 == 0, "N13, K13, N2");
static_assert(K2 % 128 == 0 || K2 == 32 || K2 == 64, "K2");
static_assert(!WEIGHT_ON_INPUT || TOP_K == 1, "a routing weight can be on the input of one expert only");

template <class T> DEVICE T read(const void* p) { return *static_cast<const T*>(p); }

struct Problem {
    const u8* x;
    const void* ids;
    const int* expert_map;
    const float* topk_weights;
    const u8 *w13, *w13_scale;
    const float* w13_global;
    const u8 *w2, *w2_scale;
    const float* w2_global;
    u16 *hidden, *out;
    int *ticket, *done, *exited;
    int tokens;
    float limit, alpha, beta;
};

// One of the block's warps that copy. The first leads: it routes, claims, and says what a stage is for.
struct Producer {
    int part, parts, lane;

    DEVICE bool leads() const { return part == 0; }
};

// Where things are in shared memory; the ring comes first.
struct Shared {
    u8* ring;

    DEVICE u8* stage(int s) const { return ring + s * STAGE; }
    DEVICE u8* stage_scales(int s) const { return stage(s) + STAGE_DATA; }
    DEVICE u8* tokens() const { return ring + STAGES * STAGE; }
    DEVICE float4* sums() const { return reinterpret_cast<float4*>(tokens() + TOKENS_BYTES); }
    // [hit][token], ABSENT or a routing weight
    DEVICE float* weights() const { return reinterpret_cast<float*>(sums() + 2 * SUMS); }
    DEVICE int* hit_experts() const { return reinterpret_cast<int*>(weights() + HITS * TOKENS); }
    DEVICE int* slot_experts() const { return hit_experts() + up_to(HITS, 4); }
    // of each expert whether it is hit, then which hit it is
    DEVICE int* ranks() const { return slot_experts() + up_to(SLOTS, 4); }
    DEVICE int* map() const { return ranks() + up_to(EXPERTS, 32); }
    // of a hit NVFP4's factors of gate, of up and of the hidden columns
    DEVICE float4* factors() const { return reinterpret_cast<float4*>(map() + MAP); }
    DEVICE int* hits() const { return reinterpret_cast<int*>(factors() + FACTORS); }
    DEVICE u64* full(int s) const { return reinterpret_cast<u64*>(hits() + 4) + s; }
    DEVICE u64* empty(int s) const { return full(STAGES) + s; }
    // what a stage is for is known; the hits are; this block waits for no counter any more
    DEVICE u64* assigned(int s) const { return empty(STAGES) + s; }
    DEVICE u64* listed() const { return assigned(STAGES); }
    DEVICE u64* passed() const { return listed() + 1; }
    // a buffer of sums is full; it is read
    DEVICE u64* summed(int b) const { return passed() + 1 + b; }
    DEVICE u64* taken(int b) const { return passed() + 3 + b; }
    // of a buffer the unit whose sums it has
    DEVICE int* summed_unit(int b) const { return reinterpret_cast<int*>(passed() + 5) + b; }
    // of a stage the unit that it belongs to, or one of
    DEVICE int* unit(int s) const { return summed_unit(2) + s; }
};
constexpr int SECOND_GEMM = -1;

// The stage of the ring that comes next to a warp.
struct Turn {
    int stage = 0, phase = 0;
    DEVICE void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

DEVICE int output_rows() { return min(ROWS, H - static_cast<int>(blockIdx.x) * ROWS); }

// --- Routing ---

DEVICE void clear_tables(const Shared& s) {
    u32* weights = reinterpret_cast<u32*>(s.weights());
    for (int n = threadIdx.x; n < HITS * TOKENS; n += blockDim.x) weights[n] = ABSENT;
    for (int n = threadIdx.x; n < up_to(EXPERTS, 32); n += blockDim.x) s.ranks()[n] = 0;
}

// What every block reads and L2 has long forgotten: memory is a microsecond away.
DEVICE void prefetch_tables(const Problem& p) {
    int byte = threadIdx.x * 128;
    if (HAS_MAP && byte < NUM_IDS * 4) prefetch(reinterpret_cast<const u8*>(p.expert_map) + byte);
    if (FORMAT != NVFP4) return;
    if (byte < EXPERTS * 8) prefetch(reinterpret_cast<const u8*>(p.w13_global) + byte);
    if (byte < EXPERTS * 4) prefetch(reinterpret_cast<const u8*>(p.w2_global) + byte);
}

DEVICE int valid_id(const Problem& p, int slot) {
    long long id = IDS64 ? static_cast<const long long*>(p.ids)[slot] : static_cast<const int*>(p.ids)[slot];
    return id >= 0 && id < NUM_IDS ? static_cast<int>(id) : -1;
}

// Numbers the experts that are hit in ascending order, and returns how many there are.
DEVICE int list_hits(const Shared& s, int lane) {
    constexpr int WORDS_OF_32 = ceil_div(EXPERTS, 32);
    u32 mine = 0;  // the hits among experts 32 lane..
#pragma unroll 16
    for (int i = 0; i < WORDS_OF_32; ++i) {
        u32 word = __ballot_sync(0xFFFFFFFF, s.ranks()[i * 32 + lane] != 0);
        if (lane == i) mine = word;
    }
    int before = __popc(mine);
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
        int other = __shfl_sync(0xFFFFFFFF, before, (lane - apart) & 31);
        if (lane >= apart) before += other;
    }
    int count = __shfl_sync(0xFFFFFFFF, before, 31);
    before -= __popc(mine);
#pragma unroll 16
    for (int i = 0; i < WORDS_OF_32; ++i) {
        u32 word = __shfl_sync(0xFFFFFFFF, mine, i);
        int rank = __shfl_sync(0xFFFFFFFF, before, i) + __popc(word & ((1u << lane) - 1));
        if (word >> lane & 1) {
            s.ranks()[i * 32 + lane] = rank;
            s.hit_experts()[rank] = i * 32 + lane;
        }
    }
    return count;
}

// The whole map comes together with the ids: looking ids up in memory would be one more trip there.
DEVICE void bring_map(const Shared& s, const Problem& p, int lane) {
    constexpr int ROUNDS = ceil_div(NUM_IDS, 32);
    int expert[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) expert[i] = i * 32 + lane < NUM_IDS ? p.expert_map[i * 32 + lane] : -1;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) s.map()[i * 32 + lane] = expert[i];
}

// By the leading producer: which experts are hit; returns how many.
DEVICE int route(const Shared& s, const Problem& p, int lane) {
    constexpr int ROUNDS = ceil_div(SLOTS, 32);
    int slots = p.tokens * TOP_K, expert[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) expert[i] = i * 32 + lane < slots ? valid_id(p, i * 32 + lane) : -1;
    if (HAS_MAP) {
        bring_map(s, p, lane);
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i)
        if (HAS_MAP && expert[i] >= 0) expert[i] = s.map()[expert[i]];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        int slot = i * 32 + lane;
        bool here = expert[i] >= 0 && expert[i] < EXPERTS;
        if (slot < slots) s.slot_experts()[slot] = here ? expert[i] : -1;
        if (here) s.ranks()[expert[i]] = 1;
    }
    __syncwarp();
    int hits = list_hits(s, lane);
    if (lane == 0) *s.hits() = hits;
    __syncwarp();
    if (lane == 0) barrier_arrive(s.listed());
    return hits;
}

// By the consumers, once the hits are listed: the weights of (hit, token). The first of a token's
// slots that names an expert takes the others' weights along.
DEVICE void note_weights(const Shared& s, const Problem& p) {
    for (int slot = threadIdx.x; slot < p.tokens * TOP_K; slot += CONSUMERS * 32) {
        int token = slot / TOP_K, k = slot % TOP_K;
        const int* experts = s.slot_experts() + token * TOP_K;
        int expert = experts[k];
        if (expert < 0) continue;
        float weight = p.topk_weights[slot];
        bool first = true;
#pragma unroll
        for (int other = 0; other < TOP_K; ++other) {
            if (other == k || experts[other] != expert) continue;
            first = first && other > k;
            weight += p.topk_weights[token * TOP_K + other];
        }
        if (first) s.weights()[s.ranks()[expert] * TOKENS + token] = WEIGHT_ON_INPUT ? 1.0f : weight;
    }
}

// By the consumers, likewise: the decoder owes 2**8 to the global scales.
DEVICE void note_factors(const Shared& s, const Problem& p) {
    for (int hit = threadIdx.x; hit < *s.hits(); hit += CONSUMERS * 32) {
        int expert = s.hit_experts()[hit];
        float gate = p.w13_global[2 * expert], up = p.w13_global[2 * expert + 1], down = p.w2_global[expert];
        s.factors()[hit] = make_float4(gate * 256.0f, up * 256.0f, down * 256.0f, 0.0f);
    }
}

// --- The producer ---

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
        const u8* from = p.w13 + at * ROW1 + chunk * CHUNK_BYTES;
        u8* to = s.stage(turn.stage) + row * STRIDE1;
        if (FORMAT == NVFP4 && lane >= 16) {
            from = p.w13_scale + (at * ROW1 + chunk * CHUNK_BYTES) / 8;
            to = scales + row * SCALE_STRIDE1;
        }
        bool copies = lane < 16 || (FORMAT == NVFP4 && (CHUNKS > 1 || row % 8 == 0));
        int copied = lane < 16 ? bytes : CHUNKS > 1 ? bytes / 8 : bytes;
        if (row % me.parts == me.part && copies) copy_bulk(to, from, copied, full);
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
    for (int n = me.lane * me.parts + me.part; n < pieces * (WHOLE ? 1 : ROWS); n += 32 * me.parts) {
        int piece = WHOLE ? n : n / ROWS, row = WHOLE ? 0 : n % ROWS, copied = WHOLE ? rows * bytes : bytes;
        if (row >= rows) continue;
        long long at = (static_cast<long long>(s.hit_experts()[hit + piece]) * H + first + row) * ROW2 + from;
        copy_bulk(s.stage(turn.stage) + piece * PIECE + row * STRIDE2, p.w2 + at, copied, full);
        if (FORMAT == NVFP4 && SLICES == 1 && row == 0)
            copy_bulk(s.stage_scales(turn.stage) + piece * PIECE_SCALES, p.w2_scale + at / 8, rows * (ROW2 / 8), full);
        if (FORMAT == NVFP4 && SLICES > 1)
            copy_bulk(s.stage_scales(turn.stage) + piece * PIECE_SCALES + row * SCALE_STRIDE2,
                      p.w2_scale + at / 8, copied / 8, full);
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
DEVICE void leave_counters(const Shared& s, const Problem& p) {
    barrier_wait(s.passed(), 0);
    if (add_release(p.exited, 1) != static_cast<int>(gridDim.x) - 1) return;
    *p.ticket = 0;
    *p.done = 0;
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
    int hits = route(s, p, me.lane), units = hits * UNITS;
    Turn turn;
    int unit = blockIdx.x;
    while (unit < units) {
        int claimed = me.lane == 0 ? add_relaxed(p.ticket, 1) : 0;
        bring_unit(s, p, turn, unit, me);
        unit = gridDim.x + __shfl_sync(0xFFFFFFFF, claimed, 0);
    }
    bring_all_rows(s, p, turn, hits, me);
    if (me.lane == 0) leave_counters(s, p);
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

// --- Tokens ---

DEVICE uint4 times(const uint4& v, float f) {
    return make_uint4(
        to_bf16(low_bf16(v.x) * f, high_bf16(v.x) * f), to_bf16(low_bf16(v.y) * f, high_bf16(v.y) * f),
        to_bf16(low_bf16(v.z) * f, high_bf16(v.z) * f), to_bf16(low_bf16(v.w) * f, high_bf16(v.w) * f));
}

// Columns 0..7 in the order in which the decoder of weights yields them: NVFP4's 0 4 1 5 2 6 3 7, FP8's
// 0 2 1 3 4 6 5 7.
DEVICE u32 low_halves(u32 a, u32 b) { return (a & 0xFFFF) | b << 16; }
DEVICE u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xFFFF0000); }
DEVICE uint4 in_order(const uint4& v) {
    if (FORMAT == NVFP4)
        return make_uint4(low_halves(v.x, v.z), high_halves(v.x, v.z), low_halves(v.y, v.w), high_halves(v.y, v.w));
    if (FORMAT == FP8)
        return make_uint4(low_halves(v.x, v.y), high_halves(v.x, v.y), low_halves(v.z, v.w), high_halves(v.z, v.w));
    return v;
}

// Where the eight columns from this one on lie: so that four lanes read 64 bytes side by side of the columns
// whose weights they have, 32 columns each of 128 (NVFP4) or 16 of 64 (FP8, but in NARROW rows eight of 32).
DEVICE int place_of(int column, bool narrow) {
    if (FORMAT == NVFP4) return column / 128 * 128 + column / 8 % 4 * 32 + column / 32 % 4 * 8;
    if (FORMAT == FP8 && !narrow) return column / 64 * 64 + column / 8 % 2 * 32 + column / 16 % 4 * 8;
    return column;
}

// All tokens as the first GEMM wants them; several loads of a lane are on their way at a time.
DEVICE void bring_tokens(const Shared& s, const Problem& p, int warp, int lane) {
    constexpr int PARTS = ceil_div(H, 256), BATCH = 8;
    int jobs = p.tokens * PARTS;
    for (int first = warp; first < jobs; first += BATCH * CONSUMERS) {
        uint4 v[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            int job = first + b * CONSUMERS, token = job / PARTS, column = job % PARTS * 256 + lane * 8;
            const uint4* from = reinterpret_cast<const uint4*>(p.x) + (token * H + column) / 8;
            v[b] = job < jobs && column < H ? *from : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            int job = first + b * CONSUMERS, token = job / PARTS, column = job % PARTS * 256 + lane * 8;
            if (job >= jobs || column >= H) continue;
            if (WEIGHT_ON_INPUT) v[b] = times(v[b], p.topk_weights[token]);
            u8* to = s.tokens() + token * TOKEN_STRIDE + 2 * place_of(column, false);
            *reinterpret_cast<uint4*>(to) = in_order(v[b]);
        }
    }
}

// --- Products ---

typedef float Sums[TOKEN_BLOCKS][CHAINS][4];  // of 16 rows and all tokens, as an MMA leaves them
typedef u32 Operand[TOKEN_BLOCKS][WORDS];     // tokens, as MMAs take them

DEVICE void put(u32 (&words)[WORDS], int i, const uint4& v) {
    words[4 * i] = v.x;
    words[4 * i + 1] = v.y;
    words[4 * i + 2] = v.z;
    words[4 * i + 3] = v.w;
}

DEVICE void clear(Sums& d) {
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
#pragma unroll
        for (int c = 0; c < CHAINS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) d[n][c][i] = 0.0f;
}

DEVICE float total(const float (&d)[CHAINS][4], int i) {
    return CHAINS == 1 ? d[0][i] : d[0][i] + d[CHAINS - 1][i];
}

// The MMA number `index` of a granule, for all tokens.
DEVICE void multiply_words(Sums& d, u32 a0, u32 a1, u32 a2, u32 a3, const Operand& b, int index) {
    u32 a[4] = {a0, a1, a2, a3};
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
        mma_bf16(d[n][index % CHAINS], a, b[n][2 * index], b[n][2 * index + 1]);
}

// Two e4m3 block scales as bf16 times 2**118: their bits four to the left are bf16 times 2**-120.
DEVICE u32 decode_scales(u32 two) {
    u32 spread = ((two | two << 8) & 0x00FF00FF) << 4;
    return multiply_bf16(multiply_bf16(spread, 0x7B007B00), 0x7B007B00);
}

// Eight e2m1 codes as bf16 times a scale. A product puts a code's sign at bit 15 and its other bits at
// 6..8 of a bf16, where they read as its magnitude times 2**-126. Multiplied, not shifted: shifts and
// logic share a pipe, which is what bounds the decoder. The caller owes 2**8.
DEVICE void decode(u32 (&pairs)[4], u32 word, u32 scale) {
    u32 high = word >> 8;
    pairs[0] = multiply_bf16((word & 0x000F000F) * 0x1040 & 0x81C081C0, scale);
    pairs[1] = multiply_bf16((word & 0x00F000F0) * 0x104 & 0x81C081C0, scale);
    pairs[2] = multiply_bf16((high & 0x000F000F) * 0x1040 & 0x81C081C0, scale);
    pairs[3] = multiply_bf16((high & 0x00F000F0) * 0x104 & 0x81C081C0, scale);
}

DEVICE void multiply_nvfp4(Sums& d, const u8* a, const u8* a8, const u8* scales, const u8* scales8,
                           const Operand& b) {
    uint4 low = read<uint4>(a), high = read<uint4>(a8);
    const u32 words[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
    u32 scale[2] = {decode_scales(read<u16>(scales)), decode_scales(read<u16>(scales8))};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 pairs[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 both =
                i < 2 ? (scale[r] & 0xFFFF) | scale[r] << 16 : scale[r] >> 16 | (scale[r] & 0xFFFF0000);
            decode(pairs[r], words[r][i], both);
        }
        multiply_words(d, pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b, 2 * i);
        multiply_words(d, pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b, 2 * i + 1);
    }
}

// Four e4m3 codes as bf16: 0 and 2, then 1 and 3. A code's bits four to the left (or right) are its bf16 times
// 2**-120, subnormal or not. (The conversion instruction has an eighth of the rate of these.)
DEVICE void decode_fp8(u32 (&pairs)[2], u32 word) {
    const u32 up = 0x7B807B80;  // 2**120, twice
    pairs[0] = multiply_bf16((word & 0x007F007F) * 16 + (word & 0x00800080) * 256, up);
    pairs[1] = multiply_bf16((word & 0x7F007F00) >> 4 | (word & 0x80008000), up);
}

DEVICE void multiply_fp8(Sums& d, u32 word, u32 word8, const Operand& b, int index) {
    u32 pairs[2], pairs8[2];
    decode_fp8(pairs, word);
    decode_fp8(pairs8, word8);
    multiply_words(d, pairs[0], pairs8[0], pairs[1], pairs8[1], b, index);
}

// d += a b over a granule, of which `columns` exist. `a` and `a8`: this lane's bytes of rows g and g+8;
// `scales`: of NVFP4, likewise.
template <bool ALL>
DEVICE void multiply(Sums& d, const u8* a, const u8* a8, const u8* scales, const u8* scales8,
                     const Operand& b, int columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (FORMAT == NVFP4) {
            if (half == 0) multiply_nvfp4(d, a, a8, scales, scales8, b);
            continue;
        }
        if (!ALL && half * (GRANULE / 2) >= columns) break;
        uint4 low = read<uint4>(a + half * 64), high = read<uint4>(a8 + half * 64);
        if (FORMAT == FP8) {
            multiply_fp8(d, low.x, high.x, b, 4 * half);
            multiply_fp8(d, low.y, high.y, b, 4 * half + 1);
            multiply_fp8(d, low.z, high.z, b, 4 * half + 2);
            multiply_fp8(d, low.w, high.w, b, 4 * half + 3);
            continue;
        }
        multiply_words(d, low.x, high.x, low.y, high.y, b, 2 * half);
        multiply_words(d, low.z, high.z, low.w, high.w, b, 2 * half + 1);
    }
}

// Sums of rows g and g+8 times their scales.
DEVICE void add_scaled(Sums& sums, const Sums& d, float scale, float scale8) {
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
        sums[n][0][0] += total(d[n], 0) * scale;
        sums[n][0][1] += total(d[n], 1) * scale;
        sums[n][0][2] += total(d[n], 2) * scale8;
        sums[n][0][3] += total(d[n], 3) * scale8;
    }
}

// A number of this lane's row g for each of tokens 2t and 2t+1, to all eight rows' bf16 of one of the
// tokens: of 2t where the BIT of g is 0, else of 2t+1. BIT 1 keeps the order, 2 pairs rows p and p+2, 4 rows
// p and p+4, as `in_order` does.
template <int BIT> DEVICE uint4 gather_rows(float first, float second, int lane) {
    bool odd = (lane / 4 & BIT) != 0;
    float other = __shfl_xor_sync(0xFFFFFFFF, odd ? first : second, 4 * BIT);
    u32 word = odd ? to_bf16(other, second) : to_bf16(first, other), words[4];
    int source = lane % 4 + (odd ? 4 * BIT : 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(0xFFFFFFFF, word, source + 4 * (BIT == 1 ? 2 * i : BIT == 2 ? i + i / 2 * 2 : i));
    return make_uint4(words[0], words[1], words[2], words[3]);
}
// Which token of eight that is, or -1 in lanes whose result another one has too.
template <int BIT> DEVICE int gathered_token(int lane) {
    int g = lane / 4;
    return (g & (7 ^ BIT)) != 0 ? -1 : lane % 4 * 2 + (g & BIT ? 1 : 0);
}

// --- First GEMM ---

DEVICE void multiply_granule(Sums& sums, const Shared& s, const Turn& turn, int granule, int local,
                             int lane) {
    int g = lane / 4, t = lane % 4;
    const u8* a = s.stage(turn.stage) + g * STRIDE1 + local * GRANULE_BYTES + t * 16;
    Operand b;
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
        const u8* from = s.tokens() + (n * 8 + g) * TOKEN_STRIDE + granule * (WORDS * 16) + t * 16;
#pragma unroll
        for (int i = 0; i < WORDS / 4; ++i) {
            uint4 v = read<uint4>(from + i * 64);
            put(b[n], i, v);
        }
    }
    constexpr bool ALL = H % GRANULE == 0;
    if (FORMAT == FP8) {
        Sums d;
        clear(d);
        multiply<ALL>(d, a, a + 8 * STRIDE1, a, a, b, H - granule * GRANULE);
        const float* scales = reinterpret_cast<const float*>(s.stage_scales(turn.stage)) + local;
        add_scaled(sums, d, scales[0], scales[CHUNK_GRANULES]);
    } else {
        const u8* scales = s.stage_scales(turn.stage) + g * SCALE_STRIDE1 + local * 8 + t * 2;
        multiply<ALL>(sums, a, a + 8 * STRIDE1, scales, scales + 8 * SCALE_STRIDE1, b, H - granule * GRANULE);
    }
}

DEVICE void release_stage(const Shared& s, Turn& turn, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(s.empty(turn.stage));
    turn.next();
}

DEVICE float4 sum_of_warps(const float4* sums, int stride) {
    float4 sum = sums[0];
#pragma unroll
    for (int w = 1; w < CONSUMERS; ++w) {
        float4 v = sums[w * stride];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}

DEVICE void store_hidden(const Shared& s, const Problem& p, const float4* sums, int unit, int lane) {
    constexpr int BIT = FORMAT == NVFP4 ? 4 : FORMAT == FP8 ? 2 : 1;
    int hit = unit / UNITS, column = unit % UNITS * 8, t = lane % 4;
    float4 factors = FORMAT == NVFP4 ? s.factors()[hit] : make_float4(1.0f, 1.0f, 1.0f, 0.0f);
    const float* weights = s.weights() + hit * TOKENS;
    int at = place_of(column, NARROW);
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
        float4 v = sum_of_warps(sums + n * 32 + lane, TOKEN_BLOCKS * 32);
        float2 weight = read<float2>(weights + n * 8 + 2 * t);
        float first = activate<ACTIVATION>(v.x * factors.x, v.z * factors.y, p.limit, p.alpha, p.beta);
        float second = activate<ACTIVATION>(v.y * factors.x, v.w * factors.y, p.limit, p.alpha, p.beta);
        uint4 eight = gather_rows<BIT>(first * (factors.z * weight.x), second * (factors.z * weight.y), lane);
        int token = gathered_token<BIT>(lane);
        if (token < 0) continue;
        token += n * 8;
        if (__float_as_uint(weights[token]) == ABSENT) continue;
        *reinterpret_cast<uint4*>(p.hidden + static_cast<long long>(hit * p.tokens + token) * I + at) = eight;
    }
    __syncwarp();
    if (lane == 0) add_release(p.done, 1);
}

DEVICE void tell_clerk(const Shared& s, int which, int unit, int warp, int lane) {
    __syncwarp();
    if (lane != 0) return;
    if (warp == 0) *s.summed_unit(which) = unit;
    barrier_arrive(s.summed(which));
}

// The unit whose first stage is there; `count` of them came before.
DEVICE void first_gemm(const Shared& s, const Problem& p, Turn& turn, int unit, int count, int warp,
                       int lane) {
    Sums sums;
    clear(sums);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (chunk > 0) barrier_wait(s.full(turn.stage), turn.phase);
        int first = chunk * CHUNK_GRANULES, local = (warp - first) & (CONSUMERS - 1);
#pragma unroll
        for (int i = 0; i < ceil_div(CHUNK_GRANULES, CONSUMERS); ++i, local += CONSUMERS)
            if (EVEN || (local < CHUNK_GRANULES && first + local < GRANULES1))
                multiply_granule(sums, s, turn, first + local, local, lane);
        release_stage(s, turn, lane);
    }
    int to = count % CLERKS;
    barrier_wait(s.taken(to), count / CLERKS & 1 ^ 1);
    float4* buffer = s.sums() + to * SUMS;
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
        buffer[(warp * TOKEN_BLOCKS + n) * 32 + lane] =
            make_float4(total(sums[n], 0), total(sums[n], 1), total(sums[n], 2), total(sums[n], 3));
    tell_clerk(s, to, unit, warp, lane);
}

// No more units.
DEVICE void dismiss_clerks(const Shared& s, int count, int warp, int lane) {
#pragma unroll 1
    for (int last = count + CLERKS; count < last; ++count) {
        barrier_wait(s.taken(count % CLERKS), count / CLERKS & 1 ^ 1);
        tell_clerk(s, count % CLERKS, SECOND_GEMM, warp, lane);
    }
}

// A warp that stores hidden columns: it takes as long as reading a unit's weights, until they are where all
// blocks see them, and no warp that multiplies can wait for that.
DEVICE void keep_books(const Shared& s, const Problem& p, int which, int lane) {
    for (int phase = 0;; phase ^= 1) {
        barrier_wait(s.summed(which), phase);
        int unit = *s.summed_unit(which);
        if (unit == SECOND_GEMM) return;
        store_hidden(s, p, s.sums() + which * SUMS, unit, lane);
        if (lane == 0) barrier_arrive(s.taken(which));
    }
}

// --- Second GEMM ---

typedef uint4 Columns[TOKEN_BLOCKS][LOADS];  // a lane's bf16 hidden columns of an item

// Item: granule item % GRANULES2 of hit item / GRANULES2.
DEVICE void load_hidden(Columns& v, const Shared& s, const Problem& p, int item, int lane) {
    int hit = item / GRANULES2, first = item % GRANULES2 * GRANULE, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
        int token = n * 8 + g;
        bool present = __float_as_uint(s.weights()[hit * TOKENS + token]) != ABSENT;
        const u16* row = p.hidden + static_cast<long long>(hit * p.tokens + token) * I;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) v[n][i] = make_uint4(0, 0, 0, 0);
        if (!present) continue;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int column = first + i * 32 + t * 8;
            if (I % GRANULE == 0 || column < I)
                v[n][i] = load_written(reinterpret_cast<const uint4*>(row + column));
        }
    }
}

DEVICE void to_operand(Operand& b, const Columns& v) {
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
#pragma unroll
        for (int i = 0; i < LOADS; ++i) put(b[n], i, v[n][i]);
}

// A granule of fp8 rows of which each 32 columns have their own scale.
DEVICE void multiply_narrow(Sums& sums, const u8* a, const float* scales, const Operand& b, int columns) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (I % 128 != 0 && i * 32 >= columns) break;
        Sums d;
        clear(d);
        uint2 low = read<uint2>(a + i * 32), high = read<uint2>(a + 8 * STRIDE2 + i * 32);
        multiply_fp8(d, low.x, high.x, b, 2 * i);
        multiply_fp8(d, low.y, high.y, b, 2 * i + 1);
        add_scaled(sums, d, scales[i], scales[i]);
    }
}

// An item, `local` granules into its stage, for all rows of this block.
DEVICE void multiply_item(Sums (&sums)[ROW_GROUPS], const Shared& s, const Turn& turn, int item, int local,
                          const Operand& b, int lane) {
    constexpr bool ALL = I % GRANULE == 0;
    int g = lane / 4, t = lane % 4;
    int piece = SLICES > 1 ? 0 : local / GRANULES2, granule = SLICES > 1 ? local : local % GRANULES2;
    int columns = I - item % GRANULES2 * GRANULE;
    const u8* data = s.stage(turn.stage) + piece * PIECE + granule * GRANULE_BYTES + g * STRIDE2;
    const u8* scales = s.stage_scales(turn.stage) + piece * PIECE_SCALES;
#pragma unroll
    for (int r = 0; r < ROW_GROUPS; ++r) {
        const u8* a = data + r * 16 * STRIDE2 + t * (NARROW ? 8 : 16);
        const float* scale = reinterpret_cast<const float*>(scales) + r * SUBS + granule * (GRANULE / SUB);
        const u8* block_scales = scales + (r * 16 + g) * SCALE_STRIDE2 + granule * 8 + t * 2;
        if (NARROW) {
            multiply_narrow(sums[r], a, scale, b, columns);
        } else if (FORMAT == FP8) {
            Sums d;
            clear(d);
            multiply<ALL>(d, a, a + 8 * STRIDE2, a, a, b, columns);
            add_scaled(sums[r], d, *scale, *scale);
        } else {
            multiply<ALL>(sums[r], a, a + 8 * STRIDE2, block_scales, block_scales + 8 * SCALE_STRIDE2, b,
                          columns);
        }
    }
}

// The item after those of the stage that begins with `first`.
DEVICE int end_of_stage(int first, int items) {
    if (SLICES == 1) return min(first + PIECES * GRANULES2, items);
    return first + min(SLICE_GRANULES, GRANULES2 - first % GRANULES2);
}

// Sums over the hits, from the first stage on, which is there.
DEVICE void second_gemm(Sums (&sums)[ROW_GROUPS], const Shared& s, const Problem& p, Turn& turn, int hits,
                        int warp, int lane) {
    int items = hits * GRANULES2, first = 0, last = end_of_stage(0, items);
    Columns columns;
    if (warp < items) load_hidden(columns, s, p, warp, lane);
    for (int item = warp; item < items; item += CONSUMERS) {
        Operand b;
        to_operand(b, columns);
        if (item + CONSUMERS < items) load_hidden(columns, s, p, item + CONSUMERS, lane);
        while (item >= last) {
            release_stage(s, turn, lane);
            first = last;
            last = end_of_stage(first, items);
            barrier_wait(s.full(turn.stage), turn.phase);
        }
        multiply_item(sums, s, turn, item, item - first, b, lane);
    }
    while (last < items) {
        release_stage(s, turn, lane);
        last = end_of_stage(last, items);
        barrier_wait(s.full(turn.stage), turn.phase);
    }
}

// Sums over the warps to the output; what the ring held is used up.
DEVICE void store_output(const Sums (&sums)[ROW_GROUPS], const Shared& s, const Problem& p, int warp,
                         int lane) {
    float4* buffer = reinterpret_cast<float4*>(s.ring);
    named_sync(1, CONSUMERS * 32);
#pragma unroll
    for (int r = 0; r < ROW_GROUPS; ++r)
#pragma unroll
        for (int n = 0; n < TOKEN_BLOCKS; ++n)
            buffer[((warp * ROW_GROUPS + r) * TOKEN_BLOCKS + n) * 32 + lane] = make_float4(
                total(sums[r][n], 0), total(sums[r][n], 1), total(sums[r][n], 2), total(sums[r][n], 3));
    named_sync(1, CONSUMERS * 32);
    for (int part = warp; part < ROW_GROUPS * TOKEN_BLOCKS; part += CONSUMERS) {
        int row = part / TOKEN_BLOCKS * 16;
        float4 v = sum_of_warps(buffer + part * 32 + lane, ROW_GROUPS * TOKEN_BLOCKS * 32);
        uint4 low = gather_rows<1>(v.x, v.y, lane), high = gather_rows<1>(v.z, v.w, lane);
        int token = gathered_token<1>(lane) + part % TOKEN_BLOCKS * 8;
        if (lane >= 8 || token >= p.tokens || row >= output_rows()) continue;
        uint4* to =
            reinterpret_cast<uint4*>(p.out + static_cast<long long>(token) * H + blockIdx.x * ROWS + row);
        to[0] = low;
        to[1] = high;
    }
}

// Until all hidden columns are written.
DEVICE void wait_for_hidden(const Shared& s, const Problem& p, int hits) {
    if (threadIdx.x == 0) {
        wait_until_at_least(p.done, hits * UNITS);
        barrier_arrive(s.passed());
    }
    named_sync(1, CONSUMERS * 32);
}

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
    int hits = *s.hits();
    wait_for_hidden(s, p, hits);
    if (output_rows() <= 0) return;
    Sums sums[ROW_GROUPS];
#pragma unroll
    for (int r = 0; r < ROW_GROUPS; ++r) clear(sums[r]);
    second_gemm(sums, s, p, turn, hits, warp, lane);
    store_output(sums, s, p, warp, lane);
}

// x, out: bf16 [tokens, H]. ids: [tokens, TOP_K]. topk_weights: fp32, likewise. expert_map: int32
// [NUM_IDS]. w13_scale, w2_scale: fp32 (fp8) or e4m3 (nvfp4). w13_global: [EXPERTS, 2], w2_global:
// [EXPERTS]. hidden: bf16 [HITS * TOKENS, I] for the launch's own use. counters: three ints, zero
// before and after, 128 bytes apart.
KERNEL void __launch_bounds__(MOST_THREADS, 1)
    moe_once(const u8* x, const void* ids, const int* expert_map, const float* topk_weights, const u8* w13,
             const u8* w13_scale, const float* w13_global, const u8* w2, const u8* w2_scale,
             const float* w2_global, u16* hidden, u16* out, int* counters, int tokens, float limit,
             float alpha, float beta) {
    SHARED_MEMORY(memory);
    Shared s{memory};
    Problem p{x,        ids,       expert_map, topk_weights, w13,      w13_scale,     w13_global,    w2,
              w2_scale, w2_global, hidden,     out,          counters, counters + 32, counters + 64, tokens,
              limit,    alpha,     beta};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, producers = blockDim.x / 32 - CONSUMERS - CLERKS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(s.full(i), producers + (FORMAT == FP8 ? 32 : 0));
            barrier_init(s.assigned(i), 1);
            barrier_init(s.empty(i), CONSUMERS);
        }
        barrier_init(s.listed(), 1);
        barrier_init(s.passed(), 1);
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
        lead(s, p, {0, producers, lane});
    else
        help(s, p, {other - CLERKS, producers, lane});
}
