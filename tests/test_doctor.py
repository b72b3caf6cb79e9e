"""What `moe-backend doctor` prints about the choice of kernels."""

from __future__ import annotations

from moe_backend import doctor
from moe_backend.doctor import LayerRow

FLOW = "fastest on Hopper; once to 8 tokens, flow"


def test_each_reason_is_told_once_with_its_layers():
    rows = [
        LayerRow("bf16", "silu", "vllm_cpu", "faster; not hopper: no GPU"),
        LayerRow("bf16", "swiglustep(limit=7.0)", "reference", "plain; not hopper: no GPU"),
        LayerRow(
            "nvfp4", "silu", "reference", "plain; not hopper: no GPU; not vllm_cpu: bf16 only"
        ),
        LayerRow("nvfp4", "swiglustep(limit=7.0)", "reference", f"plain; not hopper: {FLOW}"),
    ]
    assert doctor.reasons(rows[:3]) == {
        "vllm_cpu: faster": ["bf16 silu"],
        "not hopper: no GPU": ["all"],
        "reference: plain": ["bf16 swiglustep", "nvfp4"],
        "not vllm_cpu: bf16 only": ["nvfp4"],
    }
    assert f"not hopper: {FLOW}" in doctor.reasons(rows)  # which has a semicolon of its own


def test_no_reason_is_lost():
    layers = doctor.examine().layers
    told = doctor.reasons(layers)
    for row in layers:
        parts = [reason for reason in told if reason.partition(": ")[2] in row.reason]
        assert f"{row.kernel}: {row.reason.split('; not ')[0]}" in parts
        assert len(parts) >= 1 + row.reason.count("; not ")
