"""The NVFP4 device code compiled, without a GPU, for the targets that it is meant for."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from moe_backend.kernels.triton.nvfp4_device import grouped_gemm_kernel, quantize_kernel

TARGETS = {
    "sm_90a": GPUTarget("cuda", 90, 32),
    "sm_100a": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
POINTERS = {
    "x": "*bf16",
    "global_scale": "*fp32",
    "slots": "*i64",
    "ends": "*i32",
    "packed": "*u8",
    "scales": "*u8",
    "out": "*bf16",
    "a": "*u8",
    "b": "*u8",
    "a_scales": "*fp8e4nv",
    "b_scales": "*fp8e4nv",
    "alphas": "*fp32",
    "sizes": "*i32",
    "starts": "*i32",
    "scale_starts": "*i32",
}


def compiled(kernel, target, constants, **options):
    """Everything that the compiler makes of a kernel; pointers and sizes are multiples of 16."""
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    runtime = [i for i, n in enumerate(names) if n not in constants]
    attributes = {(i,): [["tt.divisibility", 16]] for i in runtime}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    return compile_kernel(source, target=TARGETS[target], options=options).asm


@pytest.mark.parametrize("target", TARGETS)
def test_quantisation(target):
    constants = {"TOP_K": 8, "EXPERTS": 36, "EXPERTS_POWER": 64, "BLOCK_M": 16, "BLOCK_K": 256}
    made = compiled(quantize_kernel, target, constants)
    if target.startswith("sm"):
        assert f".target {target}" in made["ptx"]
        assert "div.rn.f32" in made["ptx"]  # correctly rounded, as the reference divides
        assert "div.full" not in made["ptx"]
        assert made["cubin"]
    else:
        assert made["hsaco"]


def gemm(target, scaled_dot):
    constants = {
        "EXPERTS": 36,
        "EXPERTS_POWER": 64,
        "BLOCK_K": 128,
        "SCALED_DOT": scaled_dot,
        "COMPUTE": tl.bfloat16,
    }
    return compiled(grouped_gemm_kernel, target, constants, num_warps=8, num_stages=3)


def test_gemm_on_blackwell_takes_the_block_scaled_instruction():
    made = gemm("sm_100a", scaled_dot=True)
    assert ".target sm_100a" in made["ptx"]
    found = set(re.findall(r"tcgen05\.mma[\w.:]*", made["ptx"]))
    # Triton 3.6 writes the older name of the same scale vector.
    (instruction,) = found
    assert re.search(r"kind::mxf4nvf4\.block_scale\.(block16|scale_vec::4X)", instruction)
    assert made["cubin"]


def test_gemm_on_hopper_decodes_to_bf16():
    made = gemm("sm_90a", scaled_dot=False)
    assert re.search(r"wgmma\.mma_async[\w.]*\.f32\.bf16\.bf16", made["ptx"])
    assert made["cubin"]
