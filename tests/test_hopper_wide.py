"""NVFP4 with many tokens: which rows make up a tile, and the GEMMs compiled for sm_90a."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from moe_backend.kernels.hopper import tiles, wide, wide_device
from moe_backend.kernels.hopper.device import _nvfp4_position
from moe_backend.kernels.hopper.tiles import Flow, Pairs, Stream, Tiles, Wide, choose
from moe_backend.kernels.hopper.wide import check
from moe_backend.verify.problems import ACTIVATIONS, Case, build


def compiled(gated):
    """One of the GEMMs. Compiling also proves that decoded codes lie where the MMA wants them."""
    tokens = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    words = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
    constants = {
        "X_SLOTS": 4, "W_SLOTS": 2, "GATED": gated, "ACTIVATION": 3, "PDL": True,
        "CONSUMER_REGISTERS": 240, "COPY_REGISTERS": 24,
    }  # fmt: skip
    kinds = {
        "x_all": f"tensordesc<bf16[128,64],{tokens!r}>",
        "x_half": f"tensordesc<bf16[64,64],{tokens!r}>",
        "x_quarter": f"tensordesc<bf16[32,64],{tokens!r}>",
        "w": f"tensordesc<i32[4,2,8,32],{words!r}>",
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
    assert found == {f"m64n{n}k16.f32.bf16.bf16" for n in (128, 64, 32)}
    # The first operand comes from registers.
    assert re.search(r"wgmma\.mma_async\S+ \{[^}]*\}, \{[^}]*\}, ", ptx)
    assert "setmaxnreg.inc" in ptx
    assert "cp.async.bulk.tensor.4d" in ptx
    assert made.metadata.shared <= 227 * 1024
    # Codes are read by ordinary loads: before the next copy may write, a fence.
    loop = ptx[ptx.index("wgmma.mma_async") :]
    assert loop.index("fence.proxy.async") < loop.index("mbarrier.arrive.shared")
    cubin = tmp_path / "gemm.cubin"
    cubin.write_bytes(made.asm["cubin"])
    stack = [int(n) for n in re.findall(r"STACK:(\d+)", tool("cuobjdump", "-res-usage", cubin))]
    assert stack
    assert max(stack) <= 16  # no sums that do not fit into the registers
    code = tool("nvdisasm", "-c", cubin)
    # Short of registers, the assembler would wait for each product before the next.
    assert 0 < 4 * code.count("WARPGROUP.DEPBAR") < code.count("HGMMA")


def tool(name, *arguments):
    """What a tool that comes with Triton prints."""
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_hidden_columns_are_where_the_second_gemm_reads_them():
    """The order of stored columns is that of rows `j % 8 // 2`'s warp; see `_hidden_position`."""
    intermediate, seen = 512, set()
    for block in range(intermediate // 128):
        for quarter in range(4):
            for j in range(32):
                warp, row = j % 8 // 2, j % 2 * 4 + j // 8 % 2 * 2 + j // 16
                n = wide_device._first_row.fn(quarter, warp, block, True) + row
                position = wide_device._hidden_position.fn(quarter, j, block)
                assert position == _nvfp4_position.fn(n)
                seen.add(position)
    assert seen == set(range(intermediate))


def test_output_rows_are_in_the_order_of_the_mma():
    for block in range(3):
        for quarter in range(4):
            for row in range(64):  # warp, half, row of eight
                n = wide_device._first_row.fn(quarter, row // 16, block, False) + row % 16
                assert n == block * 256 + quarter * 64 + row


def copied(view, first):
    """What one copy brings, as rows of words."""
    boxed = view.base.as_strided(view.shape, view.strides)
    return boxed[tuple(slice(f, f + b) for f, b in zip(first, view.block_shape, strict=True))]


@pytest.mark.parametrize("intermediate", [256, 192])
def test_a_copy_brings_the_rows_of_an_mma(intermediate):
    """Each word of w13 says expert, matrix and row; the last groups may be missing, not others'."""
    experts, hidden = 3, 256
    e, m, n = torch.meshgrid(*map(torch.arange, (experts, 2, intermediate)), indexing="ij")
    label = ((e * 2 + m) * 1000 + n).int().reshape(experts, -1, 1)
    codes = label.expand(-1, -1, hidden // 8).contiguous().view(torch.uint8)
    view = wide.gate_up_words(codes)
    for expert in range(experts):
        for block in range((intermediate + 127) // 128):
            for quarter in range(4):
                n = wide_device._first_row.fn(quarter, 0, block, True)
                first = [2 * expert * intermediate // 64 + n // 64, 0, n % 64, 0]
                for warp, group in enumerate(copied(view, first)):
                    n = wide_device._first_row.fn(quarter, warp, block, True)
                    if n < intermediate:
                        for half in range(2):
                            want = (expert * 2 + half) * 1000 + n + torch.arange(8)
                            assert torch.equal(group[half, :, 0], want.int())
    end = view.base.numel()
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    assert last == end - 1  # nothing past the end of the tensor

    down = torch.arange(experts * 64).int().reshape(experts, 64, 1).expand(-1, -1, 32)
    view = wide.down_words(down.contiguous().view(torch.uint8))
    box = copied(view, [2 * 64 // 16, 0, 0, 0])
    assert torch.equal(box[..., 0].flatten(), torch.arange(2 * 64, 3 * 64).int())


def layer(intermediate=2048, **changes):
    base = build(Case("nvfp4", ACTIVATIONS[0])).layer
    return replace(
        base, hidden_size=4096, intermediate_size=intermediate, top_k=6, num_experts=256,
        num_local_experts=32, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("missing", [None, "no compiler"])
def test_many_tokens_are_its_business_where_cuda_cannot_be_compiled(missing, monkeypatch):
    monkeypatch.setattr(tiles.build, "missing", lambda: missing)
    for version in ((3, 6), (3, 9)):
        monkeypatch.setattr(tiles, "triton_version", lambda version=version: version)
        assert isinstance(choose(layer(), 4096), Wide if missing else Pairs)
        assert isinstance(choose(layer(), 1024), Wide if missing else Flow)
        assert isinstance(choose(layer(), 512), Stream if missing else Flow)
        # 320 of 512 columns
        assert isinstance(choose(layer(320), 4096), Tiles if missing else Pairs)
    assert choose(layer(), 4096).activation_groups(layer()) is None
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 5))
    assert isinstance(choose(layer(), 4096), Tiles if missing else Pairs)


@pytest.mark.parametrize(
    ("changes", "choice"),
    [
        ({}, Wide(5, 2)),
        ({}, Wide(1, 2)),
        ({}, Wide(2, 0)),
        ({"format": "fp8_block"}, Wide(4, 2)),
        ({"intermediate": 2080}, Wide(4, 2)),
    ],
    ids=["too-much-memory", "half-a-step", "no-codes", "fp8", "not-in-groups-of-64"],
)
def test_what_it_cannot_take_is_refused(changes, choice):
    check(layer(), Wide(4, 2))
    with pytest.raises(ValueError, match=" expected$"):
        check(layer(**changes), choice)
