"""This package's kernels for AMD targets, with the cases that they climb the ladder with."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch

from moe_backend.activation import Activation
from moe_backend.formats import Bf16Weights
from moe_backend.kernels.registry import Kernel, LayerConfig
from moe_backend.verify.amd import KernelCase, KernelUnderTest
from moe_backend.verify.naive import naive_experts
from moe_backend.verify.problems import Case, build, cases
from moe_backend.verify.sparse import sparse


def own_kernels(*, quick: bool = False, only: str | None = None) -> list[KernelUnderTest]:
    """The kernels of this package that can be compiled for AMD.

    Args:
        quick: one case of each format, instead of every small one and weights beyond 4 GiB.
        only: name of the one kernel to take; None for all.

    Raises:
        ValueError: Triton is not installed, or there is no kernel `only` for AMD targets.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("compiling for AMD needs Triton: pip install triton")
    from moe_backend.kernels.triton.kernel import TritonKernel

    kernel = TritonKernel()
    if only not in (None, kernel.name):
        raise ValueError(f"no kernel {only!r} for AMD targets; there is {kernel.name}")
    small = [c for c in cases() if c.tokens <= 10 and c.hidden_size <= 128]
    if quick:
        small = list({c.format: c for c in reversed(small)}.values())[::-1]
    chosen = [_small_case(kernel, case) for case in small]
    if not quick:
        chosen.append(_beyond_4_gib(kernel))
    return [KernelUnderTest(kernel.name, tuple(chosen))]


def _small_case(kernel: Kernel, case: Case) -> KernelCase:
    problem = build(case)

    def run() -> torch.Tensor:
        layer = replace(problem.layer, device="cuda")
        tensors = kernel.prepare(problem.weights)
        return kernel.apply(
            layer, tensors, problem.x, problem.topk_weights, problem.topk_ids, problem.expert_map
        )

    return KernelCase(case.name, run, lambda: problem.reference, exact=case.integer)


def _beyond_4_gib(kernel: Kernel) -> KernelCase:
    """bf16 `w13` of 4.7 GiB and 2.5e9 elements, of which the experts at both ends are used."""
    experts, hidden, intermediate, used = 600, 1024, 2048, (0, 300, 599)
    activation = Activation.from_name("silu")
    layer = LayerConfig(
        format="bf16", num_experts=experts, num_local_experts=experts, top_k=1,
        hidden_size=hidden, intermediate_size=intermediate, activation=activation,
        dtype="bfloat16", device="cuda",
    )  # fmt: skip

    def few() -> Bf16Weights:
        """The experts that are used, by themselves."""
        g = torch.Generator().manual_seed(1)
        w13 = torch.randn(len(used), 2 * intermediate, hidden, generator=g) / hidden**0.5
        w2 = torch.randn(len(used), hidden, intermediate, generator=g) / intermediate**0.5
        return Bf16Weights(w13.bfloat16(), w2.bfloat16())

    x = torch.randn(len(used), hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    ids, weights = torch.tensor(used, dtype=torch.int32)[:, None], torch.ones(len(used), 1)

    def run() -> torch.Tensor:
        w13 = sparse((experts, 2 * intermediate, hidden), torch.bfloat16)
        w2 = sparse((experts, hidden, intermediate), torch.bfloat16)
        for place, expert in enumerate(used):
            w13[expert], w2[expert] = few().w13[place], few().w2[place]
        tensors = kernel.prepare(Bf16Weights(w13, w2))
        return kernel.apply(layer, tensors, x, weights, ids, None)

    def reference() -> torch.Tensor:
        ids = torch.arange(len(used), dtype=torch.int32)[:, None]
        return naive_experts(x, few(), weights, ids, activation, None)

    return KernelCase("bf16 weights beyond 4 GiB", run, reference)
