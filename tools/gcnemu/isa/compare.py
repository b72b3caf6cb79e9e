"""Vector compares: one bit per lane in a scalar pair; inactive lanes give 0. ISA "VOPC Instructions".

v_cmpx also writes EXEC.
"""

from __future__ import annotations

from gcnemu.asm import Instruction, Operand
from gcnemu.emit import C_TYPES, Shape
from gcnemu.isa.table import Emitter, add

ORDERED = {
    "f": "0", "lt": "a < b", "eq": "a == b", "le": "a <= b", "gt": "a > b", "lg": "a < b || a > b",
    "ge": "a >= b", "o": "a == a && b == b", "u": "a != a || b != b", "nge": "!(a >= b)",
    "nlg": "!(a < b || a > b)", "ngt": "!(a > b)", "nle": "!(a <= b)", "neq": "!(a == b)",
    "nlt": "!(a < b)", "tru": "1",
}  # fmt: skip
INTEGER = {
    "f": "0", "lt": "a < b", "eq": "a == b", "le": "a <= b", "gt": "a > b", "ne": "a != b",
    "ge": "a >= b", "t": "1",
}  # fmt: skip
VCC = Operand("vcc", "s", 106, 2)


def _compare(expression: str, type_a: str, type_b: str, writes_exec: bool) -> Emitter:
    def emit(shape: Shape) -> str:
        operands = shape.operands
        if len(operands) == 2:  # the destination, vcc, is not always printed
            operands = [VCC, *operands]
        ins: Instruction = shape.ins
        destination = shape.register(operands[0].index)
        dpp = shape.dpp(operands[1])
        prelude, lanes = (dpp[0], "lanes") if dpp else ("", "ex")
        raws = [dpp[1] if dpp else None, None]
        if ins.encoding == "sdwa":
            for k, t in enumerate((type_a, type_b)):
                raws[k] = shape.sdwa_source(
                    operands[k + 1], f"src{k}_sel", raws[k] or shape.bits(operands[k + 1], t)
                )
        halves = shape.vector("op_sel", 2, 0)
        a = shape.value(operands[1], type_a, raws[0], halves[0])
        b = shape.value(operands[2], type_b, raws[1], halves[1])
        exec_too = "EXEC = bits; " if writes_exec else ""
        return (
            f"{prelude}u64 bits = 0; for (int l = 0; l < 64; l++) {{ const {C_TYPES[type_a]} a = {a}; "
            f"const {C_TYPES[type_b]} b = {b}; (void)a; (void)b; "
            f"bits |= (u64)({expression}) << l; }} bits &= {lanes}; "
            f"set64(w, {destination}, bits); {exec_too}return NEXT;"
        )

    return emit


SOURCE = "VOPC Instructions"
for prefix, writes_exec in (("v_cmp", False), ("v_cmpx", True)):
    for type in ("f16", "f32", "f64"):
        for name, expression in ORDERED.items():
            add(
                f"{prefix}_{name}_{type}", "compare", SOURCE,
                _compare(expression, type, type, writes_exec),
            )  # fmt: skip
    for type in ("i16", "u16", "i32", "u32", "i64", "u64"):
        for name, expression in INTEGER.items():
            add(
                f"{prefix}_{name}_{type}", "compare", SOURCE,
                _compare(expression, type, type, writes_exec),
            )  # fmt: skip
    # Classes as a mask of ten bits; the bits are looked at, so that a signalling NaN stays one.
    for type, bits in (("f16", "b16"), ("f32", "b32"), ("f64", "b64")):
        add(
            f"{prefix}_class_{type}", "compare", SOURCE,
            _compare(f"(class_{type}(a) & b) != 0", bits, "b32", writes_exec),
        )  # fmt: skip
