// Numbers of 8 and 16 bits, and the tensor cores: mma of a warp, wgmma of four.
#pragma once

#include "host.h"

template <int N> void take_registers() { static_assert(N % 8 == 0 && N >= 24 && N <= 256); }
template <int N> void leave_registers() { static_assert(N % 8 == 0 && N >= 24 && N <= 256); }
inline void compute_here(int&) {}

namespace host {

inline float from_bf16(u32 code) { return __uint_as_float(code << 16); }
inline u32 round_bf16(float x) {
    if (x != x) return 0x7FFF;
    u32 bits = __float_as_uint(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline u32 round_fp8(float x) {
    if (x != x) return 0x7F;
    u32 bits = __float_as_uint(fabsf(x)), sign = __float_as_uint(x) >> 24 & 0x80;
    if (bits < __float_as_uint(0.015625f)) return sign | static_cast<u32>(rintf(fabsf(x) * 512.0f));
    // Three mantissa bits, and an exponent with bias 7 instead of 127.
    u32 code = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return sign | min(code, 0x7Eu);
}
struct Fp8Values {
    float of[256];
    Fp8Values() {
        for (int code = 0; code < 256; code++) {
            int exponent = code >> 3 & 15, mantissa = code & 7;
            float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
            if ((code & 0x7F) == 0x7F) size = NAN;
            of[code] = code & 0x80 ? -size : size;
        }
    }
};
inline const Fp8Values fp8;

typedef float Eight __attribute__((vector_size(32)));

// d[rows][8 columns] += a[rows][DEPTH] b[DEPTH]
template <int DEPTH> void multiply(Eight* d, const float (*a)[DEPTH], const Eight* b, int rows) {
    for (int row = 0; row < rows; row++) {
        Eight sum = d[row];
        for (int k = 0; k < DEPTH; k++) sum += a[row][k] * b[k];
        d[row] = sum;
    }
}

}  // namespace host

inline u32 to_fp8(float a, float b, float c, float d) {
    return host::round_fp8(a) | host::round_fp8(b) << 8 | host::round_fp8(c) << 16 | host::round_fp8(d) << 24;
}
inline u32 to_bf16(float a, float b) { return host::round_bf16(a) | host::round_bf16(b) << 16; }
inline float reciprocal(float x) { return 1.0f / x; }
inline float low_bf16(u32 pair) { return host::from_bf16(pair & 0xFFFF); }
inline float high_bf16(u32 pair) { return host::from_bf16(pair >> 16); }
inline u32 multiply_bf16(u32 a, u32 b) {
    return to_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b));
}

inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Lane {
        float* d;
        u32 a[4], b[2];
    } mine = {d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    host::meet_warp("mma_bf16", ~0u, mine, [](Lane** lanes) {
        float rows[16][16];
        host::Eight columns[16], sums[16];
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            const Lane& from = *lanes[lane];
            for (int i = 0; i < 2; i++) {
                int k = 2 * t + i;
                auto number = [=](u32 word) { return host::from_bf16(word >> 16 * i & 0xFFFF); };
                for (int j = 0; j < 4; j++) rows[g + j % 2 * 8][j / 2 * 8 + k] = number(from.a[j]);
                for (int j = 0; j < 2; j++) columns[j * 8 + k][g] = number(from.b[j]);
            }
            for (int j = 0; j < 4; j++) sums[g + j / 2 * 8][2 * t + j % 2] = from.d[j];
        }
        host::multiply<16>(sums, rows, columns, 16);
        for (int lane = 0; lane < 32; lane++)
            for (int j = 0; j < 4; j++)
                lanes[lane]->d[j] = sums[lane / 4 + j / 2 * 8][2 * (lane % 4) + j % 2];
    });
}

// Two 8x8 matrices, of whose columns lane i is given the place of the i-th.
inline void store_transposed(void* row, u32 first, u32 second) {
    struct Lane {
        u16* row;
        u32 words[2];
    } mine = {static_cast<u16*>(row), {first, second}};
    if (host::machine->current->lane() < 16) host::check_shared(row, 16, 16, "store_transposed");
    host::meet_warp("store_transposed", ~0u, mine, [](Lane** lanes) {
        for (int column = 0; column < 16; column++)
            for (int g = 0; g < 8; g++) {
                u32 word = lanes[4 * g + column % 8 / 2]->words[column / 8];
                lanes[column]->row[g] = word >> 16 * (column % 2) & 0xFFFF;
            }
    });
}

// --- wgmma: of tiles with rows of 128 bytes, swizzled by address, in atoms of eight rows: m64nNk32 of e4m3,
// m64nNk16 of bf16, also with the first operand in registers ---

namespace host {

// A warp's 16 rows of a product: shared memory is read when wgmma may read, at the latest at the warp's wait.
// A tile is its address and, in the upper half, the distance of its atoms.
template <int DEPTH, bool REGISTERS> void act(Warp& warp, Product& product) {
    product.done = true;
    const u8* shared = warp.block->shared - 1024;  // where shared_address is 0
    auto number = [=](u64 tile, int row, int column) {
        u64 at = (tile & 0xFFFFFFFF) + row / 8 * (tile >> 32) + row % 8 * 128 + column * 32 / DEPTH;
        at ^= (at >> 7 & 7) << 4;
        return DEPTH == 32 ? fp8.of[shared[at]] : from_bf16(*reinterpret_cast<const u16*>(shared + at));
    };
    float rows[16][DEPTH];
    for (int row = 0; row < 16; row++) {
        for (int k = 0; k < DEPTH; k++) {
            if (!REGISTERS) {
                rows[row][k] = number(product.a, warp.index % 4 * 16 + row, k);
            } else {
                u32 word = product.words[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8];
                rows[row][k] = from_bf16(word >> 16 * (k % 2) & 0xFFFF);
            }
        }
    }
    for (int j = 0; j < product.columns / 8; j++) {
        Eight columns[DEPTH], sums[16] = {};
        for (int k = 0; k < DEPTH; k++)
            for (int i = 0; i < 8; i++) columns[k][i] = number(product.b, 8 * j + i, k);
        auto each = [&](auto f) {
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < 4; i++)
                    f(product.d[lane][4 * j + i], sums[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2]);
        };
        if (product.accumulate) each([](float d, float& sum) { sum = d; });
        multiply<DEPTH>(sums, rows, columns, 16);
        each([](float& d, float sum) { d = sum; });
    }
}
inline void act(Warp& warp, Product& product) {
    if (product.registers) act<16, true>(warp, product);
    else if (product.bf16) act<16, false>(warp, product);
    else act<32, false>(warp, product);
}

inline void check_tile(u64 tile, int rows, const char* which) {
    Block& block = *machine->current->block;
    u64 from = tile & 0xFFFFFFFF, apart = tile >> 32, end = from / 128 * 128 + (rows / 8 - 1) * apart + 1024;
    if (from < 1024 || from % 128 > 96 || end > 1024 + static_cast<u64>(block.shared_bytes))
        fail(text("wgmma: %s, %d rows from shared address %llu, eights %llu apart", which, rows, from, apart));
}

}  // namespace host

inline u64 shared_matrix(const void* tile, int bytes_of_eight_rows = 1024) {
    host::check_shared(tile, 1024, 1024, "shared_matrix");
    if (bytes_of_eight_rows % 1024) host::fail("shared_matrix: eights of rows not at multiples of 1024");
    return shared_address(tile) | static_cast<u64>(bytes_of_eight_rows) << 32;
}
inline u64 matrix_on(u64 matrix, int times) { return matrix + 1024 * times; }
inline u64 columns_on(u64 matrix, int bytes) { return matrix + bytes; }

inline void wgmma_fence() { host::machine->current->fenced = true; }

namespace host {

// In the background: each warp's part happens at once or as late as its wait for it. Registers of the first operand
// are taken at once: that they are left alone until then is the compiler's task.
template <int N> void start_wgmma(float (&d)[N / 2], u64 a, const u32* words, u64 b, bool accumulate, bool bf16) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    Fiber& self = *machine->current;
    if (!self.fenced) fail("wgmma without wgmma_fence before it, since the last wgmma_wait");
    if (!words) check_tile(a, 64, "a");
    check_tile(b, N, "b");
    struct Mine {
        u64 a, b;
        const u32* words;
        bool accumulate;
        float* d;
    } mine = {a, b, words, accumulate, d};
    meet(self.block->meetings, "wgmma", self.thread / 128, 128, &mine, [&](Meeting& meeting) {
        Product products[4];
        for (Product& product : products) product = {N, a, b, accumulate, bf16, false, words != nullptr, -1, {}, {}};
        for (int i = 0; i < 128; i++) {
            Mine& other = *static_cast<Mine*>(meeting.brought[i]);
            int thread = meeting.fibers[i]->thread % 128;
            if (other.a != a || other.b != b || other.accumulate != accumulate || !other.words != !words)
                fail(text("wgmma: thread %d of the warp group has other operands", thread));
            Product& product = products[thread / 32];
            product.d[thread % 32] = other.d;
            if (words) memcpy(product.words[thread % 32], other.words, sizeof product.words[0]);
        }
        for (int w = 0; w < 4; w++) {
            Warp& warp = *(self.warp - self.warp->index % 4 + w);
            warp.products.push_back(products[w]);
            if (dice(4) >= machine->prompt) continue;
            for (Product& product : warp.products)
                if (!product.done) act(warp, product);
        }
    });
}

}  // namespace host

template <int N> void wgmma_fp8(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    host::start_wgmma<N>(d, a, nullptr, b, accumulate, false);
}
template <int N> void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
    host::start_wgmma<N>(d, 0, a, b, true, true);
}
template <int N> void wgmma_bf16(float (&d)[N / 2], u64 a, u64 b) {
    host::start_wgmma<N>(d, a, nullptr, b, true, true);
}
inline void wgmma_commit() {
    int none = 0;
    host::meet_warp("wgmma_commit", ~0u, none, [](int**) {
        host::Warp& warp = *host::machine->current->warp;
        for (host::Product& product : warp.products)
            if (product.batch < 0) product.batch = warp.batches;
        warp.batches++;
    });
}
template <int PENDING> void wgmma_wait() {
    int none = 0;
    host::meet_warp("wgmma_wait", ~0u, none, [](int**) {
        host::Warp& warp = *host::machine->current->warp;
        std::vector<host::Product> left;
        for (host::Product& product : warp.products) {
            if (product.batch < 0 || product.batch >= warp.batches - PENDING) left.push_back(product);
            else if (!product.done) host::act(warp, product);
        }
        warp.products = left;
    });
    host::machine->current->fenced = false;
}
template <int N> void wgmma_touch(float (&)[N]) {}
