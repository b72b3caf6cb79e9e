"""Run every case on every kernel of this machine, then every control."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moe_backend.formats.fp8_block import dequantize_per_group, quantize_per_group
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.nvfp4_native import W4A4
from moe_backend.kernels.reference import fused_experts
from moe_backend.kernels.registry import Kernel, kernels
from moe_backend.verify.controls import controls
from moe_backend.verify.metrics import Difference, difference
from moe_backend.verify.problems import Case, Problem, build, cases
from moe_backend.verify.w4a4 import quantised_problem, w4a4_cases

# bf16 operands with fp32 sums: three roundings to 8 bits of mantissa.
REL_L2 = 8e-3
# With activations in fp8 as well: a code next to a rounding boundary may fall on either side.
REL_L2_QUANTISED = 2e-2
# Kernels with NVFP4 activations: the bf16 output of their first GEMM moves some codes by one.
REL_L2_W4A4 = 5e-2
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
        for kernel in _able(problem, device, only):
            if kernel.activations == W4A4:
                continue  # it has problems of its own, whose answers have quantised activations
            groups = kernel.activation_groups(replace(problem.layer, device=device), case.tokens)
            found = difference(_run(kernel, problem, device), expected(problem, groups))
            yield _result(case, kernel, found, passes(found, case, quantised=groups is not None))
    for case in w4a4_cases():
        problem = quantised_problem(case)
        for kernel in _able(problem, device, only):
            if kernel.activations == W4A4:
                found = difference(_run(kernel, problem, device), problem.reference)
                yield _result(case, kernel, found, found.within(REL_L2_W4A4))


def _able(problem: Problem, device: str, only: str | None) -> list[Kernel]:
    layer = replace(problem.layer, device=device)
    return [k for k in kernels() if only in (None, k.name) and k.refusal(layer) is None]


def _run(kernel: Kernel, problem: Problem, device: str) -> torch.Tensor:
    there = problem.to(device)
    fused = FusedMoE(there.layer, there.weights, kernel=kernel.name)
    return fused(there.x, there.topk_weights, there.topk_ids, there.expert_map)


def _result(case: Case, kernel: Kernel, found: Difference, ok: bool) -> CaseResult:
    return CaseResult(
        name=case.name,
        kernel=kernel.name,
        format=case.format,
        layout=case.layout,
        rel_l2=found.rel_l2,
        norm_ratio=found.norm_ratio,
        finite=found.finite,
        ok=ok,
    )


def _as_kernel_returns(problem: Problem) -> torch.Tensor:
    """The float64 reference; rounded to bf16 where the comparison is bit for bit."""
    return problem.reference.bfloat16() if problem.case.integer else problem.reference


def run_controls(device: str = "cpu") -> Iterator[ControlResult]:
    """Every control through the same check as the cases, computed on a device."""
    for control in controls():
        out, problem = control.outcome(device)
        found = difference(out, _as_kernel_returns(problem))
        yield ControlResult(control.name, not passes(found, problem.case), found.rel_l2)
