"""The table itself and the two ways most instructions get into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gcnemu.asm import Unsupported
from gcnemu.emit import C_TYPES, SDWA, Shape

CDNA3 = frozenset({"gfx942"})
CDNA4 = frozenset({"gfx950"})
BOTH = CDNA3 | CDNA4
Emitter = Callable[[Shape], str]


@dataclass(frozen=True)
class Spec:
    """One instruction.

    emit: writes the C body; it sees the state `w`, the slots `i`, and `ex`, the EXEC mask.
    source: the section of the ISA document that defines it.
    """

    name: str
    family: str
    archs: frozenset[str]
    source: str
    emit: Emitter


INSTRUCTIONS: dict[str, Spec] = {}


def add(names: str, family: str, source: str, emit: Emitter, archs: frozenset[str] = BOTH) -> None:
    """Enter instructions that share an emitter."""
    for name in names.split():
        assert name not in INSTRUCTIONS, name
        INSTRUCTIONS[name] = Spec(name, family, archs, source, emit)


def valu(
    name: str,
    signature: str,
    expression: str,
    source: str,
    *,
    archs: frozenset[str] = BOTH,
    family: str = "vector",
    accumulate: bool = False,
    keep_high: bool = False,
) -> None:
    """Enter a lane-wise vector instruction.

    signature: type of the result, then of each source.
    expression: C in a, b, c (and `l`, the lane); for a 16-bit float result, computed in float.
    accumulate: the destination is also the last source.
    keep_high: a 16-bit result leaves the other half of the register; otherwise it is zeroed
        (ISA "16-bit instructions"; LLVM, SIRegisterInfo/GCNSubtarget `zeroesHigh16BitsOfDest`).
    """
    result, *sources = signature.split()

    def emit(shape: Shape) -> str:
        return emit_valu(shape, result, sources, expression, accumulate, keep_high)

    add(name, family, source, emit, archs)


def emit_valu(
    shape: Shape,
    result: str,
    sources: list[str],
    expression: str,
    accumulate: bool = False,
    keep_high: bool = False,
) -> str:
    """C of a lane-wise instruction: modifiers, the loop, the masked write."""
    operands = shape.operands[1:]
    if accumulate:
        operands = [*operands, shape.operands[0]]
    if len(operands) != len(sources):
        raise Unsupported(f"{len(operands)} sources")
    destination = shape.vgpr(0)
    halves = shape.vector("op_sel", len(sources) + 1, 0)
    dpp = shape.dpp(operands[0]) if operands else None
    prelude, lanes = (dpp[0], "lanes") if dpp else ("", "ex")
    body = ""
    for k, (operand, type) in enumerate(zip(operands, sources, strict=True)):
        raw = dpp[1] if dpp and k == 0 else None
        if shape.ins.encoding == "sdwa" and k < 2:
            raw = shape.sdwa_source(operand, f"src{k}_sel", raw or shape.bits(operand, type))
        body += (
            f"const {C_TYPES[type]} {'abcd'[k]} = {shape.value(operand, type, raw, halves[k])}; "
        )
    body += f"{C_TYPES[result]} d = {expression}; "
    if result in ("f32", "f64", "f16"):
        factor = {"2": "2", "4": "4"}.get(shape.take("mul", "") or "")
        factor = "0.5f" if shape.take("div") == "2" else factor
        body += f"d *= {factor}; " if factor else ""
        if shape.flag("clamp"):
            body += f"d = {'clamp01d' if result == 'f64' else 'clamp01'}(d); "
    bits = {
        "f32": "U(d)", "f16": "half(w, d)", "bf16": "f2b(d)", "f64": "UD(d)",
        "u16": "(u16)d", "i16": "(u16)d", "b16": "d",
    }.get(result, "(u32)d")  # fmt: skip
    if result in ("f64", "u64", "i64", "b64"):
        bits = "UD(d)" if result == "f64" else "(u64)d"
        return (
            f"{prelude}u32 lo[64], hi[64]; for (int l = 0; l < 64; l++) {{ {body}"
            f"u64 o = {bits}; lo[l] = (u32)o; hi[l] = (u32)(o >> 32); }} "
            f"put(w, {destination}, lo, {lanes}); put(w, {destination} + 1, hi, {lanes}); return NEXT;"
        )
    if halves[len(sources)] or (keep_high and result in ("f16", "u16", "i16", "b16")):
        at = 16 * halves[len(sources)]
        bits = f"(w->v[{destination}][l] & {0xFFFF << (16 - at):#x}u) | ((u32)({bits}) << {at})"
    if shape.ins.encoding == "sdwa":
        bits = _sdwa_result(shape, bits, destination)
    return (
        f"{prelude}u32 out[64]; for (int l = 0; l < 64; l++) {{ {body}out[l] = {bits}; }} "
        f"put(w, {destination}, out, {lanes}); return NEXT;"
    )


def _sdwa_result(shape: Shape, bits: str, destination: str) -> str:
    """dst_sel and dst_unused (ISA "SDWA")."""
    at, width = SDWA[shape.take("dst_sel", "DWORD") or "DWORD"]
    unused = shape.take("dst_unused", "UNUSED_PAD")
    if width == 32:
        return bits
    mask = (1 << width) - 1
    field = f"(({bits}) & {mask:#x}u) << {at}"
    if unused == "UNUSED_PRESERVE":
        return f"(w->v[{destination}][l] & {~(mask << at) & 0xFFFFFFFF:#x}u) | {field}"
    if unused == "UNUSED_PAD":
        return field
    raise Unsupported(f"dst_unused:{unused}")
