"""NVFP4 with a few tokens per expert: GEMMs compiled for sm_90a, and where they are the default.

In Triton's interpreter runs the dealing out of tiles (`hopper_share.py`).
"""

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

from moe_backend.kernels.hopper import methods, stream, stream_nvfp4_device, tiles
from moe_backend.kernels.hopper.tiles import Stream, Tiles, triton_version
from moe_backend.verify.problems import ACTIVATIONS, Case, build

TWO_PROGRAMS = 113 * 1024  # of shared memory each, so that two share a multiprocessor


def layer(**changes):
    sizes = {
        "hidden_size": 4096, "intermediate_size": 2048, "top_k": 8, "num_experts": 288,
        "num_local_experts": 36, "device": "cuda",
    }  # fmt: skip
    return replace(build(Case("nvfp4", ACTIVATIONS[0])).layer, **(sizes | changes))


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


def compiled(gated, choice):
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
def test_gemm(gated, tokens, tmp_path):
    made = compiled(gated, tiles.stream(tokens))
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


@pytest.mark.parametrize(
    ("changes", "choice", "wanted"),
    [
        ({"format": "bf16"}, Stream(8, 5, 5), "NVFP4"),
        (
            {"intermediate_size": 2080},
            Stream(8, 5, 5),
            "intermediate size that is a multiple of 64",
        ),
        ({"hidden_size": 4112}, Stream(8, 5, 5), "sizes that are multiples of 32"),
        ({}, Stream(24, 3, 3), r"tiles of \[8, 16, 32\] tokens"),
    ],
)
def test_what_the_device_code_cannot_take_is_refused(changes, choice, wanted):
    stream.check(layer(), Stream(8, 5, 5))
    with pytest.raises(ValueError, match=wanted):
        stream.check(layer(**changes), choice)


def test_stages_fill_shared_memory():
    for tokens, stages in tiles.STREAM_STAGES.items():
        assert stages == stream.most_stages(tokens), tokens
        methods.check(layer(), 8, tiles.stream(tokens))


@pytest.mark.parametrize(
    ("one", "tokens", "wanted"),
    [
        (layer(), 64, 8),
        (layer(num_local_experts=8), 16, Tiles),  # 3 experts of 32 tiles: fewer than programs
        (layer(), 256, 16),
        (layer(), 512, 32),
        (layer(), 800, Tiles),
        (layer(intermediate_size=2080), 64, Tiles),  # what the device code cannot take
        (layer(num_experts=2048), 1025, Tiles),  # beyond 8192 slots
    ],
)
def test_where_it_is_the_default(one, tokens, wanted, monkeypatch):
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(tiles.build, "missing", lambda: "no compiler")  # else Flow is
    found = tiles.choose(one, tokens)
    if wanted is Tiles:
        assert isinstance(found, Tiles)
    else:
        assert found == tiles.stream(wanted)
        assert found.activation_groups(one) is None
    monkeypatch.setattr(tiles, "triton_version", lambda: (3, 5))
    assert not isinstance(tiles.choose(one, tokens), Stream)


def test_tuning_takes_it_into_account():
    one = layer()
    here = triton_version() >= (3, 6)
    for tokens, wanted in ((16, 8), (64, 8), (250, 16), (512, 32), (2048, None)):
        found = [c for c in methods.candidates(one, tokens) if isinstance(c, Stream)]
        wanted_here = {wanted} if wanted and here else set()
        assert {c.tokens for c in found} >= wanted_here, tokens
        assert bool(found) == bool(wanted_here), tokens
    with pytest.raises(ValueError, match="8200 slots, at most 8192"):
        methods.check(one, 1025, Stream(8, 5, 5))
    with pytest.raises(ValueError, match="stages13: 2 to 4 fit"):
        methods.check(one, 8, Stream(16, 5, 4))
    with pytest.raises(ValueError, match="stages2: 2 to 3 fit"):
        methods.check(one, 8, Stream(32, 3, 1))
    for choice in methods.neighbours(one, 64, Stream(8, 5, 5)):
        methods.check(one, 64, choice)
    assert Stream(16, 4, 4) in methods.neighbours(one, 64, Stream(8, 5, 5))
    assert methods.from_data(methods.to_data(Stream(16, 4, 3))) == Stream(16, 4, 3)
