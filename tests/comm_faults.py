"""Collectives over gloo with planted faults, for the children of `moe_backend.comm.probe`.

Each function is an opener. `start_forked` starts a child from the server of `comm_fork`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import comm_fork
import torch

from moe_backend.comm import Collective, Unavailable, World
from moe_backend.comm.child import Job, main
from moe_backend.comm.torch_paths import over_group

FOR_EVER = 10_000
MID_RUN = 4  # the call at which a fault that is not there from the start sets in


def healthy(world: World) -> Collective:
    return over_group(world.group, world.world_size)


def absent(world: World) -> Collective:
    raise Unavailable("not on this machine")


def absent_on_one_rank(world: World) -> Collective:
    if world.rank == 0:
        raise Unavailable("rank 0 has no such library")
    return healthy(world)


def nan_on_one_rank(world: World) -> Collective:
    return _spoiled(world, world.rank == 0, float("nan"))


def wrong_on_one_rank(world: World) -> Collective:
    return _spoiled(world, world.rank == world.world_size - 1, 1.0)


def _spoiled(world: World, here: bool, error: float) -> Collective:
    """The last value of the result is off by `error`."""
    path = healthy(world)

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        result = path.all_reduce(tensor)
        result[-1] += error if here else 0.0
        return result

    return replace(path, all_reduce=all_reduce)


def wrong_order_of_gather(world: World) -> Collective:
    path = healthy(world)
    assert path.all_gather is not None
    gather = path.all_gather
    return replace(path, all_gather=lambda tensor: gather(tensor).roll(tensor.numel()))


def last_result_again(world: World) -> Collective:
    """A barrier that lets go too early: now and then the result of the call before."""
    path = healthy(world)
    before: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        result = path.all_reduce(tensor)
        key = (tensor.numel(), torch.bfloat16)
        stale, before[key] = before.get(key, result), result
        return stale.to(tensor.dtype)

    return replace(path, all_reduce=all_reduce)


def one_rank_forgotten(world: World) -> Collective:
    """The last rank's share never arrives."""
    path = healthy(world)
    mute = world.rank == world.world_size - 1
    return replace(
        path,
        all_reduce=lambda tensor: path.all_reduce(torch.zeros_like(tensor) if mute else tensor),
    )


def hang_mid_run(world: World) -> Collective:
    return _from_call(world, MID_RUN, 0, lambda: time.sleep(FOR_EVER))


def hang_beside_a_compiler(world: World) -> Collective:
    """As a path that compiles its kernel on first use: the compiler is a process of its own."""
    compiler = subprocess.Popen(["sleep", "600"])
    Path(os.environ["COMPILERS"], str(world.rank)).write_text(str(compiler.pid))
    time.sleep(FOR_EVER)
    return healthy(world)


def hang_at_init(world: World) -> Collective:
    if world.rank == world.world_size - 1:
        time.sleep(FOR_EVER)
    return healthy(world)


def hang_with_interpreter_lock(world: World) -> Collective:
    """As in a driver call that does not let go of Python's lock: no thread of ours would run."""
    return _from_call(world, 1, 0, lambda: ctypes.PyDLL(None).sleep(FOR_EVER))


def crash_at_init(world: World) -> Collective:
    if world.rank == world.world_size - 1:
        print("about to crash", flush=True)
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # libraries set handlers that take seconds
        os.kill(os.getpid(), signal.SIGSEGV)
    return healthy(world)


def exit_mid_run(world: World) -> Collective:
    return _from_call(world, MID_RUN, 0, lambda: os._exit(17))


def error_mid_run(world: World) -> Collective:
    def fail() -> None:
        raise RuntimeError("invalid argument\nmore of it")

    return _from_call(world, MID_RUN, world.world_size - 1, fail)


def _from_call(world: World, number: int, rank: int, act: object) -> Collective:
    """From the given all-reduce on, the given rank does something else first."""
    path = healthy(world)
    calls = 0

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls >= number and world.rank == rank:
            act()  # type: ignore[operator]
        return path.all_reduce(tensor)

    return replace(path, all_reduce=all_reduce)


class Forked:
    """A child of the fork server, with the interface of `subprocess.Popen`."""

    def __init__(self, job: Job, log: Path) -> None:
        self.process = comm_fork.context().Process(target=_run, args=(job, str(log)), daemon=True)
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> object:
        return self.process.join()


def start_forked(job: Job, log: Path) -> Forked:
    return Forked(job, log)


def _run(job: Job, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    main(job)
