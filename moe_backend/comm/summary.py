"""What is known of each path on this machine, for `moe-backend doctor`. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend.comm import cache
from moe_backend.comm.machine import Machine, describe, device_identity
from moe_backend.comm.paths import PATHS
from moe_backend.comm.policy import fault
from moe_backend.comm.reports import probe_first, reports_for


@dataclass(frozen=True)
class PathRow:
    """One path: what earlier starts found, what a start would do, what has been reported."""

    path: str
    what: str
    verdict: str
    start: str
    reports: str


def this_machine(world_size: int | None = None) -> Machine:
    """The facts for this many ranks; by default all devices, or two processes on the CPU."""
    if not torch.cuda.is_available():
        cpu = torch.device("cpu")
        return describe(cpu, [device_identity(cpu)] * (world_size or 2))
    ranks = range(world_size or torch.cuda.device_count())
    devices = [torch.device("cuda", rank) for rank in ranks]
    return describe(devices[0], [device_identity(device) for device in devices])


def rows(machine: Machine) -> list[PathRow]:
    """The paths of which something is known here, or that a report concerns."""
    known = cache.load(machine)
    first = probe_first(machine)
    found = []
    for name, path in PATHS.items():
        reports = reports_for(machine, name)
        result = known.get(name)
        if result is None and not reports:
            continue
        verdict = "not tried" if result is None else str(result.outcome)
        start = "tried in place"
        if result is not None and result.bad:
            verdict, start = fault(result), "left out"
        elif result is None and name in first:
            start = "tried in child processes first"
        elif not path.opener:
            start = "not tried"
        said = "; ".join(f"{r.symptom}: {r.condition} ({r.source}, {r.status})" for r in reports)
        found.append(PathRow(name, path.what, verdict, start, said))
    return found
