"""The kernels for few tokens, compiled for sm_90a without a GPU: what the loads come down to."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from moe_backend.kernels.hopper import few_device
from moe_backend.kernels.triton.kernel import FORMATS

ACTIVATIONS = {"bf16": "*bf16", "fp8_block": "*bf16", "nvfp4": "*i32"}
WEIGHTS = {"bf16": "*bf16", "fp8_block": "*fp8e4nv", "nvfp4": "*u8"}
SCALES = {"bf16": "*bf16", "fp8_block": "*fp32", "nvfp4": "*fp8e4nv"}
SHARED = {
    "TOP_K": 8,
    "SLOTS": 64,
    "IDS": 288,
    "HAS_MAP": True,
    "WEIGHT_ON_INPUT": False,
    "PTX": True,
}


def machine_code(kernel, name, lanes, unroll, warps, **constants):
    """Operations of the machine code in order, such as `LDG.E.128`, and all that was compiled."""
    constants = {
        **SHARED, "FORMAT": FORMATS[name], "HALF": False, "PDL": True, "H": 4096, "I": 1280,
        "SCALE_N": 128, "SCALE_K": 128, "GROUPS": warps * 32 // lanes, "LANES": lanes,
        "UNROLL": unroll, **constants,
    }  # fmt: skip
    kinds = {
        "x": ACTIVATIONS[name],
        "w13": WEIGHTS[name],
        "w2": WEIGHTS[name],
        "w13_scale": SCALES[name],
        "w2_scale": SCALES[name],
        "hidden": ACTIVATIONS[name] if kernel is few_device.down_kernel else "*bf16",
        "out": "*bf16",
        **dict.fromkeys(("w13_global", "w2_global", "topk_weights"), "*fp32"),
        **dict.fromkeys(("ids", "expert_map"), "*i32"),
        **dict.fromkeys(("limit", "alpha", "beta"), "fp32"),
        **dict.fromkeys(("num_slots", "programs"), "i32"),
    }
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "launch_pdl": True}
    made = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = re.findall(r"\b([A-Z][A-Z0-9_]+(?:\.[A-Z0-9_]+)*)\b(?=[ ;])", made.asm["sass"])
    return code, made


@pytest.mark.parametrize("lanes", [4, 32])
@pytest.mark.parametrize("name", list(FORMATS))
def test_gate_up_loads_straight_to_registers(name, lanes):
    code, made = machine_code(few_device.gate_up_kernel, name, lanes, 4, 1, ACTIVATION=1)
    assert not [c for c in code if c.startswith(("LDS", "STS", "LDL", "STL", "LDSM"))]
    assert made.metadata.shared == 0
    # All the weights of a step are on their way before the first product.
    until = next(i for i, c in enumerate(code) if c.startswith("FFMA"))
    assert code[:until].count("LDG.E.128") >= 2 * 4


@pytest.mark.parametrize("name", list(FORMATS))
def test_down_loads_before_it_waits(name):
    code, _ = machine_code(few_device.down_kernel, name, 16, 4, 1)
    assert not [c for c in code if c.startswith(("LDS", "STS", "LDL", "STL", "LDSM"))]
    wait = code.index("ACQBULK")
    assert code[:wait].count("LDG.E.128") >= 4
