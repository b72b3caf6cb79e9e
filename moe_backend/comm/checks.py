"""Sums and gathers with known answers, run through one path by every rank of a group.

All data are small integers, so every sum is exact in bf16, fp16 and fp32 whatever the order of
addition, and "equal" means equal. Each call has other data than the one before it: a stale buffer
or an early return from a barrier then shows as a wrong value rather than as a lucky one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch

Outcome = Literal["ok", "unused", "unavailable", "nan", "wrong", "error", "crash", "hang"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Elements per rank. The kernels of vLLM and aiter change algorithm between 128 KiB and 512 KiB and
# end at 8 MiB; 128 elements are the smallest that every path accepts.
GPU_SIZES = (128, 8192, 262144, 4194304)
CPU_SIZES = (128, 8192, 65536)
CAPTURED_SIZES = (128, 8192, 262144)


class Unavailable(Exception):
    """The path does not exist on this machine; the text says why."""


@dataclass(frozen=True)
class World:
    """Who takes part. `group` is a process group over gloo, for setup and agreement."""

    rank: int
    world_size: int
    device: torch.device
    group: torch.distributed.ProcessGroup


def _takes_all(_: torch.Tensor) -> bool:
    return True


def _nothing() -> None:
    pass


@dataclass
class Collective:
    """One path, opened: what to call. Inputs stay as they are; results are returned.

    Attributes:
        all_gather: concatenates along dim 0; None when the path has none. It returns None for a
            tensor that it leaves to another path.
        accepts: whether the path takes this tensor for an all-reduce.
        gathers: whether it takes this tensor for an all-gather.
        capture: entered around the capture of a CUDA graph; None when it cannot be captured.
        tolerance: largest relative error of a correct result; 0 for all but quantised paths.
        flat: give it tensors of one repeated value, which a quantised path carries without loss.
        sizes: elements per rank to try; empty for the usual ones.
    """

    all_reduce: Callable[[torch.Tensor], torch.Tensor]
    all_gather: Callable[[torch.Tensor], torch.Tensor | None] | None = None
    accepts: Callable[[torch.Tensor], bool] = _takes_all
    gathers: Callable[[torch.Tensor], bool] = _takes_all
    capture: Callable[[], AbstractContextManager[None]] | None = nullcontext
    close: Callable[[], None] = _nothing
    tolerance: float = 0.0
    flat: bool = False
    sizes: tuple[int, ...] = ()


@dataclass
class Findings:
    """How many results were compared, and the first wrong one.

    `outcome` is ok, unused (the path took none of the tensors), nan or wrong.
    """

    cases: int = 0
    outcome: Outcome = "unused"
    detail: str = ""
    now: str = field(default="", repr=False)  # the case under way, for a message after a hang


def run_checks(
    path: Collective,
    world: World,
    captured: bool = True,
    sizes: tuple[int, ...] = (),
    on_case: Callable[[str], None] | None = None,
) -> Findings:
    """Run every case on every rank; a wrong value on one rank does not stop the others.

    Collective over the group. Raises only what the path itself raises.

    Args:
        captured: also inside CUDA graphs, where there are any.
        on_case: told the name of each case before it runs.
    """
    findings = Findings()
    on_gpu = world.device.type == "cuda"
    step = 0

    def begin(case: str) -> None:
        findings.now = case
        if on_case is not None:
            on_case(case)

    for numel in sizes or path.sizes or (GPU_SIZES if on_gpu else CPU_SIZES):
        for dtype in DTYPES:
            step += 1
            mine = values(world.rank, numel, dtype, world.device, step, path.flat)
            if path.accepts(mine):
                begin(f"all_reduce {_name(dtype)}[{numel}]")
                got = path.all_reduce(mine)
                expected = total(world, numel, dtype, step, path.flat)
                _compare(findings, got, expected, path.tolerance)
            if path.all_gather is not None and path.gathers(mine):
                begin(f"all_gather {_name(dtype)}[{numel}]")
                gathered = path.all_gather(mine)
                if gathered is not None:
                    expected = everyone(world, numel, dtype, step, path.flat)
                    _compare(findings, gathered, expected, 0.0)
    if captured and on_gpu and path.capture is not None:
        _run_captured(path, world, findings, begin)
    if on_gpu:
        torch.cuda.synchronize(world.device)
    return findings


def _run_captured(
    path: Collective, world: World, findings: Findings, begin: Callable[[str], None]
) -> None:
    """One graph with a reduction of each size, replayed with other data each time."""
    assert path.capture is not None
    sizes = path.sizes or CAPTURED_SIZES
    buffers = [_captured_input(path, world, numel, 0) for numel in sizes]
    buffers = [buffer for buffer in buffers if path.accepts(buffer)]
    if not buffers:
        return
    _captured_inputs.extend(buffers)
    begin("graph capture")
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads of a serving process may call into CUDA meanwhile.
    with path.capture(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [path.all_reduce(buffer) for buffer in buffers]
    for step in (1, 2, 3):
        for buffer in buffers:
            buffer.copy_(_captured_input(path, world, buffer.numel(), step))
        graph.replay()
        for buffer, result in zip(buffers, results, strict=True):
            begin(f"all_reduce bfloat16[{buffer.numel()}] captured")
            expected = total(world, buffer.numel(), torch.bfloat16, step, path.flat)
            _compare(findings, result, expected, path.tolerance)
    torch.cuda.synchronize(world.device)


# Custom all-reduce kernels map the captured inputs into the other ranks and never unmap them. CUDA
# leaves open what happens when exported memory is freed first, so these (0.5 MiB) are not freed.
_captured_inputs: list[torch.Tensor] = []


def _captured_input(path: Collective, world: World, numel: int, step: int) -> torch.Tensor:
    return values(world.rank, numel, torch.bfloat16, world.device, step, path.flat)


def values(
    rank: int, numel: int, dtype: torch.dtype, device: torch.device, step: int, flat: bool = False
) -> torch.Tensor:
    """The integers -8 to 8 in an order of this rank and step. Eight ranks add up to at most 64.

    Args:
        flat: one such integer, repeated.
    """
    index = torch.arange(numel, device=device)
    if flat:
        index = torch.zeros_like(index)
    return ((index * 7 + rank * 13 + step * 5) % 17 - 8).to(dtype)


def total(
    world: World, numel: int, dtype: torch.dtype, step: int, flat: bool = False
) -> torch.Tensor:
    """The exact sum of `values` over the ranks."""
    result = values(0, numel, torch.int64, world.device, step, flat)
    for rank in range(1, world.world_size):
        result += values(rank, numel, torch.int64, world.device, step, flat)
    return result.to(dtype)


def everyone(
    world: World, numel: int, dtype: torch.dtype, step: int, flat: bool = False
) -> torch.Tensor:
    """`values` of every rank, one after the other."""
    ranks = range(world.world_size)
    return torch.cat([values(rank, numel, dtype, world.device, step, flat) for rank in ranks])


def _compare(
    findings: Findings, got: torch.Tensor, expected: torch.Tensor, tolerance: float
) -> None:
    findings.cases += 1
    if findings.outcome == "unused":
        findings.outcome = "ok"
    if findings.outcome != "ok":
        return
    if got.shape != expected.shape:
        findings.outcome = "wrong"
        findings.detail = f"{findings.now}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        return
    error = (got.float() - expected.float()).abs()
    bad = ~(error <= tolerance * expected.float().abs().max())  # NaN compares false
    if not bool(bad.any()):
        return
    where = int(bad.nonzero()[0, 0])
    findings.outcome = "nan" if bool(got.isnan().any()) else "wrong"
    findings.detail = (
        f"{findings.now}: {int(bad.sum())} of {bad.numel()} values differ, "
        f"[{where}] is {got[where].item():g}, not {expected[where].item():g}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
