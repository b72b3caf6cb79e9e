"""The Hopper kernels compiled for sm_90a without a GPU: which instructions they come down to."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from moe_backend.kernels.hopper import device
from moe_backend.kernels.triton.kernel import FORMATS

OPERANDS = {"bf16": "*bf16", "fp8_block": "*fp8e4nv", "nvfp4": "*bf16"}
WEIGHTS = {"bf16": "bf16", "fp8_block": "fp8e4nv", "nvfp4": "i32"}
SCALES = {"bf16": "*bf16", "fp8_block": "*fp32", "nvfp4": "*fp8e4nv"}
MULTIPLES_OF_16 = ("H", "I", "operand_width", "hidden_width", "scale_columns")
SHARED = {"SCALE_N": 128, "SCALE_K": 128, "EXPERTS": 64, "BLOCK_M": 16, "PTX": True, "PDL": True}


def compiled(kernel, name, box, constants):
    """Everything that the compiler makes of one of the GEMMs, sizes being multiples of 16."""
    constants = {**SHARED, "FORMAT": FORMATS[name], **constants}
    kinds = {
        "operand": OPERANDS[name],
        "hidden": OPERANDS[name],
        "w13": f"tensordesc<{WEIGHTS[name]}{box}>",
        "w2": f"tensordesc<{WEIGHTS[name]}{box}>",
        "w13_scale": SCALES[name],
        "w2_scale": SCALES[name],
        "partial": "*bf16",
        "slots": "*i32",
        "ends": "*i32",
        **dict.fromkeys(("limit", "alpha", "beta"), "fp32"),
        **dict.fromkeys(("operand_scale", "hidden_scale", "topk_weights"), "*fp32"),
        **dict.fromkeys(("w13_global", "w2_global"), "*fp32"),
    }
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in MULTIPLES_OF_16
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "num_stages": constants["STAGES"], "launch_pdl": True}
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).asm


def gate_up(name, split, block_i, block_k):
    columns = block_k // 8 if name == "nvfp4" else block_k
    box = [1, block_i, columns] if split else [1, block_i // 8, 2, 8, columns]
    constants = {"TOP_K": 8, "ACTIVATION": 1, "BLOCK_I": block_i, "BLOCK_K": block_k, "STAGES": 3}
    return compiled(device.gate_up_kernel, name, box, {**constants, "SPLIT": split})


@pytest.mark.parametrize(
    ("name", "split", "block_i", "block_k", "instruction"),
    [
        ("fp8_block", True, 64, 128, "m64n16k32.f32.e4m3.e4m3"),
        ("fp8_block", False, 32, 128, "m64n16k32.f32.e4m3.e4m3"),
        ("nvfp4", False, 32, 256, "m64n16k16.f32.bf16.bf16"),
        ("bf16", True, 64, 64, "m64n16k16.f32.bf16.bf16"),
    ],
)
def test_gate_up(name, split, block_i, block_k, instruction):
    made = gate_up(name, split, block_i, block_k)
    assert set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", made["ptx"])) == {
        instruction
    }
    assert "mma.sync" not in made["ptx"].replace("mma_async.sync", "")
    assert "cp.async.bulk.tensor" in made["ptx"]
    assert "griddepcontrol.wait" in made["ptx"]
    # Nothing on its way from memory to the MMA changes its layout: the NVFP4 decoder and the turns
    # of gate and up rows are arranged so. What is left is in the epilogue.
    loop = made["ttgir"][made["ttgir"].index("scf.for") : made["ttgir"].rindex("warp_group_dot")]
    assert loop.count("ttg.convert_layout") == 0


@pytest.mark.parametrize(
    ("name", "block_k"), [("fp8_block", 64), ("fp8_block", 32), ("nvfp4", 256), ("bf16", 64)]
)
def test_down(name, block_k):
    columns = block_k // 8 if name == "nvfp4" else block_k
    constants = {
        "WEIGHT_ON_INPUT": False,
        "GROUP": 64,
        "BLOCK_H": 128,
        "BLOCK_K": block_k,
        "STAGES": 3,
    }
    made = compiled(device.down_kernel, name, [1, 128, columns], constants)
    kind = "e4m3.e4m3" if name == "fp8_block" else "bf16.bf16"
    found = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.\w+\.f32\.([\w.]+)", made["ptx"]))
    assert found == {kind}
    assert "mma.sync" not in made["ptx"].replace("mma_async.sync", "")
    if name == "nvfp4":
        # Codes, scales and tokens of later steps are on their way while one is multiplied.
        loop = made["ttgir"][: made["ttgir"].rindex("warp_group_dot")]
        loop = loop[loop.rindex("scf.for") :]
        assert loop.count("async_copy_global_to_local") == 3
        assert "tt.load" not in loop
        assert "ttg.convert_layout" not in loop
