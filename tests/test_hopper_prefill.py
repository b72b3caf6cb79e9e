"""FP8 with many tokens: sorting in Triton's interpreter, the GEMMs compiled for sm_90a."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton
from interpreted import assert_right
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from moe_backend.kernels.cuda import build as cuda_build
from moe_backend.kernels.hopper import prefill_device, tiles
from moe_backend.kernels.hopper.prefill import check
from moe_backend.kernels.hopper.tiles import Prefill, choose, triton_version
from moe_backend.verify.problems import ACTIVATIONS, Case, build

GRID = (128, 128)


def test_sorting_in_the_interpreter():
    assert_right("hopper_sort.py")


def compiled(gated, half, group, block):
    """One of the GEMMs for a weight block, with half a tile's weight rows and a scale's columns."""
    box = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    row = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    constants = {
        "HALF": half, "STEP": 128, "SUB": min(group, block[1]), "STAGES": 4 if half == 128 else 6,
        "GATED": gated, "GROUP": group, "SCALE_N": block[0], "SCALE_K": block[1], "ACTIVATION": 1,
        "PDL": True, "CONSUMER_REGISTERS": 240, "COPY_REGISTERS": 24,
    }  # fmt: skip
    kinds = {
        "a": f"tensordesc<fp8e4nv[64,128],{box!r}>",
        "w": f"tensordesc<fp8e4nv[{half},128],{box!r}>",
        "a_scale": f"tensordesc<fp32[1,128],{row!r}>",
        "out": "*fp8e4nv" if gated else "*bf16",
        "tiles": "*i32",
        **dict.fromkeys(("w_scale", "out_scale"), "*fp32"),
        **dict.fromkeys(("limit", "alpha", "beta"), "fp32"),
    }
    names = prefill_device.gemm_kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in ("N", "K", "scale_columns")
    }
    source = GluonASTSource(prefill_device.gemm_kernel, signature, constants, attributes)
    options = {"num_warps": 4, "launch_pdl": True}
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(
    ("gated", "half", "group", "block"),
    [
        (True, 128, 128, GRID),
        (True, 64, 128, (32, 128)),
        (False, 64, 128, GRID),
        (False, 64, 64, (128, 32)),
    ],
    ids=["gate-up", "gate-up-32-rows", "down", "down-32-columns"],
)
def test_gemm(gated, half, group, block, tmp_path):
    made = compiled(gated, half, group, block)
    found = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", made.asm["ptx"]))
    assert found == {"m64n64k32.f32.e4m3.e4m3"}
    assert "setmaxnreg.inc" in made.asm["ptx"]
    assert "cp.async.bulk.tensor.2d" in made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024
    # Once for the barriers; and in each loop of each warp group, as the tokens' scales are read by
    # ordinary loads, before the next copy may write. The second GEMM has a loop for few tokens too.
    assert made.asm["ptx"].count("fence.proxy.async") == 1 + 2 * (1 if gated else 2)
    if half == 128 and triton_version() != (3, 6):
        return  # `choose` does not take it there
    # Sums that do not fit into the registers made these kernels 1.7 times slower.
    cubin = tmp_path / "gemm.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    stack = [int(n) for n in re.findall(r"STACK:(\d+)", usage.stdout)]
    assert stack
    assert max(stack) <= 16


def layer(w13_block, w2_block, intermediate=1280):
    base = build(Case("fp8_block", ACTIVATIONS[0])).layer
    return replace(
        base, hidden_size=4096, intermediate_size=intermediate, top_k=8, num_experts=288,
        num_local_experts=36, w13_block=w13_block, w2_block=w2_block,
    )  # fmt: skip


def test_many_tokens_are_its_business(monkeypatch):
    monkeypatch.setattr(cuda_build, "missing", lambda: "no compiler")
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 6))
    assert isinstance(choose(layer(GRID, GRID), 4096), Prefill)
    assert not isinstance(choose(layer(GRID, GRID), 256), Prefill)
    assert choose(layer(GRID, GRID), 4096).hidden == 128
    assert choose(layer((32, 128), (128, 32), 160), 4096).hidden == 64  # several scales a tile
    assert choose(layer(GRID, GRID, 320), 4096).hidden == 64  # 320 of 384 columns
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 9))
    assert choose(layer(GRID, GRID), 4096).hidden == 64
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 5))
    assert not isinstance(choose(layer(GRID, GRID), 4096), Prefill)


@pytest.mark.parametrize(
    ("blocks", "choice"),
    [
        (((64, 128), GRID), Prefill(128, 4, 128, 6)),
        ((GRID, (64, 128)), Prefill(128, 4, 256, 4)),
        (((48, 128), GRID), Prefill(64, 6, 128, 6)),
        (((128, 96), GRID), Prefill(64, 6, 128, 6)),
    ],
    ids=["rows-of-w13", "rows-of-w2", "48-rows", "96-columns"],
)
def test_a_tile_that_mixes_scales_is_refused(blocks, choice):
    check(layer(GRID, GRID), Prefill(128, 4, 256, 4))
    with pytest.raises(ValueError, match=" expected$"):
        check(layer(*blocks), choice)
