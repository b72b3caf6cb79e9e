"""One call: captured in a CUDA graph, checked against the reference, timed if it is right."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_backend.bench.inputs import Inputs
from moe_backend.bench.report import CACHED
from moe_backend.engines.vllm_rivals import Args, Experts
from moe_backend.verify.metrics import difference

# What fills L2 before each replay. `written`: zeros just stored, as triton.testing.do_bench has it,
# which have to go back to memory while the call is timed. `read`: other data just loaded, which is
# most of what a model's other layers leave. On an H200 up to 8 us less, up to 256 tokens.
# `layers`: as read, but LAYERS calls in one graph, with the reading before each, which is timed
# alone as well and taken off: what a layer adds to a captured model. A graph's own launch, some 4
# us, is in the other two.
CACHES = tuple(CACHED)
OTHER_BYTES = 1 << 28  # several times an H200's L2
LAYERS = 8
TURNS = 5  # of replays with the calls and without
WARM_UP = 15  # milliseconds

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


def measure(
    call: Experts, given: Inputs, note: str = "", caches: Sequence[str] = ("written",)
) -> dict[str, Result]:
    """Run it, check it, and time it if it is right, by each of some ways of filling L2.

    Args:
        note: goes into a result that could be had.
        caches: of CACHES.
    """
    try:
        replay, out = capture(call, given.args)
        out.fill_(float("nan"))
        replay()
        found = difference(out[given.sample].float(), given.expected)
        if not (found.finite and found.rel_l2 < WRONG):
            return dict.fromkeys(
                caches, Result("wrong", found.rel_l2 if found.finite else None, note)
            )
    except Exception as error:  # whatever a backend raises: the others are still measured
        return dict.fromkeys(caches, Result(None, None, reason(error)))
    results = {}
    for cache in caches:
        try:
            us = _microseconds(call, given.args, replay, 60, cache)
            results[cache] = Result(round(us, 2), round(found.rel_l2, 5), note)
        except Exception as error:  # by another clock it may still be timed
            results[cache] = Result(None, None, reason(error))
    return results


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


def _microseconds(
    call: Experts, args: Args, replay: Callable[[], None], milliseconds: int, cache: str
) -> float:
    """Of a call with a cold L2 cache, timed for so long; `replay` is of its graph."""
    if cache == "layers":
        return 1e3 * _among_layers(call, args, milliseconds)
    return microseconds(replay, milliseconds, cache)


def microseconds(
    replay: Callable[[], None], milliseconds: int = 60, cache: str = "written"
) -> float:
    """Median of replays for so long, each with a cold L2 cache, `written` or `read`."""
    if cache == "read":
        return 1e3 * _after_reading(replay, milliseconds)
    from triton.testing import do_bench

    return float(do_bench(replay, warmup=WARM_UP, rep=milliseconds, return_mode="median")) * 1e3


def _after_reading(replay: Callable[[], None], milliseconds: int) -> float:
    """As `do_bench`, in milliseconds, but that L2 is full of what was read before each replay."""
    other = torch.zeros(OTHER_BYTES // 4, dtype=torch.int32, device="cuda")

    def events(count: int) -> list[torch.cuda.Event]:
        """One before and one after each replay."""
        found = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
        for begin, end in zip(found[::2], found[1::2], strict=True):
            other.sum()
            begin.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return found

    first = events(5)
    once = first[0].elapsed_time(first[-1]) / 5  # with reading, as `do_bench` has it
    events(max(1, int(WARM_UP / once)))
    timed = events(max(1, int(milliseconds / once)))
    pairs = zip(timed[::2], timed[1::2], strict=True)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def _among_layers(call: Experts, args: Args, milliseconds: int) -> float:
    """What a call adds to a graph of LAYERS that read other data in between, in milliseconds."""
    other = torch.zeros(OTHER_BYTES // 4, dtype=torch.int32, device="cuda")

    def captured(calls: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(LAYERS):
                other.sum()
                if calls:
                    call(*args)
        return graph

    def timed(graph: torch.cuda.CUDAGraph, count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # what is before the first may not have ended
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / count

    with_calls, without = captured(True), captured(False)
    once = timed(with_calls, 1)
    timed(with_calls, max(1, int(WARM_UP / once)))
    count = max(1, int(milliseconds / TURNS / once))
    times = [(timed(with_calls, count), timed(without, count)) for _ in range(TURNS)]
    return statistics.median(both - alone for both, alone in times) / LAYERS


def quick_milliseconds(call: Experts, args: Args, cache: str = "written") -> float:
    """For choosing among many: replays for a few milliseconds, unchecked."""
    replay, _ = capture(call, args)
    return _microseconds(call, args, replay, 10, cache) / 1e3
