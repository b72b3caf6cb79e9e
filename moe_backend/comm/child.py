"""What runs in a child process: open each path, check it, write down how far it got.

Started by `probe` as `python -m moe_backend.comm.child JOB`, with JOB as JSON. The child writes one
JSON line per event to its progress file; its parent reads them, and ends the child when one takes
too long. Nothing here needs to survive a hang.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moe_backend.comm.checks import Collective, Unavailable, World, run_checks

Opener = Callable[[World], Collective]
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """One rank's work.

    Attributes:
        host, port: of the TCP store at which the ranks meet.
        paths: pairs of path name and `module:function`. If the module has a function `prepare`, it
            is called with the `World` before any path, and its time counts as start-up.
        progress: the file to write events to.
        budget_s: after so many seconds the kernel ends this process, whatever it is doing.
    """

    rank: int
    world_size: int
    device: str
    host: str
    port: int
    paths: tuple[tuple[str, str], ...]
    progress: str
    budget_s: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        fields = json.loads(text)
        fields["paths"] = tuple((name, opener) for name, opener in fields["paths"])
        return Job(**fields)


def main(job: Job) -> None:
    """Run the job and leave; never returns normally, so that no teardown can hang."""
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer, not a case to keep
    signal.alarm(job.budget_s)
    torch.set_num_threads(1)
    with open(job.progress, "a", buffering=1) as progress:
        try:
            _run(job, progress)
        except Exception as error:  # before any path: the parent reports it as a failed start
            _write(progress, event="failed", detail=_first_line(error))
            os._exit(1)
    os._exit(0)


def _run(job: Job, progress: TextIO) -> None:
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = TCPStore(job.host, job.port, is_master=False)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=job.rank,
        world_size=job.world_size,
        timeout=datetime.timedelta(seconds=job.budget_s),
    )
    group = dist.group.WORLD
    assert group is not None
    world = World(job.rank, job.world_size, device, group)
    for module in {opener.partition(":")[0]: None for _, opener in job.paths}:
        # An engine takes long to import, which says nothing of the path that comes first.
        prepare = getattr(importlib.import_module(module), "prepare", None)
        if prepare is not None:
            prepare(world)
    for name, opener in job.paths:
        dist.barrier()  # from here on, time counts against this path
        _write(progress, event="begin", path=name)
        began = time.monotonic()
        try:
            path = _open(opener, world)
            if path is None:
                _write(progress, event="end", path=name, outcome="unavailable")
                continue
            findings = run_checks(
                path, world, on_case=lambda case: _write(progress, event="case", case=case)
            )
            dist.barrier()  # the others may still read from this rank's buffers
            path.close()
        except Unavailable as reason:
            _write(progress, event="end", path=name, outcome="unavailable", detail=str(reason))
            continue
        except Exception as error:
            # The other ranks may be waiting inside the collective; none of them is of use now.
            _write(
                progress,
                event="end",
                path=name,
                outcome="error",
                detail=_first_line(error),
                at=time.time(),
            )
            os._exit(3)
        _write(
            progress,
            event="end",
            path=name,
            outcome=findings.outcome,
            detail=findings.detail,
            cases=findings.cases,
            seconds=round(time.monotonic() - began, 3),
        )
    _write(progress, event="done")


def _open(opener: str, world: World) -> Collective | None:
    """The opened path, or None when another rank has it not.

    Raises:
        Unavailable: this rank has it not.
    """
    module, _, function = opener.partition(":")
    open_path: Opener = getattr(importlib.import_module(module), function)
    reason: Unavailable | None = None
    path: Collective | None = None
    try:
        path = open_path(world)
    except (Unavailable, ImportError) as error:
        reason = error if isinstance(error, Unavailable) else Unavailable(_first_line(error))
    have = torch.tensor([int(path is not None)])
    dist.all_reduce(have, op=dist.ReduceOp.MIN)
    if reason is not None:
        raise reason
    return path if have.item() else None


def _write(progress: TextIO, **fields: Any) -> None:
    progress.write(json.dumps(fields) + "\n")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _die_with_parent() -> None:
    """Linux: have the kernel end this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(Job.from_json(sys.argv[1]))
