"""Between lanes, and between vector and scalar registers."""

from __future__ import annotations

from gcnemu.emit import Shape
from gcnemu.isa.table import CDNA4, Emitter, add, valu

VOP1, VOP3 = "VOP1 Instructions", "VOP3A & VOP3B Instructions"


def _readfirstlane(shape: Shape) -> str:
    """The lowest active lane; lane 0 where none is active."""
    d = shape.sgpr(0)
    raw = shape.bits(shape.operands[1])
    return f"const int l = ex ? __builtin_ctzll(ex) : 0; (void)l; w->s[{d}] = {raw}; return NEXT;"


def _readlane(shape: Shape) -> str:
    d = shape.sgpr(0)
    raw, lane = shape.bits(shape.operands[1]), shape.bits(shape.operands[2])
    return f"const int l = {lane} & 63; w->s[{d}] = {raw}; return NEXT;"


def _writelane(shape: Shape) -> str:
    """Not masked by EXEC."""
    d = shape.vgpr(0)
    raw, lane = shape.bits(shape.operands[1]), shape.bits(shape.operands[2])
    return f"const int l = {lane} & 63; w->v[{d}][l] = {raw}; return NEXT;"


add("v_readfirstlane_b32", "lanes", VOP1, _readfirstlane)
add("v_readlane_b32", "lanes", VOP3, _readlane)
add("v_writelane_b32", "lanes", VOP3, _writelane)

# How many lower-numbered lanes have their bit set.
valu(
    "v_mbcnt_lo_u32_b32", "u32 u32 u32",
    "(u32)__builtin_popcount(a & (l >= 32 ? ~0u : (1u << l) - 1)) + b", VOP3, family="lanes",
)  # fmt: skip
valu(
    "v_mbcnt_hi_u32_b32", "u32 u32 u32",
    "(u32)__builtin_popcount(l < 32 ? 0 : a & ((1u << (l - 32)) - 1)) + b", VOP3, family="lanes",
)  # fmt: skip
for name in ("v_accvgpr_read_b32", "v_accvgpr_write_b32"):
    valu(name, "b32 b32", "a", "VOP3P Instructions", family="lanes")
valu("v_accvgpr_mov_b32", "b32 b32", "a", VOP1, family="lanes")


def _swap(shape: Shape) -> str:
    a, b = shape.vgpr(0), shape.vgpr(1)
    return (
        f"for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ u32 t = w->v[{a}][l]; "
        f"w->v[{a}][l] = w->v[{b}][l]; w->v[{b}][l] = t; }} return NEXT;"
    )


add("v_swap_b32", "lanes", VOP1, _swap)


def _permlane_swap(half: int) -> Emitter:
    """Swap the odd groups of `half` lanes of the first register with the even ones of the second.

    Partial EXEC stops the run: what inactive lanes give is not modelled.
    """

    def emit(shape: Shape) -> str:
        a, b = shape.vgpr(0), shape.vgpr(1)
        return (
            f"if (~ex) return TRAPPED; for (int l = 0; l < 64; l++) if (!(l & {half})) {{ "
            f"u32 t = w->v[{a}][l + {half}]; w->v[{a}][l + {half}] = w->v[{b}][l]; "
            f"w->v[{b}][l] = t; }} return NEXT;"
        )

    return emit


add("v_permlane16_swap_b32", "lanes", VOP1, _permlane_swap(16), CDNA4)
add("v_permlane32_swap_b32", "lanes", VOP1, _permlane_swap(32), CDNA4)
add("v_nop", "lanes", VOP1, lambda shape: "return NEXT;")
