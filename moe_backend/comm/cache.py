"""Verdicts of earlier starts, and the mark of a start that did not come through.

One file per `Machine.key` under `$XDG_CACHE_HOME/moe-backend/comm` (else `~/.cache/...`). Deleting
the folder is always safe. A folder that cannot be written, or a user without a home, only means
that nothing is remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_backend.comm.machine import Machine
from moe_backend.comm.policy import ProbeResult
from moe_backend.folders import cache_root


def folder() -> Path | None:
    """Where all of it is; None without a home folder."""
    root = cache_root()
    return None if root is None else root / "comm"


def verdict_file(machine: Machine) -> Path | None:
    where = folder()
    return None if where is None else where / f"{machine.key}.json"


def load(machine: Machine) -> dict[str, ProbeResult]:
    """What earlier starts found; empty if nothing readable is there."""
    file = verdict_file(machine)
    if file is None:
        return {}
    try:
        stored = json.loads(file.read_text())["results"]
        return {name: ProbeResult(**fields) for name, fields in stored.items()}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def save(machine: Machine, results: Mapping[str, ProbeResult]) -> bool:
    """Add these results to the stored ones; False if that is not possible.

    That torch.distributed failed is not stored: every later start would be refused untried.
    """
    target = verdict_file(machine)
    if target is None:
        return False
    merged = {**load(machine), **results}
    if "torch" in merged and merged["torch"].bad:
        del merged["torch"]
    record: dict[str, Any] = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": asdict(machine),
        "results": {name: asdict(result) for name, result in merged.items()},
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
            json.dump(record, file, indent=1)
        os.replace(file.name, target)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def marked(machine: Machine, paths: list[str]) -> Iterator[None]:
    """While open, a file says that these paths are being built; it stays behind if we die."""
    where = folder()
    if where is None:
        yield
        return
    mark = where / f"{machine.key}.{os.getpid()}.pending"
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"paths": paths, "process": _identity(os.getpid())}))
    yield  # not in try/finally: an exception is a start that did not come through
    with contextlib.suppress(OSError):
        mark.unlink()


def unfinished(machine: Machine, clear: bool = False) -> list[str]:
    """The paths that a start on this machine was building when it ended.

    Args:
        clear: forget them.
    """
    paths: list[str] = []
    where = folder()
    if where is None:
        return []
    try:
        marks = sorted(where.glob(f"{machine.key}.*.pending"))
    except OSError:
        return []
    for mark in marks:
        try:
            record = json.loads(mark.read_text())
            process = record["process"]
            if process == _identity(int(process.split()[1])):
                continue  # still at it
            paths += [name for name in record["paths"] if name not in paths]
        except (OSError, ValueError, KeyError, IndexError):
            continue
        if clear:
            with contextlib.suppress(OSError):
                mark.unlink()
    return paths


def _identity(pid: int) -> str:
    """Host, process number and start time: numbers are used again, the three together are not."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = "gone"
    return f"{socket.gethostname()} {pid} {started}"
