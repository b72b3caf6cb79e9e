"""What the ranks of one vLLM group do together when its communicator is built.

1. Agree on rank 0's settings and on everything that is known of this machine.
2. Try in child processes what may hang here and is not known.
3. Let vLLM build the paths that are left, under a watch.
4. Try those in place with known sums, under a watch; switch off what fails.

The tensor-parallel group does all of it, or the first group of several ranks where there is none.
The groups after it follow its findings and do steps 1 and 3; 2 as well if an earlier start ended
there.

Every rank takes the same branches, because every decision rests on data that was exchanged.
`docs/communication.md` says why each step stands where it does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from moe_backend.comm import cache
from moe_backend.comm.checks import Collective, Unavailable, World, run_checks
from moe_backend.comm.machine import Machine, describe, device_identity
from moe_backend.comm.paths import PATHS
from moe_backend.comm.policy import (
    VARIABLE,
    Decision,
    NoUsablePathError,
    Override,
    ProbeResult,
    decide,
    fault,
    parse_override,
    refusal,
)
from moe_backend.comm.probe import ProbeError, host_store, probe
from moe_backend.comm.reports import probe_first
from moe_backend.comm.torch_paths import over_group
from moe_backend.engines.vllm_comm_paths import PARTS, collective, shm_collective
from moe_backend.engines.vllm_comm_switch import (
    candidates,
    is_active,
    is_tensor_parallel,
    left_out,
    stand_in_for_pynccl,
    switch_off,
)
from moe_backend.envs import ALL_REDUCE

logger = logging.getLogger("vllm.moe_backend")

# NCCL's communicators over many hosts take tens of seconds to build; what hangs, hangs for good.
BUILD_LIMIT_S = 300.0
CHECK_LIMIT_S = 120.0
# In a serving process the sizes of decode and prefill; the child processes try more.
CHECK_SIZES = (128, 8192, 262144)
# Not here: quick reduce takes 1 MiB and more and is not exact; FlashInfer makes one workspace per
# process for the shape that comes first, which must be the model's.
CHECKED_IN_PLACE = ("custom", "aiter", "symm_mem", "pynccl", "shm")
EXIT_CODE = 70  # EX_SOFTWARE

_tried: list[str] = []  # the groups of this process that tried their paths
_found_bad: dict[str, ProbeResult] = {}  # what they found bad, for the groups built after them


class Start:
    """One group's start."""

    def __init__(self, world: World, name: str, device_group: Any) -> None:
        self.world = world
        self.name = name
        self.device_group = device_group
        self.tries = is_tensor_parallel(name) or not _tried
        self.began = time.monotonic()
        self.notes: list[str] = []
        self.unfinished: list[str] = []

    def run(self, communicator: Any, build: Callable[[tuple[str, ...]], None]) -> None:
        """Have the communicator built without its bad paths.

        Args:
            build: calls vLLM's constructor; told which paths are left out.
        Raises:
            ValueError: the variable's value is not understood.
            NoUsablePathError: nothing that works is left. On every rank alike.
        """
        override, machine, known = self._agree()
        if self.tries:
            _tried.append(self.name)
        names = candidates(self.name, self.world.device)
        if override.mode == "on":
            build(())
            if self.tries:
                self._say(logging.INFO, f"paths are not tried: {VARIABLE}=on")
            return
        known.update(self._probe(names, override, machine, known))
        if self.tries:
            _found_bad.update({name: r for name, r in known.items() if r.bad and name in names})
        decision = decide(names, known, override)
        without = tuple(decision.off)
        with (
            self._watched(machine, decision.on, "built", BUILD_LIMIT_S),
            left_out(without, self.device_group, self.world.device),
        ):
            build(without)
        if stand_in_for_pynccl(communicator, self.device_group):
            self.notes.append("vLLM has no PyNccl here, torch serves instead")
        if self.tries:
            results = self._check(communicator, machine, decision, known)
            for name, result in results.items():
                if result.bad and name in (*override.only, "torch"):
                    raise NoUsablePathError(refusal(result, asked=name in override.only))
            self._report(communicator, decision, override, results)

    # --- Before vLLM builds anything

    def _agree(self) -> tuple[Override, Machine, dict[str, ProbeResult]]:
        """Rank 0's settings and memory hold for all."""
        mine = (*device_identity(self.world.device), _physical_id(self.world.device), _found_bad)
        everyone: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(everyone, mine, group=self.world.group)
        agreed: list[Any] = [None]
        if self.world.rank == 0:
            linked = _fully_linked([physical for _, _, physical, _ in everyone])
            identities = [(host, device) for host, device, _, _ in everyone]
            machine = describe(self.world.device, identities, linked)
            text = ALL_REDUCE.get()
            remembered = cache.load(machine), cache.unfinished(machine)
            agreed = [(text, self.tries, machine, *remembered)]
        _broadcast(agreed, self.world)
        text, self.tries, machine, known, self.unfinished = agreed[0]
        for _, _, _, found_bad in everyone:
            known.update(found_bad)
        return parse_override(text), machine, known

    def _probe(
        self,
        names: tuple[str, ...],
        override: Override,
        machine: Machine,
        known: Mapping[str, ProbeResult],
    ) -> dict[str, ProbeResult]:
        """Try in child processes what may hang, if nothing is known of it."""
        why, suspects = "left unfinished by an earlier start", set(self.unfinished)
        if self.tries and override.mode == "probe":
            why, suspects = f"{VARIABLE}=probe", set(names)
        elif self.tries:
            why = f"reported on such a machine, or {why}"
            suspects.update(name for name in probe_first(machine) if name not in known)
        suspects -= set(decide(names, {}, override).off)  # what the user left out
        paths = [PATHS[name] for name in names if name in suspects and PATHS[name].opener]
        if not paths:
            return {}
        tried = ", ".join(path.name for path in paths)
        self._say(logging.INFO, f"trying {tried} in child processes ({why})")
        began = time.monotonic()
        store = host_store() if self.world.rank == 0 else None
        meeting: list[Any] = [store and (_address(machine), store.port)]
        _broadcast(meeting, self.world)
        devices = {self.world.rank: str(self.world.device)}
        found: dict[str, ProbeResult] = {}
        try:
            found = probe(paths, devices, self.world.world_size, store or meeting[0])
        except ProbeError as error:
            self.notes.append(f"no child process could be run ({error})")
        self.notes.append(f"child processes took {time.monotonic() - began:.1f} s")
        # Nobody may leave while the others still read from the store that rank 0 holds.
        dist.barrier(group=self.world.group)
        if self.world.rank == 0 and found:
            cache.save(machine, found)
            cache.unfinished(machine, clear=True)
        return found

    # --- After

    def _check(
        self,
        communicator: Any,
        machine: Machine,
        decision: Decision,
        known: Mapping[str, ProbeResult],
    ) -> dict[str, ProbeResult]:
        """Try in place what vLLM built and switch off what fails.

        torch.distributed too, where it takes over from a path that served before.
        """
        results: dict[str, ProbeResult] = {}
        with self._watched(machine, decision.on, "checked", CHECK_LIMIT_S):
            for name, holders in self._active(communicator, decision).items():
                path = self._built(communicator, name)
                if holders < self.world.world_size:
                    detail = f"it is enabled on {holders} of {self.world.world_size} ranks only"
                    results[name] = ProbeResult(name, "error", detail)
                elif path is not None:
                    results[name] = self._try(name, path, known)
                if name in results and results[name].bad:
                    _found_bad[name] = results[name]
                    switch_off(communicator, name, self.device_group)
            if any(
                name in decision.candidates and not is_active(communicator, name)
                for name in ("pynccl", "shm")
            ):
                path = over_group(self.device_group, self.world.world_size)
                results["torch"] = self._try("torch", path, known)
        if self.world.rank == 0 and results:
            cache.save(machine, results)
        return results

    def _active(self, communicator: Any, decision: Decision) -> dict[str, int]:
        """The paths that vLLM has built and enabled, with the number of ranks that have them."""
        mine = [
            name
            for name in decision.on
            if name in (*PARTS, "shm") and is_active(communicator, name)
        ]
        everyone: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(everyone, mine, group=self.world.group)
        holders = {name: sum(name in theirs for theirs in everyone) for name in decision.on}
        return {name: number for name, number in holders.items() if number}

    def _built(self, communicator: Any, name: str) -> Collective | None:
        """A path of the finished communicator, if it can be tried in place."""
        if name not in CHECKED_IN_PLACE:
            return None
        try:
            if name == "shm":
                return shm_collective(communicator, self.world)
            return collective(name, getattr(communicator, PARTS[name].attribute), self.world)
        except Unavailable:
            return None

    def _try(self, name: str, path: Collective, known: Mapping[str, ProbeResult]) -> ProbeResult:
        """The path's result over all ranks: the first bad one, else this rank's.

        In a CUDA graph too, unless that has been right here before.
        """
        began = time.monotonic()
        captured = name not in known or known[name].outcome != "ok"
        findings = run_checks(path, self.world, captured, CHECK_SIZES)
        took = round(time.monotonic() - began, 3)
        mine = ProbeResult(name, findings.outcome, findings.detail, took, findings.cases)
        everyone: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(everyone, mine, group=self.world.group)
        for rank, result in enumerate(everyone):
            if result.bad:
                detail = f"{result.detail}, on rank {rank} of {self.world.world_size}"
                return ProbeResult(name, result.outcome, detail, took, result.cases)
        return mine

    def _report(
        self,
        communicator: Any,
        decision: Decision,
        override: Override,
        results: Mapping[str, ProbeResult],
    ) -> None:
        bad = {name: fault(result) for name, result in results.items() if result.bad}
        off = {**decision.off, **bad}
        there = [n for n in decision.candidates if n in off or is_active(communicator, n)]
        final = Decision(tuple(there), off)
        absent = ", ".join(name for name in override.only if name not in final.on)
        if absent:
            self.notes.append(f"{VARIABLE} asks for {absent}, which is not enabled here")
        tried = ", ".join(name for name, result in results.items() if not result.bad)
        took = time.monotonic() - self.began
        text = "; ".join(
            [final.describe(), *self.notes, f"tried in place: {tried or 'none'}; {took:.1f} s"]
        )
        found_bad = any(VARIABLE not in why for why in final.off.values())
        if found_bad:
            text += f". {VARIABLE}=probe tries again, {VARIABLE}=on trusts every path"
        self._say(logging.WARNING if found_bad or absent else logging.INFO, text)

    @contextlib.contextmanager
    def _watched(
        self, machine: Machine, names: tuple[str, ...], doing: str, limit_s: float
    ) -> Iterator[None]:
        """Leave a mark, and end the process with a message if this does not come to an end.

        A thread that is stuck in a driver call cannot be interrupted, and a rank that went on
        alone would leave the others waiting for ever: a refusal is all that is left.
        """
        paths = [name for name in names if PATHS[name].opener]
        out = f"{VARIABLE}={f'-{paths[0]}' if paths[:1] not in ([], ['torch']) else 'off'}"
        finished = threading.Event()

        def watch() -> None:
            if finished.wait(limit_s):
                return
            self._say(
                logging.ERROR,
                f"a path hangs: {', '.join(paths)} not {doing} within {limit_s:g} s on rank "
                f"{self.world.rank}. The server cannot go on. The next start tries them in child "
                f"processes and leaves out what hangs; {out} leaves it out now",
                every_rank=True,
            )
            for handler in logging.getLogger("vllm").handlers:
                handler.flush()
            sys.stderr.flush()
            os._exit(EXIT_CODE)

        threading.Thread(target=watch, name="moe-backend-comm", daemon=True).start()
        mark = cache.marked(machine, paths) if self.world.rank == 0 else contextlib.nullcontext()
        try:
            with mark:
                yield
        except Exception as error:
            error.add_note(
                f"moe_backend: while these were {doing}: {', '.join(paths)}. The next start "
                f"tries them in child processes; {out} leaves one out now."
            )
            raise
        finally:
            finished.set()

    def _say(self, level: int, text: str, every_rank: bool = False) -> None:
        if self.world.rank == 0 or every_rank:
            logger.log(
                level, "collectives of %s (%d ranks): %s", self.name, self.world.world_size, text
            )


# --- Small facts ----------------------------------------------------------------------------------


def _physical_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    from vllm.platforms import current_platform

    try:
        return int(current_platform.visible_device_id_to_physical_device_id(device.index))
    except (AttributeError, ValueError, RuntimeError, AssertionError):
        return None


def _fully_linked(physical: list[int | None]) -> bool | None:
    """Whether every pair has NVLink or XGMI; None if vLLM cannot tell."""
    if None in physical:
        return None
    from vllm.platforms import current_platform

    try:
        return bool(current_platform.is_fully_connected(physical))
    except Exception:  # the management library's own errors, different on each platform
        return None


def _address(machine: Machine) -> str:
    if machine.hosts == 1:
        return "127.0.0.1"
    from vllm.utils.network_utils import get_ip

    return str(get_ip())


def _broadcast(objects: list[Any], world: World) -> None:
    source = dist.get_process_group_ranks(world.group)[0]
    dist.broadcast_object_list(objects, src=source, group=world.group, device=torch.device("cpu"))
