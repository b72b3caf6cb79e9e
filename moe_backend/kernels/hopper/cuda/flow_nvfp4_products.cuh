// flow.cu: NVFP4: a warp group's products, of codes that become bf16 in registers.
//
// Of a row's 256 codes of a step thread t of four has 64 neighbours, eight words with the scales of four groups.
// Two words of a row and of the row eight further on are the first operands of four MMAs, a batch. While the tensor
// cores work on a batch the next is decoded, into other registers.
#pragma once

#include "flow_shared.cuh"
#include "nvfp4.cuh"
#include "wgmma.cuh"

typedef u32 Batch[4][4];  // of four MMAs: words of rows g and g + 8, twice

// Two MMAs' operands: of a word the pairs of even columns, and those of odd columns.
DEVICE void decode_word(Batch& batch, int i, u32 word, u32 word8, u32 scale, u32 scale8) {
    u32 pairs[4], pairs8[4];
    decode(pairs, word, scale);
    decode(pairs8, word8, scale8);
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
        u32(&a)[4] = batch[2 * i + odd];
        a[0] = pairs[odd], a[1] = pairs8[odd], a[2] = pairs[2 + odd], a[3] = pairs8[2 + odd];
    }
}

// The low or the high half of a pair of scales, twice. (`once_products.cuh` has it in shifts: either form takes more
// instructions in the other kernel.)
DEVICE u32 both_halves(u32 pair, bool high) { return __byte_perm(pair, pair, high ? 0x3232 : 0x1010); }

// Half of a thread's codes of a part's step: four words of rows g and g + 8, with the scales of two groups each.
struct Codes {
    u32 words[4], words8[4];
    u32 scales, scales8;

    DEVICE void load(const Shared& shared, int stage, int part, int half, const Place& place) {
        const int row = 16 * place.warp + place.row(), t = place.lane % 4, piece = (2 * t + half) ^ place.row();
        const u8* codes = shared.matrices[stage] + part * PART_BYTES + row * LINE + piece * 16;
        const uint4 low = read<uint4>(codes), high = read<uint4>(codes + 8 * LINE);
        words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
        words8[0] = high.x, words8[1] = high.y, words8[2] = high.z, words8[3] = high.w;
        const u8* two = shared.weight_scales[stage] + part * PART_SCALES + row * 16 + t * 4 + half * 2;
        scales = decode_scales(read<u16>(two));
        scales8 = decode_scales(read<u16>(two + 8 * 16));
    }
    DEVICE void decode_group(Batch& batch, int group) const {
        const u32 scale = both_halves(scales, group), scale8 = both_halves(scales8, group);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            decode_word(batch, i, words[2 * group + i], words8[2 * group + i], scale, scale8);
        }
    }
};

// All of an item's products, by a warp group. MMAs under way from one turn of a loop to the next would be made to
// wait for each other, so none are.
template <int N, bool GATED>
DEVICE void add_steps(float (&sums)[BLOCKS][N / 2], const Layer& layer, Shared& shared, const Item&, Ring& ring,
                      const Place& place) {
    Batch batches[2];
    Codes codes;
    for (int steps = layer.steps(GATED); steps > 0; steps--, ring.advance()) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        if (GATED) fence_async_shared();  // tokens came by ordinary copies
        const u64 tokens = shared_matrix(shared.matrices[ring.stage] + PARTS * PART_BYTES, 4 * 1024);
#pragma unroll
        for (int n = 0; n < 4 * BLOCKS; n++) {  // a group of a part
            const int b = n / 4, half = n / 2 % 2, group = n % 2;
            Batch& batch = batches[n % 2];
            wgmma_wait<1>();  // for the batch that had these registers
            if (group == 0) codes.load(shared, ring.stage, WARP_GROUPS * b + place.group, half, place);
            codes.decode_group(batch, group);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Of even columns, then of odd ones, 16 of each word: the first four words' fill a matrix.
                const int inside = (2 * group + i) * 32;
                wgmma_bf16<N>(sums[b], batch[2 * i], columns_on(matrix_on(tokens, half), inside));
                wgmma_bf16<N>(sums[b], batch[2 * i + 1], columns_on(matrix_on(tokens, 2 + half), inside));
            }
            wgmma_commit();
        }
        wgmma_wait<0>();
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) wgmma_touch(sums[b]);
        release(shared, ring.stage, place);
    }
}

// Scales of all of an item: the experts' own, and what the decoder leaves out.
template <int N, bool GATED>
DEVICE void scale_sums(float (&sums)[BLOCKS][N / 2], const Layer& layer, const Item& item) {
    const float first = 256.0f * (GATED ? layer.w13_global[2 * item.expert] : layer.w2_global[item.expert]);
    const float second = GATED ? 256.0f * layer.w13_global[2 * item.expert + 1] : first;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[b][i] *= i & 2 ? second : first;
    }
}
