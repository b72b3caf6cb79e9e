"""Program control and waiting: ISA "SOPP Instructions" and "Data Dependency Resolution"."""

from __future__ import annotations

import re

from gcnemu.asm import Unsupported
from gcnemu.emit import Shape
from gcnemu.isa.table import Emitter, add

SOURCE = "SOPP Instructions"


def _nothing(shape: Shape) -> str:
    """Timing, priority, caches: no effect on results here (memory is coherent)."""
    shape.left.clear()
    return "return NEXT;"


add(
    "s_nop s_sleep s_setprio s_icache_inv s_wakeup s_incperflevel s_decperflevel s_ttracedata",
    "control",
    SOURCE,
    _nothing,
)
add("buffer_wbl2 buffer_inv", "control", "Memory Scopes and Temporal Hints", _nothing)
add("s_endpgm", "control", SOURCE, lambda shape: "wait_vm(w, 0); wait_lgkm(w, 0); return ENDED;")
add("s_barrier", "control", SOURCE, lambda shape: "return AT_BARRIER;")


def _trap(shape: Shape) -> str:
    return "return TRAPPED;"


add("s_trap", "control", SOURCE, _trap)


def _branch(condition: str) -> Emitter:
    def emit(shape: Shape) -> str:
        target = shape.labels.get(shape.operands[0].text)
        if target is None:
            raise Unsupported(f"branch to {shape.operands[0].text}")
        return f"if ({condition}) w->pc = (u32){shape.constant(target)}; return NEXT;"

    return emit


for name, condition in {
    "s_branch": "1",
    "s_cbranch_scc0": "!w->scc",
    "s_cbranch_scc1": "w->scc",
    "s_cbranch_vccz": "VCC == 0",
    "s_cbranch_vccnz": "VCC != 0",
    "s_cbranch_execz": "ex == 0",
    "s_cbranch_execnz": "ex != 0",
}.items():
    add(name, "control", SOURCE, _branch(condition))


def _waitcnt(shape: Shape) -> str:
    """Data of loads lands here, oldest first; vmcnt is 6 bits wide, lgkmcnt 4."""
    text = shape.take("raw") or ""
    if re.fullmatch(r"\d+|0x[0-9a-fA-F]+", text):
        bits = int(text, 0)
        counts = {"vmcnt": bits & 15 | bits >> 10 & 48, "lgkmcnt": bits >> 8 & 15}
        counts = {k: v for k, v in counts.items() if v != {"vmcnt": 63, "lgkmcnt": 15}[k]}
    else:
        counts = {k: int(v, 0) for k, v in re.findall(r"(\w+)\((\w+)\)", text)}
        if not counts or set(counts) - {"vmcnt", "lgkmcnt", "expcnt"}:
            raise Unsupported(f"s_waitcnt {text}")
    code = ""
    if "vmcnt" in counts:
        code += f"wait_vm(w, {counts['vmcnt']}); "
    if "lgkmcnt" in counts:
        code += f"wait_lgkm(w, {counts['lgkmcnt']}); "
    return code + "return NEXT;"


add("s_waitcnt", "control", SOURCE, _waitcnt)


def _getreg(shape: Shape) -> str:
    """Hardware identification registers only; they read as 0 (one XCC, one SE)."""
    from gcnemu.asm import parse_operand

    destination, _, which = (shape.take("raw") or "").partition(",")
    if not re.match(r"\s*hwreg\((HW_REG_XCC_ID|HW_REG_HW_ID)\b", which):
        raise Unsupported(f"s_getreg_b32 {which.strip()}")
    return f"w->s[{shape.register(parse_operand(destination).index)}] = 0; return NEXT;"


OVERFLOW_BIT = 23  # MODE.FP16_OVFL


def _setreg(shape: Shape) -> str:
    """MODE.FP16_OVFL; and what leaves the modelled mode: denormals on (bits 4 to 7 of MODE set)."""
    text = shape.take("raw") or ""
    match = re.fullmatch(r"hwreg\(HW_REG_MODE,\s*(\d+),\s*(\d+)\),\s*(\w+)", text)
    if match:
        first, size, value = int(match[1]), int(match[2]), int(match[3], 0)
        if (first, size) == (OVERFLOW_BIT, 1):
            return f"w->overflow = {value & 1}; return NEXT;"
        if first >= 4 and first + size <= 8 and value == (1 << size) - 1:
            return "return NEXT;"
    raise Unsupported(f"s_setreg {text}")


add("s_getreg_b32", "control", "SOPK Instructions", _getreg)
add("s_setreg_imm32_b32", "control", "SOPK Instructions", _setreg)
