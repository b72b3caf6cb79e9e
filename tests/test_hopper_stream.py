"""FP8 and NVFP4 with a few tokens per expert: what copies bring, the GEMMs compiled for sm_90a.

In Triton's interpreter run the dealing out of tiles (`hopper_share.py`) and the routing launch
(`hopper_sort.py`).
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
from interpreted import assert_right
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from moe_backend.kernels.hopper import methods, stream, stream_device, stream_nvfp4_device, tiles
from moe_backend.kernels.hopper.tiles import Stream, Tiles, triton_version
from moe_backend.verify.problems import ACTIVATIONS, Case, build

GRID = (128, 128)
TWO_PROGRAMS = 113 * 1024  # of shared memory each, so that two share a multiprocessor


def layer(w13_block=GRID, w2_block=GRID, intermediate=1280, hidden=4096):
    base = build(Case("fp8_block", ACTIVATIONS[0])).layer
    return replace(
        base, hidden_size=hidden, intermediate_size=intermediate, top_k=8, num_experts=288,
        num_local_experts=36, w13_block=w13_block, w2_block=w2_block, device="cuda",
    )  # fmt: skip


def compiled(first, choice, block):
    """One of the GEMMs for a weight block."""
    box = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    row = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    turns = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=5)
    constants = {
        "TOKENS": choice.tokens, "SCALE_N": block[0], "SCALE_K": block[1], "PDL": True,
        "STAGES": choice.stages13 if first else choice.stages2,
        "CONSUMER_REGISTERS": 104, "COPY_REGISTERS": 24,
    }  # fmt: skip
    constants |= {"ACTIVATION": 1} if first else {"SUB": min(64, block[1])}
    weights = f"[1,4,2,8,128],{turns!r}" if first else f"[64,128],{box!r}"
    kinds = {
        "x": f"tensordesc<fp8e4nv[{choice.tokens},128],{box!r}>",
        "x_scale": f"tensordesc<fp32[1,32],{row!r}>",
        "w": f"tensordesc<fp8e4nv{weights}>",
        "out": "*fp8e4nv" if first else "*bf16",
        **dict.fromkeys(("tiles", "flags"), "*i32"),
        **dict.fromkeys(("w_scale", "out_scale", "sums"), "*fp32"),
        **dict.fromkeys(("limit", "alpha", "beta"), "fp32"),
    }
    kernel = stream_device.gate_up_kernel if first else stream_device.down_kernel
    return built(kernel, constants, kinds)


def built(kernel, constants, kinds):
    """Compiled, with sizes that are multiples of 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in ("N", "K", "scale_columns", "width")
    }
    source = GluonASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4, "launch_pdl": True, "maxnreg": 80}
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_every_step_is_dealt_out_once():
    assert_right("hopper_share.py")


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(
    ("first", "block"),
    [(True, GRID), (True, (32, 128)), (False, GRID), (False, (128, 32))],
    ids=["gate-up", "gate-up-32-rows", "down", "down-32-columns"],
)
def test_gemm(first, block, tokens, tmp_path):
    made = compiled(first, tiles.stream(layer(), tokens), block)
    ptx = made.asm["ptx"]
    found = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", ptx))
    assert found == {f"m64n{tokens}k32.f32.e4m3.e4m3"}
    assert f"cp.async.bulk.tensor.{5 if first else 2}d" in ptx
    assert made.metadata.shared <= TWO_PROGRAMS
    copies_before_the_wait(ptx, not first)
    # Once for the barriers; and in each warp group before the tokens' scales may be overwritten.
    assert ptx.count("fence.proxy.async") == 3
    registers, stack, code = machine(made, tmp_path)
    assert registers <= 80
    assert stack <= 32
    # All products of a step are on their way before the first wait.
    assert 0 < 4 * code.count("WARPGROUP.DEPBAR") <= code.count("QGMMA")


def compiled_nvfp4(gated, choice):
    box = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    words = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
    constants = {
        "TOKENS": choice.tokens, "GATED": gated, "ACTIVATION": 3, "PDL": True,
        "STAGES": choice.stages13 if gated else choice.stages2,
        "CONSUMER_REGISTERS": 104, "COPY_REGISTERS": 24,
    }  # fmt: skip
    kinds = {
        "x": f"tensordesc<bf16[{choice.tokens},64],{box!r}>",
        "w": f"tensordesc<i32[4,2,8,32],{words!r}>",
        "w_scale": "*fp8e4nv",
        "w_global": "*fp32",
        "out": "*bf16",
        "sums": "*fp32",
        **dict.fromkeys(("tiles", "flags"), "*i32"),
        **dict.fromkeys(("limit", "alpha", "beta"), "fp32"),
    }
    return built(stream_nvfp4_device.gemm_kernel, constants, kinds)


@pytest.mark.parametrize("tokens", [8, 16, 32])
@pytest.mark.parametrize("gated", [True, False], ids=["gate-up", "down"])
def test_gemm_nvfp4(gated, tokens, tmp_path):
    one = replace(layer(intermediate=2048), format="nvfp4", w13_block=None, w2_block=None)
    made = compiled_nvfp4(gated, tiles.stream(one, tokens))
    ptx = made.asm["ptx"]
    found = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", ptx))
    assert found == {f"m64n{tokens}k16.f32.bf16.bf16"}
    # The first operand comes from registers.
    assert re.search(r"wgmma\.mma_async\S+ \{[^}]*\}, \{[^}]*\}, ", ptx)
    assert made.metadata.shared <= TWO_PROGRAMS
    copies_before_the_wait(ptx, not gated)
    # Codes are read by ordinary loads: before the next copy may write, a fence.
    assert ptx.count("fence.proxy.async") == 3
    registers, stack, code = machine(made, tmp_path)
    assert registers <= 80
    assert stack <= 16
    # Short of registers, the assembler would wait for each product before the next.
    assert 0 < 8 * code.count("WARPGROUP.DEPBAR") <= code.count("HGMMA")


def copies_before_the_wait(ptx, expected):
    """Whether weights, but no tokens, are copied before the launch before has ended."""
    before, _ = ptx.split("griddepcontrol.wait")
    assert (before.count("cp.async.bulk.tensor") == 2) == expected
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")


def machine(made, folder):
    """Registers and bytes of stack of a thread when it starts, and the instructions."""
    cubin = folder / "gemm.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", cubin)
    registers, stack = (max(map(int, re.findall(rf"{n}:(\d+)", usage))) for n in ("REG", "STACK"))
    return registers, stack, tool("nvdisasm", "-c", cubin)


def tool(name, *arguments):
    """What a tool that comes with Triton prints."""
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_copy_brings_turns_of_eight_gate_and_up_rows():
    experts, intermediate, hidden = 3, 160, 256
    w13 = torch.zeros(experts, 2, intermediate, hidden, dtype=torch.uint8)
    w13[..., 0] = torch.arange(experts)[:, None, None]
    w13[..., 1] = torch.arange(2)[:, None]
    w13[..., 2] = torch.arange(intermediate)
    view = stream._turns_of_eight(w13, experts, intermediate, hidden)
    boxed = view.base.as_strided(view.shape, view.strides)
    for expert in range(experts):
        for first in range(0, intermediate, 32):
            box = boxed[expert, first // 8 : first // 8 + 4, :, :, :128].reshape(64, 128)
            for row in range(64):  # of a warp's 16 rows, eight are gate rows
                column = first + row // 16 * 8 + row % 8
                assert box[row, :3].tolist() == [expert, row % 16 // 8, column]
    assert list(view.block_shape) == [1, 4, 2, 8, 128]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"hidden": 4096 + 64}, "hidden size that is a multiple of 128"),
        ({"w13_block": (16, 128)}, "scale of w13 for 32 rows"),
        ({"w13_block": (128, 64)}, "scale of w13 for a step"),
        ({"w2_block": (32, 128)}, "scale of w2 for 64 rows"),
        ({"w2_block": (128, 16)}, "scales of w2 for 32 columns"),
    ],
)
def test_what_the_device_code_cannot_take_is_refused(changes, wanted):
    stream.check(layer(), Stream(8, 6, 6))
    with pytest.raises(ValueError, match=wanted):
        stream.check(layer(**changes), Stream(8, 6, 6))


def nvfp4(**sizes):
    return replace(layer(**sizes), format="nvfp4", w13_block=None, w2_block=None)


@pytest.mark.parametrize("one", [layer(), nvfp4(intermediate=2048)], ids=lambda one: one.format)
def test_stages_fill_shared_memory(one):
    for tokens, found in tiles.STREAM_STAGES[one.format].items():
        fit = [min(6, stream.most_stages(one, tokens, first)) for first in (True, False)]
        assert list(found) == fit, tokens
        methods.check(one, 8, tiles.stream(one, tokens))


@pytest.mark.parametrize(
    ("one", "tokens", "wanted"),
    [
        (layer(), 8, Tiles),  # 7 experts of 20 tiles: fewer than programs
        (layer(), 32, 8),
        (layer(), 144, 8),
        (layer(), 160, Tiles),
        (layer(w2_block=(32, 128)), 64, Tiles),  # what the device code cannot take
        (nvfp4(intermediate=2048), 64, 8),
        (nvfp4(intermediate=2048), 256, 16),
        (nvfp4(intermediate=2048), 512, 32),
        (nvfp4(intermediate=2048), 800, Tiles),
        (nvfp4(intermediate=2080), 64, Tiles),
        (replace(nvfp4(intermediate=2048), num_experts=2048), 1025, Tiles),  # beyond 8192 slots
    ],
)
def test_where_it_is_the_default(one, tokens, wanted, monkeypatch):
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 6))
    found = tiles.choose(one, tokens)
    if wanted is Tiles:
        assert isinstance(found, Tiles)
    else:
        assert isinstance(found, Stream)
        assert found.tokens == wanted
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 5))
    assert not isinstance(tiles.choose(one, tokens), Stream)


def test_tuning_takes_it_into_account():
    one = layer()
    here = triton_version() >= (3, 6)
    for tokens, wanted in ((8, 8), (64, 8), (250, 16), (2048, None)):
        found = [c for c in methods.candidates(one, tokens) if isinstance(c, Stream)]
        wanted_here = {wanted} if wanted and here else set()
        assert {c.tokens for c in found} >= wanted_here, tokens
        assert bool(found) == bool(wanted_here), tokens
    with pytest.raises(ValueError, match="8200 slots, at most 8192"):
        methods.check(one, 1025, Stream(8, 6, 6))
    with pytest.raises(ValueError, match="stages13: 2 to 4 fit"):
        methods.check(one, 8, Stream(16, 6, 5))
    with pytest.raises(ValueError, match="stages13: 3 found, must be even"):
        methods.check(one, 8, Stream(16, 3, 5))
    with pytest.raises(ValueError, match=r"tiles of \[8, 16\] tokens"):
        methods.check(one, 8, Stream(32, 4, 4))
    for choice in methods.neighbours(one, 64, Stream(8, 6, 6)):
        methods.check(one, 64, choice)
    assert methods.from_data(methods.to_data(Stream(16, 4, 5))) == Stream(16, 4, 5)
