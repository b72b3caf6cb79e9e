"""Try paths in child processes, one per rank, within bounded time.

Every process that takes part calls `probe` with the ranks that it answers for: a serving engine's
workers with their own rank each, the command line with all of them. They meet at a TCP store. One
round runs every path that is left; a path that hangs, ends its process or raises ends the round on
all ranks, and the next round goes on with the paths after it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moe_backend.comm.child import Job
from moe_backend.comm.paths import Path
from moe_backend.comm.policy import ProbeResult

START_LIMIT_S = 120.0  # imports, CUDA context and rendezvous of the children
POLL_S = 0.02
SETTLE_S = 0.5


class ProbeError(RuntimeError):
    """The children could not be run at all, so nothing was learnt of any path."""


class Process(Protocol):
    """What is needed of a started child; `subprocess.Popen` has it."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> object: ...


Starter = Callable[[Job, FilePath], Process]


class _Interpreter(subprocess.Popen[bytes]):
    """A child and what it starts in its turn, such as the compiler of a path's kernel."""

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def start_subprocess(job: Job, log: FilePath) -> Process:
    """A new interpreter with this one's environment, its output in `log`."""
    with log.open("w") as output:
        return _Interpreter(
            [sys.executable, "-m", "moe_backend.comm.child", job.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            process_group=0,
        )


def probe(
    paths: Sequence[Path],
    devices: Mapping[int, str],
    world_size: int,
    meeting: tuple[str, int] | TCPStore,
    start: Starter = start_subprocess,
    start_limit_s: float = START_LIMIT_S,
) -> dict[str, ProbeResult]:
    """What each path did. Collective: every process of the group calls it with the same paths.

    Takes at most `start_limit_s` plus the paths' limits for each round, and at most one round more
    than there are bad paths.

    Args:
        devices: the ranks that this process answers for, with the torch device of each.
        meeting: the store, in the process that holds it; elsewhere its host and port.
    Raises:
        ProbeError: no path was reached; the message says how far the children came.
    """
    store = meeting if isinstance(meeting, TCPStore) else TCPStore(*meeting)
    results: dict[str, ProbeResult] = {}
    left = [path for path in paths if path.opener]
    number = 0
    while left:
        number += 1
        round_ = _Round(number, store, dict(devices), world_size, left, start_limit_s)
        found = round_.run(start)
        if not found and not results:
            raise ProbeError(round_.failure or "the children ended without a word")
        results.update(found)
        if not found:  # later rounds may fail to start; what is known stays known
            break
        left = [path for path in left if path.name not in found]
    return results


def host_store() -> TCPStore:
    """A store on a free port of this machine; `.host` and `.port` say where."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@dataclass
class _Child:
    rank: int
    process: Process
    progress: FilePath
    log: FilePath
    began: float  # of the path under way, or of the process
    read: int = 0
    path: str = ""  # under way
    case: str = ""
    done: bool = False
    failed: str = ""
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)

    def update(self) -> None:
        """Take in what the child has written since the last look."""
        try:
            text = self.progress.read_text()
        except OSError:
            return
        end = text.rfind("\n") + 1
        lines, self.read = text[self.read : end].splitlines(), max(end, self.read)
        for line in lines:
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "begin":
                self.path, self.case, self.began = event["path"], "", time.monotonic()
            elif kind == "case":
                self.case = event["case"]
            elif kind == "end":
                self.ended[event.pop("path")] = event
                self.path, self.began = "", time.monotonic()
            elif kind == "failed":
                self.failed = event["detail"]
            elif kind == "done":
                self.done = True

    def where(self) -> str:
        return self.case or "while it was set up"

    def last_words(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else ""


class _Round:
    """One set of children over the paths that are left."""

    def __init__(
        self,
        number: int,
        store: TCPStore,
        devices: dict[int, str],
        world_size: int,
        paths: Sequence[Path],
        start_limit_s: float,
    ) -> None:
        self.prefix = f"round{number}"
        self.store = store
        self.devices = devices
        self.world_size = world_size
        self.paths = {path.name: path for path in paths}
        self.start_limit_s = start_limit_s
        self.budget_s = start_limit_s + sum(path.limit_s for path in paths) + 30
        self.failure = ""
        self.troubles: list[dict[str, Any]] = []

    def run(self, start: Starter) -> dict[str, ProbeResult]:
        """The paths that came to an end, and the one that ended the round; empty if none began."""
        host, port = self._children_meet()
        with tempfile.TemporaryDirectory(prefix="moe-backend-probe-") as folder:
            children: list[_Child] = []
            try:
                for rank, device in self.devices.items():
                    progress = FilePath(folder, f"{rank}.progress")
                    log = FilePath(folder, f"{rank}.log")
                    job = Job(
                        rank,
                        self.world_size,
                        device,
                        host,
                        port,
                        tuple((path.name, path.opener) for path in self.paths.values()),
                        str(progress),
                        int(self.budget_s),
                    )
                    try:
                        process = start(job, log)
                    except OSError as error:
                        detail = f"no process could be started: {error}"
                        self._stop(
                            [{"outcome": "crash", "path": "", "rank": rank, "detail": detail}]
                        )
                        break
                    children.append(_Child(rank, process, progress, log, time.monotonic()))
                self._watch(children)
            finally:
                for child in children:
                    child.process.kill()
                for child in children:
                    child.process.wait()
            for child in children:
                child.update()
            self._publish(children)
            return self._merge(self._gather())

    def _children_meet(self) -> tuple[str, int]:
        """A fresh store for the children: what a dead round left in it must not meet the next.

        aiter wants the default store to be a plain TCPStore (vLLM utils/network_utils.py,
        aiter_requires_tcp_store), so a prefix on the parents' store would not do.
        """
        key = f"{self.prefix}/meet"
        if 0 in self.devices:
            self.children_store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self.store.set(key, str(self.children_store.port))
        self.store.wait([key], datetime.timedelta(seconds=self.start_limit_s))
        return self.store.host, int(self.store.get(key))

    def _watch(self, children: list[_Child]) -> None:
        """Return when all children are done, or when any rank anywhere is in trouble."""
        stop = f"{self.prefix}/stop"
        while not self.store.check([stop]):
            troubles = self._troubles(children)
            if troubles:
                self._stop(troubles)
            elif all(child.done for child in children):
                return
            time.sleep(POLL_S)
        # One rank's end shows in its peers at once, and may take a moment to show in itself.
        settled = time.monotonic() + SETTLE_S
        while time.monotonic() < settled and any(c.process.poll() is None for c in children):
            time.sleep(POLL_S)
        first = json.loads(self.store.get(stop))
        self.troubles = [
            trouble
            for trouble in self._troubles(children)
            # After a hang the children are killed, at which their peers' calls raise.
            if trouble["outcome"] == "crash" or first["outcome"] != "hang"
        ]

    def _stop(self, troubles: list[dict[str, Any]]) -> None:
        """Tell every process that the round is over, and why; the first to say so is heard."""
        self.store.compare_set(f"{self.prefix}/stop", "", json.dumps(_cause(troubles)))

    def _troubles(self, children: list[_Child]) -> list[dict[str, Any]]:
        found = []
        for child in children:
            exit_code = child.process.poll()  # before the file, so that nothing is missed
            child.update()
            if not child.done:
                found += self._trouble(child, exit_code)
        return found

    def _trouble(self, child: _Child, exit_code: int | None) -> list[dict[str, Any]]:
        """How this child has come to grief, if it has."""
        last = next(reversed(child.ended), "")
        if last and child.ended[last]["outcome"] == "error":
            return [{**child.ended[last], "path": last, "rank": child.rank}]
        place = {"path": child.path, "rank": child.rank}
        if exit_code is not None:
            words = child.failed or f"(exit code {exit_code}) {child.last_words()}".strip()
            detail = f"{child.where()} {words}" if child.path else words
            return [{"outcome": "crash", "detail": detail, **place}]
        limit = self.paths[child.path].limit_s if child.path else self._start_limit(child)
        if time.monotonic() - child.began > limit:
            where = child.where() if child.path else "waiting for the other ranks"
            return [{"outcome": "hang", "detail": f"{where}, within {limit:g} s", **place}]
        return []

    def _start_limit(self, child: _Child) -> float:
        """Between paths a child waits for the slowest rank, whose own limit comes first."""
        if not child.ended:
            return self.start_limit_s
        return max(path.limit_s for path in self.paths.values()) + 10

    def _publish(self, children: list[_Child]) -> None:
        ended = {child.rank: child.ended for child in children}
        for rank in self.devices:
            report = {"ended": ended.get(rank, {}), "troubles": self.troubles}
            self.store.set(f"{self.prefix}/rank{rank}", json.dumps(report))

    def _gather(self) -> list[dict[str, Any]]:
        keys = [f"{self.prefix}/rank{rank}" for rank in range(self.world_size)]
        self.store.wait(keys, datetime.timedelta(seconds=self.budget_s))
        return [json.loads(self.store.get(key)) for key in keys]

    def _merge(self, reports: list[dict[str, Any]]) -> dict[str, ProbeResult]:
        """The same verdict on every process: the worst finding of any rank."""
        troubles = [trouble for report in reports for trouble in report["troubles"]]
        if self.store.check([f"{self.prefix}/stop"]):
            troubles.append(json.loads(self.store.get(f"{self.prefix}/stop")))
        cause: dict[str, Any] = _cause(troubles) if troubles else {"path": None}
        if cause["path"] == "":
            self.failure = f"rank {cause['rank']}: {cause['detail']}"
        found: dict[str, ProbeResult] = {}
        for name in self.paths:
            if name == cause["path"]:
                detail = f"{cause['detail']}, on rank {cause['rank']} of {self.world_size}"
                found[name] = ProbeResult(name, cause["outcome"], detail)
                break
            ended = [report["ended"][name] for report in reports if name in report["ended"]]
            if len(ended) < self.world_size:
                break
            found[name] = self._worst(name, ended)
        return found

    def _worst(self, name: str, ended: list[dict[str, Any]]) -> ProbeResult:
        """One result for a path that came to its end on all ranks."""
        rank = min(range(len(ended)), key=lambda r: _ORDER.index(ended[r]["outcome"]))
        worst = ended[rank]
        detail = worst.get("detail", "")
        if worst["outcome"] in ("nan", "wrong"):
            detail += f", on rank {rank} of {self.world_size}"
        elif not detail:
            detail = next((e["detail"] for e in ended if e.get("detail")), "")
        return ProbeResult(
            name,
            worst["outcome"],
            detail,
            max(e.get("seconds", 0.0) for e in ended),
            min(e.get("cases", 0) for e in ended),
        )


_ORDER = ("nan", "wrong", "unavailable", "unused", "ok")


def _cause(troubles: list[dict[str, Any]]) -> dict[str, Any]:
    """The trouble that the others follow from.

    When a process ends, its peers' next call may raise or may wait for ever; a process that ended
    by itself is no such echo. Of several exceptions the first came first; a rank that waits waits
    for another one.
    """
    order = ("crash", "error", "hang")
    return min(troubles, key=lambda t: (order.index(t["outcome"]), t.get("at", 0.0), t["rank"]))
