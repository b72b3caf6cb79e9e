"""CUTLASS's scale-factor layout, evaluated by CuTe DSL on the CPU.

    python tests/blocked_scales_cutlass.py '[[rows, columns, experts], ...]'

Prints, for each, the offsets `[experts][rows][columns]` and the size. A process of its own: CuTe
DSL and FlyDSL bring an MLIR each, and one process cannot hold both.
"""

from __future__ import annotations

import json
import sys

from cutlass import Constexpr, cute
from cutlass.utils.blockscaled_layout import tile_atom_to_shape_SF


def evaluated(rows: int, columns: int, experts: int) -> tuple[list, int]:
    found = []

    @cute.jit
    def evaluate(r: Constexpr, c: Constexpr, e: Constexpr):
        layout = tile_atom_to_shape_SF((r, 16 * c, e), 16)
        found.append(
            [
                [[cute.crd2idx((i, 16 * j, k), layout) for j in range(c)] for i in range(r)]
                for k in range(e)
            ]
        )
        found.append(cute.cosize(layout))

    evaluate(rows, columns, experts)
    return found[0], found[1]


print(json.dumps([evaluated(*shape) for shape in json.loads(sys.argv[1])]))
