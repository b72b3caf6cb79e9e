"""What `moe-backend doctor` prints about the choice of kernels."""

from __future__ import annotations

from moe_backend import doctor
from moe_backend.doctor import LayerRow

NO_GPU, ONLY = "not hopper: no GPU", "not vllm_cpu: bf16 only"


def test_each_reason_is_told_once_with_its_layers():
    rows = [
        LayerRow("bf16", "silu", "vllm_cpu", "faster", (NO_GPU,)),
        LayerRow("bf16", "swiglustep(limit=7.0)", "reference", "plain", (NO_GPU,)),
        LayerRow("nvfp4", "silu", "reference", "plain", (NO_GPU, ONLY)),
    ]
    assert doctor.reasons(rows) == {
        "vllm_cpu: faster": ["bf16 silu"],
        NO_GPU: ["all"],
        "reference: plain": ["bf16 swiglustep", "nvfp4"],
        ONLY: ["nvfp4"],
    }


def test_no_reason_is_lost():
    layers = doctor.examine().layers
    told = doctor.reasons(layers)
    assert any(row.refusals for row in layers)
    for row in layers:
        assert {f"{row.kernel}: {row.reason}", *row.refusals} <= told.keys()
