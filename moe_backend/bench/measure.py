"""One call: captured in a CUDA graph, checked against the reference, timed if it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_backend.bench.inputs import Inputs
from moe_backend.engines.vllm_rivals import Args, Experts
from moe_backend.verify.metrics import difference

# FP8 activations are 4 % from exact ones; the rivals and ours may quantise them or not.
WRONG = 0.08


@dataclass(frozen=True)
class Result:
    """How a backend did with one call.

    Attributes:
        us: microseconds, `wrong`, or None where it could not run.
        rel_l2: relative L2 error of the sampled tokens; None where it could not run.
        note: why it could not run, or what it chose.
    """

    us: float | str | None
    rel_l2: float | None = None
    note: str = ""


def measure(call: Experts, given: Inputs, note: str = "") -> Result:
    """Run it, check it, and time it if it is right.

    Args:
        note: goes into a result that could be had.
    """
    try:
        replay, out = capture(call, given.args)
        out.fill_(float("nan"))
        replay()
        found = difference(out[given.sample].float(), given.expected)
        if not (found.finite and found.rel_l2 < WRONG):
            return Result("wrong", found.rel_l2 if found.finite else None, note)
        return Result(round(microseconds(replay), 2), round(found.rel_l2, 5), note)
    except Exception as error:  # whatever a backend raises: the others are still measured
        return Result(None, None, reason(error))


def reason(error: Exception) -> str:
    """One line, not too long, for a report."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:300]


def capture(call: Experts, args: Args) -> tuple[Callable[[], None], torch.Tensor]:
    """The call as a CUDA graph: its replay, and the output that a replay fills."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            call(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    return graph.replay, out


def microseconds(replay: Callable[[], None], milliseconds: int = 60) -> float:
    """Median of replays for so long, each with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(replay, warmup=15, rep=milliseconds, return_mode="median")) * 1e3


def quick_milliseconds(call: Experts, args: Args) -> float:
    """For choosing among many: replays for a few milliseconds, unchecked."""
    replay, _ = capture(call, args)
    return microseconds(replay, 10) / 1e3
