"""NVFP4 with many tokens: which rows make up a tile, and the GEMMs compiled for sm_90a."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from moe_backend.kernels.hopper import tiles, wide_device
from moe_backend.kernels.hopper.device import _nvfp4_position
from moe_backend.kernels.hopper.tiles import Tiles, Wide, choose
from moe_backend.kernels.hopper.wide import check
from moe_backend.verify.problems import ACTIVATIONS, Case, build


def compiled(gated, stages=5):
    """One of the GEMMs. Compiling also proves that decoded codes lie where the MMA wants them."""
    tokens = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    words = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    constants = {
        "X_SLOTS": stages, "GATED": gated, "ACTIVATION": 3, "PDL": True,
        "CONSUMER_REGISTERS": 232, "COPY_REGISTERS": 40,
    }  # fmt: skip
    kinds = {
        "x": f"tensordesc<bf16[128,128],{tokens!r}>",
        "x_few": f"tensordesc<bf16[64,128],{tokens!r}>",
        "w": f"tensordesc<i32[8,32],{words!r}>",
        "w_scale": "*fp8e4nv",
        "w_global": "*fp32",
        "out": "*bf16",
        "tiles": "*i32",
        **dict.fromkeys(("limit", "alpha", "beta"), "fp32"),
    }
    names = wide_device.gemm_kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in ("N", "K", "scale_columns", "width")
    }
    source = GluonASTSource(wide_device.gemm_kernel, signature, constants, attributes)
    options = {"num_warps": 4, "launch_pdl": True}
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("gated", [True, False], ids=["gate-up", "down"])
def test_gemm(gated, tmp_path):
    made = compiled(gated)
    ptx = made.asm["ptx"]
    found = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", ptx))
    assert found == {"m64n128k16.f32.bf16.bf16", "m64n64k16.f32.bf16.bf16"}
    # The first operand comes from registers.
    assert re.search(r"wgmma\.mma_async\S+ \{[^}]*\}, \{[^}]*\}, ", ptx)
    assert "setmaxnreg.inc" in ptx
    assert "cp.async.bulk.tensor.2d" in ptx
    assert made.metadata.shared <= 227 * 1024
    cubin = tmp_path / "gemm.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    stack = [int(n) for n in re.findall(r"STACK:(\d+)", usage.stdout)]
    assert stack
    assert max(stack) == 0  # no sums that do not fit into the registers


def test_hidden_columns_are_where_the_second_gemm_reads_them():
    intermediate, seen = 512, set()
    for block in range(intermediate // 64):
        for who in range(2):
            for j in range(32):
                g = j % 8 // 2 * 8 + j % 2 * 4 + j // 8 % 2 * 2 + j // 16
                n, gate = wide_device._row.fn(who, 0, g, 3, block, intermediate, True)
                m, up = wide_device._row.fn(who, 1, g, 3, block, intermediate, True)
                assert n == m
                assert (gate, up) == (6 * intermediate + n, 7 * intermediate + n)
                position = wide_device._hidden_position.fn(who, j, block)
                assert position == _nvfp4_position.fn(n)
                seen.add(position)
    assert seen == set(range(intermediate))


def test_output_rows_are_in_the_order_of_the_mma():
    for block in range(3):
        for who in range(2):
            for row in range(64):  # warp, half, row of eight
                g = row // 16 * 8 + row % 8
                n, weight = wide_device._row.fn(who, row // 8 % 2, g, 2, block, 1024, False)
                assert n == block * 128 + who * 64 + row
                assert weight == 2 * 1024 + n


def layer(intermediate=2048, **changes):
    base = build(Case("nvfp4", ACTIVATIONS[0])).layer
    return replace(
        base, hidden_size=4096, intermediate_size=intermediate, top_k=6, num_experts=256,
        num_local_experts=32, **changes,
    )  # fmt: skip


def test_many_tokens_are_its_business(monkeypatch):
    for version in ((3, 6), (3, 9)):
        monkeypatch.setattr(tiles, "triton_version", lambda version=version: version)
        assert isinstance(choose(layer(), 4096), Wide)
        assert isinstance(choose(layer(), 1024), Tiles)
        assert isinstance(choose(layer(320), 4096), Tiles)  # 320 of 512 columns
    assert choose(layer(), 4096).activation_groups(layer()) is None
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 5))
    assert isinstance(choose(layer(), 4096), Tiles)


@pytest.mark.parametrize(
    ("changes", "choice"),
    [({}, Wide(6, 5)), ({}, Wide(5, 1)), ({"format": "fp8_block"}, Wide(5, 5))],
    ids=["too-much-memory", "half-a-step", "fp8"],
)
def test_what_it_cannot_take_is_refused(changes, choice):
    check(layer(), Wide(5, 5))
    with pytest.raises(AssertionError):
        check(layer(**changes), choice)
