"""Each activation against its formula written out once more with the math module."""

from __future__ import annotations

import math

import pytest
import torch

from moe_backend.activation import Activation, ActivationKind

GATES = [-60.0, -8.5, -7.0, -1.0, -0.0, 0.5, 3.0, 6.99, 7.0, 7.01, 7.006, 9.99, 10.0, 10.5, 40.0]
UPS = [-11.0, -7.5, -7.0, -2.0, 0.0, 1.0, 7.0, 7.25, 9.9, 10.0, 12.0]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x)) if x > -700 else 0.0


FORMULAS = {
    "silu": lambda g, u: silu(g) * u,
    "swiglustep": lambda g, u: min(silu(g), 7.0) * max(-7.0, min(u, 7.0)),
    "clamped_silu": lambda g, u: silu(min(g, 10.0)) * max(-10.0, min(u, 10.0)),
    "swigluoai_uninterleave": lambda g, u: (
        min(g, 7.0) / (1 + math.exp(-1.702 * min(g, 7.0))) * (max(-7.0, min(u, 7.0)) + 1.0)
    ),
}


def activation(name: str) -> Activation:
    return Activation.from_name(name, limit=10.0 if name == "clamped_silu" else None)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    for g in GATES:
        for u in UPS:
            got = activation(name)(torch.tensor(g), torch.tensor(u)).item()
            assert got == pytest.approx(FORMULAS[name](g, u), rel=2e-6, abs=1e-30)


def test_formulas_differ_where_they_should():
    """Taking one for another is an error that data in range must show."""
    g, u = torch.tensor(GATES), torch.tensor(UPS)
    g, u = torch.meshgrid(g, u, indexing="ij")
    outputs = [activation(name)(g, u) for name in FORMULAS]
    for i, a in enumerate(outputs):
        for b in outputs[i + 1 :]:
            assert (a - b).norm() / a.norm() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_fp32(dtype):
    gate, up = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    out = activation("swiglustep")(gate, up)
    assert out.dtype == torch.float32
    assert torch.equal(out, activation("swiglustep")(gate.float(), up.float()))


def test_constants_come_from_the_layer():
    assert Activation.from_name("swiglustep").limit == 7.0
    assert Activation.from_name("swiglustep", limit=3.0).limit == 3.0
    assert Activation.from_name("silu", limit=10.0).kind is ActivationKind.CLAMPED_SILU
    oai = Activation.from_name("swigluoai_uninterleave", alpha=1.5, beta=0.0, limit=5.0)
    assert (oai.alpha, oai.beta, oai.limit) == (1.5, 0.0, 5.0)


@pytest.mark.parametrize("name", ["gelu", "swigluoai", "relu2_no_mul", ""])
def test_unknown_name(name):
    with pytest.raises(
        ValueError, match=r"not supported.*accepted: silu, swiglustep, clamped_silu"
    ):
        Activation.from_name(name)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limit_must_be_positive(limit):
    with pytest.raises(ValueError, match="positive limit"):
        Activation.from_name("swiglustep", limit=limit)


def test_swiglustep_equals_vllm():
    activations = pytest.importorskip("vllm.model_executor.layers.activation")
    from vllm.config import VllmConfig, set_current_vllm_config

    x = torch.randn(256, 128) * 8
    with set_current_vllm_config(VllmConfig()):
        op = activations.SwigluStepAndMul(limit=7.0)
    mine = Activation.from_name("swiglustep")(*x.chunk(2, dim=-1))
    assert torch.allclose(op.forward_native(x), mine, rtol=1e-6)


def test_constants_are_floats_whatever_the_config_has():
    """An int reaches a kernel's float argument as other bits."""
    activation = Activation.from_name("swigluoai_uninterleave", limit=7, alpha=2, beta=1)
    constants = (activation.limit, activation.alpha, activation.beta)
    assert constants == (7, 2, 1)
    assert all(type(constant) is float for constant in constants)
