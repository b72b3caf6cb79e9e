// once.cu: hidden columns, by the warps that multiply and by the clerks.
#pragma once

#include "once_products.cuh"
#include "once_shared.cuh"
#include "once_tokens.cuh"

// A granule of a unit, `local` granules into its stage.
DEVICE void multiply_granule(Sums& sums, const Shared& s, const Turn& turn, int granule, int local,
                             int lane) {
    int g = lane / 4, t = lane % 4;
    const u8* a = s.stage(turn.stage) + g * STRIDE1 + local * GRANULE_BYTES + t * 16;
    Operand b;
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
        const u8* from = s.tokens() + (n * 8 + g) * TOKEN_STRIDE + granule * (2 * GRANULE) + t * 16;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) put(b[n], i, read<uint4>(from + i * 64));
    }
    constexpr bool ALL = H % GRANULE == 0;
    if (FORMAT == FP8) {
        Sums d;
        clear(d);
        multiply<ALL>(d, a, a + 8 * STRIDE1, a, b, H - granule * GRANULE);
        const float* scales = reinterpret_cast<const float*>(s.stage_scales(turn.stage)) + local;
        add_scaled(sums, d, scales[0], scales[CHUNK_GRANULES]);
    } else {
        const u8* scales = s.stage_scales(turn.stage) + place_of_scales(local, lane);
        multiply<ALL>(sums, a, a + 8 * STRIDE1, scales, b, H - granule * GRANULE);
    }
}

// A unit's hidden columns from all warps' sums, which may be overwritten as soon as they are read.
DEVICE void store_hidden(const Shared& s, const Problem& p, int unit, u64* taken, int lane) {
    float4 sums[TOKEN_BLOCKS];
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
        sums[n] = sum_of_warps(s.sums() + n * 32 + lane, TOKEN_BLOCKS * 32);
    __syncwarp();
    if (lane == 0) barrier_arrive(taken);
    constexpr int BIT = FORMAT == NVFP4 ? 4 : FORMAT == FP8 ? 2 : 1;
    int hit = unit / UNITS, column = unit % UNITS * 8, t = lane % 4;
    float4 factors = FORMAT == NVFP4 ? s.factors()[hit] : make_float4(1.0f, 1.0f, 1.0f, 0.0f);
    const float* weights = s.weights() + hit * TOKENS;
    int at = place_of(column, NARROW);
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
        const float4& v = sums[n];
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
    if (lane == 0) add_release(p.done + Groups(*s.hits()).of(hit), 1);
}

// By each warp that multiplies, once its sums are there.
DEVICE void tell_clerk(const Shared& s, int which, int unit, int warp, int lane) {
    __syncwarp();
    if (lane != 0) return;
    if (warp == 0) *s.summed_unit(which) = unit;
    barrier_arrive(s.summed(which));
}

// Until the sums of the last of so many units are read.
DEVICE void wait_for_clerk(const Shared& s, int units) {
    int last = units - 1;
    if (units > 0) barrier_wait(s.taken(last % CLERKS), last / CLERKS & 1);
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
    wait_for_clerk(s, count);
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n)
        s.sums()[(warp * TOKEN_BLOCKS + n) * 32 + lane] = whole(sums[n]);
    tell_clerk(s, count % CLERKS, unit, warp, lane);
}

// No more units. The clerk that has been idle for longer is to watch.
DEVICE void dismiss_clerks(const Shared& s, int count, int warp, int lane) {
    wait_for_clerk(s, count);
    tell_clerk(s, count % CLERKS, WATCH, warp, lane);
    tell_clerk(s, (count + 1) % CLERKS, SECOND_GEMM, warp, lane);
}

// Tells this block which groups of hits have all their hidden columns: a lane looks after each.
DEVICE void watch(const Shared& s, const Problem& p, int lane) {
    Groups groups(*s.hits());
    bool waits = lane < groups.count();
    for (int finished = 0; finished < groups.count();) {
        if (waits && load_acquire(p.done + lane) >= groups.units(lane)) waits = false;
        u32 waited = __ballot_sync(0xFFFFFFFF, waits);
        int now = waited == 0 ? groups.count() : __ffs(static_cast<int>(waited)) - 1;
        if (now == finished) continue;
        finished = now;
        __syncwarp();  // what other lanes have seen comes before what lane 0 says (a ballot is no fence)
        if (lane == 0) store_shared(s.finished(), now);
    }
}

// What a clerk does.
DEVICE void keep_books(const Shared& s, const Problem& p, int which, int lane) {
    for (int phase = 0;; phase ^= 1) {
        barrier_wait(s.summed(which), phase);
        int unit = *s.summed_unit(which);
        if (unit == WATCH) watch(s, p, lane);
        if (unit < 0) return;
        store_hidden(s, p, unit, s.taken(which), lane);
    }
}
