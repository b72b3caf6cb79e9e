"""What has been reported against the paths, where, and what became of it.

A report never switches a path off: several were withdrawn or repaired upstream, and the machine at
hand may not be the one reported. It decides only how carefully the path is tried. Where an
unsettled report of a hang or a crash matches, that happens in child processes before the server
builds the path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moe_backend.comm.machine import Machine
from moe_backend.comm.paths import PATHS


@dataclass(frozen=True)
class Report:
    """Something that was reported of a path, and on which machines.

    Attributes:
        arch: regular expression for `Machine.arch`.
        unlinked: only where devices lack a direct link (NVLink, XGMI).
        hip_before: only on ROCm versions before this one.
        settled: gives no reason to try the path more carefully: repaired, withdrawn, or nothing
            that a probe at start-up could meet.
    """

    path: str
    arch: str
    symptom: Literal["hang", "crash", "nan", "wrong", "refused"]
    condition: str
    source: str
    status: str
    settled: bool
    min_world: int = 2
    min_hosts: int = 1
    unlinked: bool = False
    hip_before: str = ""

    def matches(self, machine: Machine) -> bool:
        """Whether the machine is one of those reported."""
        return (
            re.fullmatch(self.arch, machine.arch) is not None
            and machine.world_size >= self.min_world
            and machine.hosts >= self.min_hosts
            and (not self.unlinked or machine.linked is False)
            and (not self.hip_before or _older(machine.hip, self.hip_before))
        )


AMD, NVIDIA = r"gfx\w+", r"sm_\d+"

REPORTS = (
    # aiter
    Report(
        "aiter",
        r"gfx95\w",
        "nan",
        "tensor parallel over 2 or more",
        "ROCm/aiter#3548",
        "withdrawn by its author in the same pull request (commit 0a2663c022)",
        settled=True,
    ),
    Report(
        "aiter",
        r"gfx95\w",
        "refused",
        "all-gather with the custom communicator switched off: _all_gather_out_place asserts it",
        "ROCm/aiter aiter/dist/parallel_state.py",
        "open; concerns engines that call it (ATOM's LM head), not vLLM",
        settled=True,
    ),
    Report(
        "aiter",
        AMD,
        "wrong",
        "captured one-stage kernel returns before its peers have read: garbage, seldom, under load",
        "ROCm/aiter#3515",
        "repaired by ROCm/aiter#3514; a start-up probe can miss it",
        settled=True,
    ),
    Report(
        "aiter",
        AMD,
        "wrong",
        "gather, scatter and fused kernels return before their peers have read (5 of 1080 turns)",
        "ROCm/aiter#4855",
        "repaired by ROCm/aiter#4082 and #4346; a start-up probe can miss it",
        settled=True,
    ),
    Report(
        "aiter",
        AMD,
        "crash",
        "graph capture: an event query from another thread invalidates it",
        "ROCm/aiter#2941, sgl-project/sglang#23580, pytorch/pytorch#177309",
        "a fault of ROCm up to 7.2.0, repaired in 7.2.1",
        settled=False,
        hip_before="7.2.1",
    ),
    Report(
        "aiter",
        AMD,
        "crash",
        "registered input under graph capture, read before it is visible to the peers",
        "ROCm/aiter#3290",
        "closed without a merge; not reproduced by the maintainers",
        settled=False,
    ),
    Report(
        "aiter",
        AMD,
        "hang",
        "memory released and mapped again between capture and replay",
        "ROCm/aiter#2061",
        "open; happens long after the start, where no probe sees it",
        settled=True,
    ),
    # vLLM's custom all-reduce
    Report(
        "custom",
        AMD,
        "wrong",
        "start barrier without release and acquire: torn reads over XGMI (seen on gfx908)",
        "vllm-project/vllm#57059",
        "open; depends on load and timing, so a start-up probe can miss it",
        settled=False,
    ),
    Report(
        "custom",
        AMD,
        "crash",
        "graph capture: an event query from another thread invalidates it",
        "pytorch/pytorch#177309, pytorch/pytorch#176251",
        "a fault of ROCm up to 7.2.0, repaired in 7.2.1",
        settled=False,
        hip_before="7.2.1",
    ),
    Report(
        "custom",
        NVIDIA,
        "hang",
        "the driver grants peer access but peer writes never arrive (ACS, IOMMU); "
        "vLLM trusts the driver unless VLLM_SKIP_P2P_CHECK=0",
        "vllm-project/vllm#51513, vllm-project/vllm#2728",
        "open",
        settled=False,
        unlinked=True,
    ),
    Report(
        "custom",
        r"sm_8\d",
        "wrong",
        "full graph capture",
        "vllm-project/vllm#30498, vllm-project/vllm#30650",
        "closed",
        settled=True,
    ),
    Report(
        "custom",
        NVIDIA,
        "hang",
        "unsafe synchronisation of the two-stage kernel",
        "vllm-project/vllm#8410",
        "repaired by vllm-project/vllm#8558",
        settled=True,
    ),
    # quick reduce
    Report(
        "quick",
        AMD,
        "wrong",
        "captured: the flag value repeats at every replay",
        "vllm-project/vllm#46913",
        "repaired by the same",
        settled=True,
    ),
    Report(
        "quick",
        AMD,
        "hang",
        "input shape that changes from call to call",
        "vllm-project/vllm#25892",
        "repaired by the same",
        settled=True,
        min_world=4,
    ),
    # symmetric memory
    Report(
        "symm_mem",
        r"sm_10\d",
        "hang",
        "rendezvous where the process sees only some of the host's devices",
        "vllm-project/vllm#38550",
        "closed as stale",
        settled=False,
    ),
    Report(
        "symm_mem",
        NVIDIA,
        "refused",
        "no multicast: vLLM leaves the two-shot kernel out as well, which needs none",
        "vllm-project/vllm#50179",
        "open; costs speed, not correctness",
        settled=True,
    ),
    # FlashInfer
    Report(
        "flashinfer",
        NVIDIA,
        "hang",
        "mnnvl backend during graph capture",
        "flashinfer-ai/flashinfer#2923, vllm-project/vllm#35772",
        "repaired by flashinfer-ai/flashinfer#3304 (0.6.12)",
        settled=True,
    ),
    Report(
        "flashinfer",
        r"sm_90",
        "crash",
        "fused with RMSNorm, in one model: invalid argument",
        "vllm-project/vllm#45604",
        "open; the fused kernel runs in the compiled model only, where no probe reaches it",
        settled=True,
    ),
    Report(
        "flashinfer",
        NVIDIA,
        "hang",
        "mnnvl workspace across hosts joined by InfiniBand only: 30 s, then another backend",
        "vllm-project/vllm#51986",
        "open; costs time and memory, and ends by itself",
        settled=True,
        min_hosts=2,
    ),
    # NCCL and RCCL
    *(
        Report(
            name,
            r"gfx95\w",
            "hang",
            "creation of the communicator at world size 8",
            "ROCm/aiter#3548 (AITER_PYNCCL_SKIP), ROCm/rocm-systems#6223",
            "the first withdrawn by its author, the second closed",
            settled=False,
            min_world=8,
        )
        for name in ("pynccl", "torch")
    ),
    *(
        Report(
            name,
            NVIDIA,
            "hang",
            "creation of the communicator where peer writes never arrive; NCCL_P2P_DISABLE=1 helps",
            "vllm-project/vllm#51513, vllm-project/vllm#12292",
            "open",
            settled=False,
            unlinked=True,
        )
        for name in ("pynccl", "torch")
    ),
    Report(
        "pynccl",
        NVIDIA,
        "refused",
        "vLLM 0.33 leaves it out, in silence, with NCCL before 2.29.7 (no ncclCommSuspend)",
        "vLLM distributed/device_communicators/pynccl_wrapper.py",
        "seen with NCCL 2.28.9; torch.distributed serves instead, through this package",
        settled=True,
    ),
    # CPU
    Report(
        "shm",
        "cpu",
        "hang",
        "ranks on several hosts, which cannot share memory",
        "vllm-project/vllm#46716",
        "open",
        settled=False,
        min_hosts=2,
    ),
)


def reports_for(machine: Machine, path: str | None = None) -> list[Report]:
    """The reports that concern this machine, of one path or of all."""
    return [r for r in REPORTS if r.matches(machine) and path in (None, r.path)]


def probe_first(machine: Machine) -> list[str]:
    """The paths to try in child processes before anything builds them."""
    hazards = {
        r.path for r in reports_for(machine) if not r.settled and r.symptom in ("hang", "crash")
    }
    if "pynccl" in hazards:
        hazards.add("torch")  # what takes over must be known to work
    return [name for name in PATHS if name in hazards and PATHS[name].opener]


def _older(version: str, than: str) -> bool:
    """Whether `version` is known and before `than`; parts compare as numbers."""
    if not version:
        return False
    parts = [int(part) for part in re.findall(r"\d+", version)[:3]]
    return parts < [int(part) for part in than.split(".")]
