"""Run every case on every kernel of this machine, then every control."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moe_backend.formats import Weights
from moe_backend.formats.fp8_block import dequantize_per_group, quantize_per_group
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.reference import fused_experts
from moe_backend.kernels.registry import kernels
from moe_backend.verify.controls import controls
from moe_backend.verify.metrics import Difference, difference
from moe_backend.verify.problems import Case, Problem, build, cases

# bf16 operands with fp32 sums: three roundings to 8 bits of mantissa.
REL_L2 = 8e-3
# With activations in fp8 as well: a code next to a rounding boundary may fall on either side.
REL_L2_QUANTISED = 2e-2
# The fp32 reference against float64.
REL_L2_FP32 = 1e-5


@dataclass(frozen=True)
class CaseResult:
    """One kernel on one case."""

    name: str
    kernel: str
    format: str
    layout: str
    rel_l2: float
    norm_ratio: float
    finite: bool
    ok: bool


@dataclass(frozen=True)
class ControlResult:
    """One control, and whether the check flagged it."""

    name: str
    caught: bool
    rel_l2: float


def passes(found: Difference, case: Case, *, quantised: bool = False) -> bool:
    """The check of a kernel: bit for bit on integer-valued data, `REL_L2` elsewhere.

    Activations that the kernel quantises are rounded: `REL_L2_QUANTISED` with all data.
    """
    if quantised:
        return found.within(REL_L2_QUANTISED)
    return found.finite and found.equal if case.integer else found.within(REL_L2)


def expected(problem: Problem, groups: tuple[int, int] | None) -> torch.Tensor:
    """What a kernel must return that quantises activations in these groups, or does not (None)."""
    if groups is None:
        return _as_kernel_returns(problem)

    def quantised(values: torch.Tensor, gemm: int) -> torch.Tensor:
        assert groups is not None
        return dequantize_per_group(*quantize_per_group(values, groups[gemm - 1]), groups[gemm - 1])

    return fused_experts(
        problem.x.float(), problem.weights, problem.topk_weights, problem.topk_ids,
        problem.case.activation, problem.expert_map, activation_quant=quantised,
    )  # fmt: skip


def run_cases(
    *, quick: bool = False, device: str = "cpu", only: str | None = None
) -> Iterator[CaseResult]:
    """Every case on every kernel that does not refuse it.

    Args:
        only: name of the one kernel to run; None for all.
    """
    for case in cases(quick):
        problem = build(case)
        layer = replace(problem.layer, device=device)
        for kernel in kernels():
            if only not in (None, kernel.name) or kernel.refusal(layer) is not None:
                continue
            fused = FusedMoE(layer, _to(problem.weights, device), kernel=kernel.name)
            expert_map = problem.expert_map
            out = fused(
                problem.x.to(device),
                problem.topk_weights.to(device),
                problem.topk_ids.to(device),
                None if expert_map is None else expert_map.to(device),
            )
            groups = kernel.activation_groups(layer, case.tokens)
            found = difference(out, expected(problem, groups))
            yield CaseResult(
                name=case.name,
                kernel=kernel.name,
                format=case.format,
                layout=case.layout,
                rel_l2=found.rel_l2,
                norm_ratio=found.norm_ratio,
                finite=found.finite,
                ok=passes(found, case, quantised=groups is not None),
            )


def _as_kernel_returns(problem: Problem) -> torch.Tensor:
    """The float64 reference; rounded to bf16 where the comparison is bit for bit."""
    return problem.reference.bfloat16() if problem.case.integer else problem.reference


def run_controls() -> Iterator[ControlResult]:
    """Every control through the same check as the cases."""
    for control in controls():
        out, problem = control.outcome()
        found = difference(out, _as_kernel_returns(problem))
        yield ControlResult(control.name, not passes(found, problem.case), found.rel_l2)


def _to(weights: Weights, device: str) -> Weights:
    moved = {
        name: value.to(device)
        for name, value in vars(weights).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(weights, **moved)  # type: ignore[arg-type]
