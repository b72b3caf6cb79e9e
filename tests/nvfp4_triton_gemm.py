"""The grouped GEMM in Triton on integer-valued problems, equal to the plain product or not at all.

    TRITON_INTERPRET=1 python tests/nvfp4_triton_gemm.py PROBLEMS [FIRST]

Prints how many problems were checked.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from nvfp4_integers import integers

from moe_backend.kernels.nvfp4_gemm import grouped_gemm
from moe_backend.kernels.triton.nvfp4_gemm import grouped_gemm_op


def main() -> None:
    torch.set_num_threads(1)
    problems = int(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for seed in range(first, first + problems):
        k, n = (64, 128, 192)[seed % 3], (128, 256)[seed // 3 % 2]
        *arguments, expected = integers(seed, k, n)
        out = grouped_gemm(*arguments, partial(grouped_gemm_op, interpreted=True))
        kept = int(arguments[0].scales.offsets.tensor[-1])
        assert torch.equal(out[:kept].float(), expected[:kept]), seed
    print(problems)


if __name__ == "__main__":
    main()
