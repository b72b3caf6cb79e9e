"""The instruction table: `INSTRUCTIONS[name]` says what an instruction does and where AMD says so.

Sources are the public documents "AMD Instinct MI300 Instruction Set Architecture" (CDNA3) and its
CDNA4 successor, by the title of the section; gfx942 is CDNA3, gfx950 CDNA4.
"""

from __future__ import annotations

from gcnemu.isa import (  # noqa: F401  (each adds its instructions to the table)
    buffer,
    compare,
    control,
    convert,
    flat,
    lanes,
    lds,
    matrix,
    packed,
    scalar,
    scalar_memory,
    vector_float,
    vector_integer,
)
from gcnemu.isa.table import BOTH, CDNA3, CDNA4, INSTRUCTIONS, Spec

__all__ = ["BOTH", "CDNA3", "CDNA4", "INSTRUCTIONS", "Spec"]
