"""Which collective paths may be used: what is known of them, a probe, and the decision.

A *path* is one implementation of the collectives that a model needs: an engine's custom all-reduce
kernel, aiter's, quick reduce, symmetric memory, NCCL or RCCL called directly (PyNccl), or
`torch.distributed`. Several have been reported to hang, to crash or to give wrong sums on some
machines, and some of those reports were withdrawn. So nothing is assumed: a path is tried with
integers whose sum is known, and one that fails is left out.

    paths      what there is
    reports    what was reported against it
    policy     the user's wish, the findings, the decision
    checks     known sums and gathers, eager and captured
    probe      the same in child processes, which survive a hang and a crash
    child      what runs in such a process
    cache      verdicts of earlier starts, and the mark of a start that did not finish
    machine    what a verdict holds for
    torch_paths  the paths that torch offers by itself

This package needs torch only. What belongs to an engine is in `moe_backend.engines`;
`docs/communication.md` explains the whole. `python -m moe_backend.comm --world-size 2` probes this
machine.
"""

from moe_backend.comm.checks import Collective, Unavailable, World, run_checks
from moe_backend.comm.machine import Machine
from moe_backend.comm.paths import PATHS, Path
from moe_backend.comm.policy import (
    VARIABLE,
    Decision,
    NoUsablePathError,
    Override,
    ProbeResult,
    decide,
    parse_override,
)
from moe_backend.comm.probe import ProbeError, probe
from moe_backend.comm.reports import REPORTS, Report, reports_for

__all__ = [
    "PATHS",
    "REPORTS",
    "VARIABLE",
    "Collective",
    "Decision",
    "Machine",
    "NoUsablePathError",
    "Override",
    "Path",
    "ProbeError",
    "ProbeResult",
    "Report",
    "Unavailable",
    "World",
    "decide",
    "parse_override",
    "probe",
    "reports_for",
    "run_checks",
]
