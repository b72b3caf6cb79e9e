"""The order of bits in which Hopper's decoders take NVFP4 codes.

Eight codes of neighbouring columns share a word of 32 bits. As bf16 a code's sign belongs at bit 15
of a half word and its magnitude's three bits at 8, 7 and 6, where they read as the magnitude times
2**-126. In the checkpoint's order each pair of codes takes a mask, a product and a mask, 13
instructions a word in all; here 8. Codes n and n + 4 lie in the two halves: n = 0 where they
belong, so a mask is enough; 1 and 2 where a turn of the word by 10 and by 13 bits to the left
brings them; 3 in the bits that are left, which still take a mask, a product and a mask.

    bits of a half word (sign, then the magnitude from its highest bit on)
    n = 0: 15 8 7 6    1: 5 14 13 12    2: 2 11 10 9    3: 1 0 4 3

Magnitudes of 1 and 2 lie in the other half. No four turns fill a word: all were tried.

Columns stay in their words, so rows, scales, shards and the accelerator's boxes stay what they are.
"""

from __future__ import annotations

import torch

from moe_backend.formats.fp8_block import cdiv

# Where the bits of code n < 4 go, the lowest first; those of n + 4 go half a word further on.
_PLACES = ((6, 7, 8, 15), (28, 29, 30, 5), (25, 26, 27, 2), (3, 4, 0, 1))
WORDS_AT_A_TIME = 2**21  # 8 MB come up beside the copy


def _moves() -> dict[int, int]:
    """By how many bits to the left, and the bits of the new word that come so."""
    moves: dict[int, int] = {}
    for code in range(8):
        for bit, place in enumerate(_PLACES[code % 4]):
            to = (place + code // 4 * 16) % 32
            by = to - (4 * code + bit)
            moves[by] = moves.get(by, 0) | 1 << to
    return moves


def rearranged(codes: torch.Tensor) -> torch.Tensor:
    """A copy of an NVFP4 weight in the order above.

    Args:
        codes: `[E, rows, K / 2]` uint8, the even column in the low nibble; K a multiple of 8.
    Returns:
        `[E, rows, K / 8]` int32. Its dtype tells the two orders apart.
    """
    words = codes.contiguous().view(torch.int32)
    new = torch.empty_like(words)
    some = words.view(-1).split(WORDS_AT_A_TIME), new.view(-1).split(WORDS_AT_A_TIME)
    for given, to in zip(*some, strict=True):
        to.zero_()
        for by, mask in _moves().items():
            # The sign that a shift to the right brings in is masked.
            to |= (given << by if by > 0 else given >> -by).bitwise_and_(_signed(mask))
    return new


def rearranged_scales(scales: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """A copy of a weight's block scales, in blocks of 16 rows and 256 columns.

    256 bytes hold a block, so that one copy brings the scales of a step of many rows: of each of 8
    rows and of 64 columns four scales, then those of the row that meets the same thread of an MMA.

    Args:
        scales: `[E, rows, groups]` float8_e4m3fn, one for 16 columns; rows a multiple of 16.
        gate_up: of gate rows, then up rows: the row that goes with a gate row is its up row. In
            other weights it is the one eight further on.
    Returns:
        `[E, rows / 16, ceil(groups / 16), 256]` float8_e4m3fn, zeros where columns end.
    """
    e, rows, groups = scales.shape
    units, steps = rows // 16, cdiv(groups, 16)
    bytes_ = scales.contiguous().view(torch.uint8)
    if groups != steps * 16:
        bytes_ = torch.nn.functional.pad(bytes_, (0, steps * 16 - groups))
    if gate_up:  # which of the two, of 8 rows, thread of four, one of its four
        blocks = bytes_.view(e, 2, units, 8, steps, 4, 4).permute(0, 2, 4, 3, 5, 1, 6)
    else:
        blocks = bytes_.view(e, units, 2, 8, steps, 4, 4).permute(0, 1, 4, 3, 5, 2, 6)
    return blocks.reshape(e, units, steps, 256).view(scales.dtype)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
