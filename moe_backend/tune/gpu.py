"""Choices run on this machine's GPU: compiled, checked against plain torch, timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch

from moe_backend.bench import measure
from moe_backend.bench.inputs import Inputs, make_inputs
from moe_backend.bench.shapes import Shape
from moe_backend.formats import Weights
from moe_backend.formats.fp8_block import dequantize_per_group, quantize_per_group
from moe_backend.kernels.hopper.kernel import HopperKernel, run
from moe_backend.kernels.hopper.methods import Choice
from moe_backend.kernels.reference import fused_experts
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.variants import compile_variants
from moe_backend.tune.loop import Checked, Lost
from moe_backend.verify.metrics import difference
from moe_backend.verify.run import REL_L2, REL_L2_QUANTISED

CHECKED_TOKENS = 1024
RUNS = 3  # whose outputs must be the same bits
MILLISECONDS = 20  # of replays in one measurement
COMPILE_SECONDS = 300.0  # for the choices of one round; those not compiled by then are at their run


class GpuRunner:
    """`loop.Runner` for one layer and token count."""

    def __init__(self, shape: Shape, weights: Weights, tokens: int, jobs: int) -> None:
        """Make inputs with a typical routing.

        Args:
            jobs: threads that compile.
        """
        self.layer: LayerConfig = shape.layer()
        self.weights = weights
        self.tensors = HopperKernel().prepare(weights)
        self.jobs = jobs
        device = str(weights.w13.device)
        self.given: Inputs = make_inputs(shape, weights, tokens, "typical", device)
        self.sample = torch.randperm(tokens, device=device)[:CHECKED_TOKENS]
        self._expected: dict[tuple[int, int] | None, torch.Tensor] = {}
        self._captured: tuple[Choice, Callable[[], None], torch.Tensor] | None = None

    def compile(self, choices: list[Choice]) -> None:
        def quietly(choice: Choice) -> None:
            with contextlib.suppress(Exception):  # `check` meets it again and says so
                self._call(choice)(*self.given.args)

        calls = [lambda c=c: quietly(c) for c in choices]  # type: ignore[misc]
        compile_variants(calls, time.monotonic() + COMPILE_SECONDS, self.jobs)

    def check(self, choice: Choice) -> Checked:
        try:
            replay, out = self._capture(choice)
            outputs = []
            for _ in range(RUNS):
                out.fill_(float("nan"))
                replay()
                outputs.append(out.clone())
            finite = bool(outputs[0].isfinite().all())  # waits, so errors of the launches are here
        except Exception:
            _still_there()
            raise
        groups = choice.activation_groups(self.layer)
        found = difference(outputs[0][self.sample].float(), self.expected(groups))
        limit = REL_L2 if groups is None else REL_L2_QUANTISED
        fault = None
        if not finite:
            fault = "wrong: not finite"
        elif not found.within(limit):
            fault = f"wrong: relative L2 {found.rel_l2:.3g}, norm {found.norm_ratio:.4g} times"
        elif not all(torch.equal(outputs[0], other) for other in outputs[1:]):
            fault = "repeated runs differ"
        return Checked(found.rel_l2, fault)

    def time(self, choice: Choice) -> float:
        # With L2 as between a model's layers: some choices leave what it holds alone
        # (`flow.streams`), which would count against them where that has to be written back.
        return measure.microseconds(self._capture(choice)[0], MILLISECONDS, "read")

    def expected(self, groups: tuple[int, int] | None) -> torch.Tensor:
        """What the sampled tokens must give with activations quantised in these groups."""
        if groups not in self._expected:

            def quantised(values: torch.Tensor, gemm: int) -> torch.Tensor:
                assert groups is not None
                group = groups[gemm - 1]
                return dequantize_per_group(*quantize_per_group(values, group), group)

            given, rows = self.given, self.sample
            self._expected[groups] = fused_experts(
                given.x[rows].float(), self.weights, given.topk_weights[rows],
                given.topk_ids[rows], self.layer.activation, given.expert_map,
                activation_quant=None if groups is None else quantised,
            )  # fmt: skip
        return self._expected[groups]

    def _call(self, choice: Choice) -> Callable[..., torch.Tensor]:
        def call(*args: torch.Tensor | None) -> torch.Tensor:
            return run(self.layer, self.tensors, *args, choice)  # type: ignore[call-arg,arg-type]

        return call

    def _capture(self, choice: Choice) -> tuple[Callable[[], None], torch.Tensor]:
        """As a CUDA graph; one is kept, as each holds the memory of a call."""
        if self._captured is None or self._captured[0] != choice:
            self._captured = None
            self._captured = (choice, *measure.capture(self._call(choice), self.given.args))
        return self._captured[1:]


def _still_there() -> None:
    """Raises Lost if the last error has left the GPU unusable for this process."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception as error:
        raise Lost(f"the GPU takes no more work: {' '.join(str(error).split())[:200]}") from error
