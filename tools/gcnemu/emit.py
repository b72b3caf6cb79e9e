"""From one instruction to the C body of its *shape* and the numbers that fill its slots.

A shape is an opcode with its operand kinds and modifiers; register numbers and constants are
run-time slots (`i->r[k]`, `i->x[k]`), so thousands of instructions share a few hundred C functions.
"""

from __future__ import annotations

import struct

from gcnemu.asm import Instruction, Operand, Unsupported

SDWA = {
    "DWORD": (0, 32), "BYTE_0": (0, 8), "BYTE_1": (8, 8), "BYTE_2": (16, 8), "BYTE_3": (24, 8),
    "WORD_0": (0, 16), "WORD_1": (16, 16),
}  # fmt: skip
# C type of an operand's value. b32 are untyped bits; f16 and bf16 are computed in float.
C_TYPES = {
    "f32": "float", "f16": "float", "bf16": "float", "f64": "double", "b32": "u32", "u32": "u32",
    "i32": "i32", "u16": "u16", "i16": "i16", "b16": "u16", "u64": "u64", "i64": "i64",
    "b64": "u64",
}  # fmt: skip
DPP_CONTROLS = {
    "row_shl": "DPP_ROW_SHL", "row_shr": "DPP_ROW_SHR", "row_ror": "DPP_ROW_ROR",
    "wave_shl": "DPP_WAVE_SHL", "wave_rol": "DPP_WAVE_ROL", "wave_shr": "DPP_WAVE_SHR",
    "wave_ror": "DPP_WAVE_ROR", "row_mirror": "DPP_MIRROR", "row_half_mirror": "DPP_HALF_MIRROR",
    "row_newbcast": "DPP_NEWBCAST",
}  # fmt: skip


def constant_bits(value: int | float, type: str) -> int:
    """A constant operand's bits, as its type reads it (ISA "Inline constants" and literals).

    Integers are bits as they are, also where a float is read. A 32-bit literal of a 64-bit operand
    is the high half of a float; as an integer it is extended, with its sign where that is signed.
    """
    if isinstance(value, float):
        if type in ("f16", "u16", "i16", "b16"):
            return int(struct.unpack("<H", struct.pack("<e", value))[0])
        if type == "bf16":
            return int(struct.unpack("<I", struct.pack("<f", value))[0]) >> 16
        if type in ("f64", "u64", "i64", "b64"):
            return int(struct.unpack("<Q", struct.pack("<d", value))[0])
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    if type == "f64" and not -16 <= value <= 64:
        return (value & 0xFFFFFFFF) << 32
    if type == "i64" and 1 << 31 <= value < 1 << 32:
        value -= 1 << 32
    return value & 0xFFFFFFFFFFFFFFFF


class Shape:
    """Builds the C of one instruction; a modifier that nothing takes makes it refused."""

    def __init__(self, instruction: Instruction, arch: str, labels: dict[str, int] | None = None):
        self.ins = instruction
        self.arch = arch
        self.labels = labels or {}
        self.operands = instruction.operands
        self.registers: list[int] = []
        self.constants: list[int] = []
        self.left = dict(instruction.modifiers)

    # --- slots ---

    def register(self, index: int) -> str:
        self.registers.append(index)
        if len(self.registers) > 8:
            raise Unsupported("too many operands")
        return f"i->r[{len(self.registers) - 1}]"

    def constant(self, value: int) -> str:
        self.constants.append(value & 0xFFFFFFFFFFFFFFFF)
        if len(self.constants) > 8:
            raise Unsupported("too many constants")
        return f"i->x[{len(self.constants) - 1}]"

    # --- modifiers ---

    def take(self, name: str, default: str | None = None) -> str | None:
        return self.left.pop(name, default)

    def flag(self, name: str) -> bool:
        return self.left.pop(name, None) is not None

    def number(self, name: str, default: int = 0) -> int:
        return int(self.left.pop(name, str(default)), 0)

    def vector(self, name: str, length: int, default: int) -> list[int]:
        """A list modifier such as op_sel:[0,1]; missing entries are the default."""
        given = self.left.pop(name, None)
        values = [] if given is None else [int(v, 0) for v in given.strip("[]").split(",")]
        if len(values) > length:
            raise Unsupported(f"{name} with {len(values)} entries")
        return values + [default] * (length - len(values))

    def finish(self) -> None:
        if self.left:
            raise Unsupported("modifier " + " ".join(sorted(self.left)))

    # --- operand values ---

    def vgpr(self, k: int) -> str:
        """Slot of operand k, which must be a vector register."""
        if self.operands[k].kind != "v":
            raise Unsupported(f"operand {self.operands[k].text} where a VGPR belongs")
        return self.register(self.operands[k].index)

    def sgpr(self, k: int) -> str:
        if self.operands[k].kind != "s":
            raise Unsupported(f"operand {self.operands[k].text} where an SGPR belongs")
        return self.register(self.operands[k].index)

    def bits(self, operand: Operand, type: str = "b32") -> str:
        """C expression of the operand's raw bits for lane l (32 or 64 bits by type)."""
        wide = type in ("u64", "i64", "b64", "f64")
        if operand.kind == "v":
            r = self.register(operand.index)
            return f"v64(w, {r}, l)" if wide else f"w->v[{r}][l]"
        if operand.kind == "s":
            r = self.register(operand.index)
            if wide and operand.count == 1 and operand.index >= 126:
                raise Unsupported(f"64-bit operand {operand.text}")
            return f"s64(w, {r})" if wide else f"w->s[{r}]"
        if operand.kind == "const":
            x = self.constant(constant_bits(operand.value, type))
            return x if wide else f"(u32){x}"
        if operand.kind in ("scc", "vccz", "execz"):
            e = {"scc": "w->scc", "vccz": "(u32)(VCC == 0)", "execz": "(u32)(EXEC == 0)"}
            return f"(u64){e[operand.kind]}" if wide else e[operand.kind]
        raise Unsupported(f"operand {operand.text}")

    def value(self, operand: Operand, type: str, raw: str | None = None, half: int = 0) -> str:
        """C expression of the operand as `type`, with its negation and absolute value.

        raw: bits to start from (DPP, SDWA); half: 1 takes bits 31..16 of a 16-bit operand.
        """
        raw = self.bits(operand, type) if raw is None else raw
        if type in ("f32", "f64", "b32"):
            if operand.absolute or operand.negated:
                sign = "0x8000000000000000ull" if type == "f64" else "0x80000000u"
                raw = f"({raw} & ~{sign})" if operand.absolute else raw
                raw = f"({raw} ^ {sign})" if operand.negated else raw
            return {"f32": f"F({raw})", "f64": f"D({raw})", "b32": raw}[type]
        if type in ("f16", "bf16"):
            raw = f"({raw} >> 16)" if half else f"({raw} & 0xffff)"
            raw = f"({raw} & 0x7fff)" if operand.absolute else raw
            raw = f"({raw} ^ 0x8000)" if operand.negated else raw
            return f"h2f({raw})" if type == "f16" else f"b2f({raw})"
        if operand.absolute or operand.negated:
            raise Unsupported(f"sign modifier on integer operand {operand.text}")
        if type in ("u16", "i16", "b16"):
            return f"({C_TYPES[type]})({raw} >> {16 * half})"
        return f"({C_TYPES[type]}){raw}"

    # --- DPP and SDWA ---

    def dpp(self, operand: Operand) -> tuple[str, str] | None:
        """Prelude that fills `dpp[]` and `lanes` from a DPP modifier, or None (ISA "DPP")."""
        control = arg = None
        for name, constant in DPP_CONTROLS.items():
            if (given := self.take(name)) is not None:
                control, arg = constant, int(given, 0)
        if (given := self.take("quad_perm")) is not None:
            q = [int(x, 0) for x in given.strip("[]").split(",")]
            control, arg = "DPP_QUAD", q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6
        if (given := self.take("row_bcast")) is not None:
            control, arg = f"DPP_BCAST{int(given, 0)}", 0
        if control is None:
            return None
        rows, banks = self.number("row_mask", 15), self.number("bank_mask", 15)
        bound = int(self.flag("bound_ctrl"))
        if operand.kind != "v":
            raise Unsupported(f"DPP source {operand.text}")
        r = self.register(operand.index)
        prelude = (
            f"u32 dpp[64]; u64 lanes = 0; for (int l = 0; l < 64; l++) {{ "
            f"int from = dpp_source({control}, {arg}, l); int ok = from >= 0 && (ex >> from & 1); "
            f"dpp[l] = ok ? w->v[{r}][from] : 0; "
            f"if ((ok || {bound}) && ({rows} >> (l >> 4) & 1) && ({banks} >> (l >> 2 & 3) & 1)) "
            f"lanes |= 1ull << l; }} lanes &= ex; "
        )
        return prelude, "dpp[l]"

    def sdwa_source(self, operand: Operand, name: str, raw: str) -> str:
        at, width = SDWA[self.take(name, "DWORD") or "DWORD"]
        if width == 32:
            return raw
        if operand.sign_extended:
            return f"(u32)((i32)({raw} << {32 - at - width}) >> {32 - width})"
        return f"({raw} >> {at} & {(1 << width) - 1:#x}u)"
