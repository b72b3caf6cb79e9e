"""What a compiled AMD kernel uses, read from its code object and its assembly."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from moe_backend.verify import code_object

# VGPRs of a wave, architectural and accumulation together (CDNA3 and CDNA4 ISA, "VGPRs").
MAX_VGPR = 512
# First match wins.
FAMILIES = (
    ("matrix", r"v_s?mfma"),
    ("lds", r"ds_"),
    ("global", r"(global|flat|buffer)_(load|store|atomic)"),
    ("scratch", r"scratch_"),
    ("scalar load", r"s_(buffer_)?load"),
    ("wait", r"s_(waitcnt|barrier|nop)"),
    ("branch", r"s_c?branch"),
    ("convert", r"v_cvt_"),
    ("vector", r"v_"),
    ("scalar", r"s_"),
)


@dataclass(frozen=True)
class Inspection:
    """One kernel on one target; registers in 32-bit registers, memory in bytes.

    Attributes:
        spills: vector registers that the compiler moved to scratch memory.
        sgpr_spills: scalar registers that it moved into lanes of vector registers, which is cheap.
        matrix_ops: matrix instructions by name, as often as they stand in the code.
        mix: instructions by family, as often as they stand in the code.
        loads: loads from global memory by how they address it: `64-bit` per lane, `base + 32-bit`
            (a 64-bit scalar base and 32 bits per lane), `buffer + 32-bit` (a buffer's base and 32
            bits per lane); those into LDS likewise.
        f16_fallback: it takes FP8 operands and multiplies them in f16: the target lacks the
            instruction, and the compiler says nothing.
    """

    kernel: str
    arch: str
    vgpr: int
    agpr: int
    sgpr: int
    lds: int
    scratch: int
    spills: int
    sgpr_spills: int
    instructions: int
    matrix_ops: dict[str, int]
    mix: dict[str, int]
    loads: dict[str, int]
    f16_fallback: bool

    def problems(self, lds_limit: int) -> list[str]:
        """Why this kernel should not ship, in words; empty if it may."""
        out = []
        if self.spills:
            out.append(f"{self.spills} vector registers are spilled")
        if self.scratch:
            out.append(f"{self.scratch} bytes of scratch memory per lane")
        if self.lds > lds_limit:
            out.append(f"{self.lds} bytes of LDS; {self.arch} has {lds_limit}")
        if self.vgpr > MAX_VGPR:
            out.append(f"{self.vgpr} VGPRs; a wave can have {MAX_VGPR}")
        if self.f16_fallback:
            out.append("FP8 operands are multiplied in f16")
        return out


def inspect(
    assembly: str, binary: bytes, name: str, *, dynamic_lds: int = 0, types: tuple[str, ...] = ()
) -> Inspection:
    """Read one kernel.

    Args:
        dynamic_lds: bytes of LDS of the launch, where the code object does not have them all.
        types: argument types as Triton writes them; they tell an FP8 kernel.

    Raises:
        ValueError: the code object has no such kernel.
    """
    kernels = code_object.read(binary)
    if name not in kernels:
        raise ValueError(f"no kernel {name!r} in the code object; it has {sorted(kernels)}")
    about = kernels[name]
    target = re.search(r'\.amdgcn_target\s+"[^"]*(gfx\w+)', assembly)
    opcodes = _instructions(assembly, name)
    names = [re.sub(r"_(e32|e64|dpp|sdwa)$", "", line.split()[0]) for line in opcodes]
    matrix = Counter(n for n in names if n.startswith(("v_mfma", "v_smfmac")))
    takes_fp8 = any(t.startswith("*fp8") for t in types)
    only_f16 = bool(matrix) and all(n.endswith("_f16") for n in matrix)
    return Inspection(
        kernel=name,
        arch=target[1] if target else "?",
        vgpr=about.vgpr,
        agpr=about.agpr,
        sgpr=about.sgpr,
        lds=max(about.lds, dynamic_lds),
        scratch=about.scratch,
        spills=about.vgpr_spills,
        sgpr_spills=about.sgpr_spills,
        instructions=len(names),
        matrix_ops=dict(sorted(matrix.items())),
        mix=dict(Counter(_family(n) for n in names)),
        loads=dict(Counter(kind for line in opcodes if (kind := _addressing(line)))),
        f16_fallback=takes_fp8 and only_f16,
    )


def _instructions(assembly: str, name: str) -> list[str]:
    start = re.search(rf"^{re.escape(name)}:", assembly, re.M)
    if start is None:
        return []
    body = assembly[start.end() :]
    end = re.search(r"^\.Lfunc_end\d+:|^\s*\.section\b", body, re.M)
    lines = (
        re.sub(r"(;|//).*$", "", line).strip()
        for line in body[: end.start() if end else None].split("\n")
    )
    return [line for line in lines if re.match(r"[a-z]\w+(\s|$)", line) and not line.endswith(":")]


def _family(opcode: str) -> str:
    return next((name for name, pattern in FAMILIES if re.match(pattern, opcode)), "other")


def _addressing(line: str) -> str | None:
    """How a load from global memory finds its address."""
    opcode = line.split()[0]
    if opcode.startswith("buffer_load"):
        return "buffer + 32-bit, to LDS" if re.search(r"\blds\b", line) else "buffer + 32-bit"
    if not opcode.startswith(("global_load", "flat_load")):
        return None
    based = re.search(r",\s*s\[\d+:\d+\]", line) is not None
    kind = "base + 32-bit" if based else "64-bit"
    return f"{kind}, to LDS" if "_lds_" in opcode else kind


def table(rows: list[tuple[str, Inspection]]) -> str:
    """Inspections, each with the case that it was seen in, as a table for people."""
    head = ("arch", "kernel", "vgpr", "agpr", "sgpr", "lds", "spills", "matrix", "loads", "case")
    cells = [head]
    for case, i in rows:
        matrix = ", ".join(f"{n.removeprefix('v_mfma_')} x{k}" for n, k in i.matrix_ops.items())
        loads = ", ".join(f"{kind} x{n}" for kind, n in sorted(i.loads.items()))
        cells.append(
            (i.arch, i.kernel, str(i.vgpr), str(i.agpr), str(i.sgpr), str(i.lds), str(i.spills),
             matrix or "-", loads or "-", case)
        )  # fmt: skip
    widths = [max(len(row[n]) for row in cells) for n in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
