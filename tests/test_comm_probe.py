"""Every fault on every path, in real processes over gloo: found, within time, and survived."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import comm_fork
import pytest
from comm_faults import start_forked

from moe_backend.comm import PATHS, ProbeError, ProbeResult, probe
from moe_backend.comm.child import Job
from moe_backend.comm.probe import host_store, start_subprocess

PROBED = [name for name, path in PATHS.items() if path.opener]
HANG_S = 1.0  # the limit of paths that hang; others have time enough on any machine
ROUND_S = 4.0  # what a round may take beside the limit, on a loaded machine


def path_with(fault: str, name: str = "custom", limit_s: float = 30):
    return replace(PATHS[name], opener=f"comm_faults:{fault}", limit_s=limit_s)


def run(paths, ranks: int = 2, start=start_forked, **more) -> dict[str, ProbeResult]:
    devices = dict.fromkeys(range(ranks), "cpu")
    return probe(paths, devices, ranks, host_store(), start, **more)


@pytest.fixture(autouse=True)
def children_find_the_faults(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", comm_fork.python_path())
    comm_fork.wait_until_ready()


@pytest.mark.parametrize(
    ("fault", "outcome", "says"),
    [
        (
            "nan_on_one_rank",
            "nan",
            "all_reduce bfloat16[128]: 1 of 128 values differ, [127] is nan",
        ),
        ("wrong_on_one_rank", "wrong", "on rank 1 of 2"),
        ("hang_at_init", "hang", "while it was set up, within 1 s"),
        ("crash_at_init", "crash", "while it was set up (exit code -11) about to crash"),
        ("error_mid_run", "error", "RuntimeError: invalid argument, on rank 1 of 2"),
    ],
)
def test_fault_on_every_path(fault, outcome, says):
    """Each path in turn has the fault; the healthy one after them is reached all the same."""
    limit_s = HANG_S if outcome == "hang" else 30
    paths = [path_with(fault, name, limit_s) for name in PROBED if name != "torch"]
    began = time.monotonic()
    results = run([*paths, path_with("healthy", "torch")])
    took = time.monotonic() - began
    for path in paths:
        assert results[path.name].outcome == outcome, results[path.name]
        assert says in results[path.name].detail
        assert results[path.name].bad
    assert results["torch"].outcome == "ok"
    rounds = 1 if outcome in ("nan", "wrong") else len(paths) + 1
    assert took < 5 + rounds * (ROUND_S + (HANG_S if outcome == "hang" else 0))


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("wrong_order_of_gather", "wrong"),
        ("last_result_again", "wrong"),
        ("one_rank_forgotten", "wrong"),
        ("hang_mid_run", "hang"),
        ("hang_with_interpreter_lock", "hang"),
        ("exit_mid_run", "crash"),
        ("absent", "unavailable"),
        ("absent_on_one_rank", "unavailable"),
    ],
)
def test_other_faults(fault, outcome):
    limit_s = 3 if outcome == "hang" else 30  # time to come to the hang
    results = run([path_with(fault, limit_s=limit_s), path_with("healthy", "torch")])
    assert results["custom"].outcome == outcome, results["custom"]
    assert results["torch"].outcome == "ok"
    if fault == "hang_mid_run":
        # Rank 0 hangs and the other waits for it: either may be told first.
        case = "all_reduce bfloat16[8192], within 3 s, on rank"
        assert results["custom"].detail in (f"{case} 0 of 2", f"{case} 1 of 2")


def test_healthy_paths_are_all_tried_in_one_round():
    results = run([path_with("healthy", name) for name in PROBED])
    assert [r.outcome for r in results.values()] == ["ok"] * len(PROBED)
    assert {r.cases for r in results.values()} == {18}  # 3 sizes, 3 dtypes, sum and gather


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("exit_mid_run", "crash"), ("error_mid_run", "error"), ("hang_mid_run", "hang")],
)
def test_every_process_that_watches_one_rank_comes_to_the_same_verdict(fault, outcome):
    """As in a server: each worker answers for its own rank."""
    store = host_store()
    paths = [path_with(fault, limit_s=3 if outcome == "hang" else 30)]
    paths.append(path_with("healthy", "torch"))

    def worker(rank: int) -> dict[str, ProbeResult]:
        meeting = store if rank == 0 else (store.host, store.port)
        return probe(paths, {rank: "cpu"}, 2, meeting, start_forked)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(worker, range(2))
    assert {name: r.outcome for name, r in first.items()} == {"custom": outcome, "torch": "ok"}
    assert first == second


def test_time_that_imports_take_is_not_held_against_a_path():
    slow = replace(PATHS["custom"], opener="comm_slow_import:healthy", limit_s=1.5)
    assert run([slow])["custom"].outcome == "ok"


def test_processes_that_a_path_has_started_end_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPILERS", str(tmp_path))
    results = run([path_with("hang_beside_a_compiler", limit_s=3)], start=start_subprocess)
    assert results["custom"].outcome == "hang"
    for rank in range(2):
        compiler = Path("/proc", (tmp_path / str(rank)).read_text(), "stat")
        assert not compiler.exists() or ") Z " in compiler.read_text()


@pytest.mark.parametrize(("ranks", "start"), [(2, start_subprocess), (4, start_forked)])
def test_rounds_go_on_after_each_fault(ranks, start):
    """With new interpreters as in production, and with more ranks."""
    faults = {"custom": "absent", "pynccl": "crash_at_init", "torch": "healthy"}
    paths = [path_with(fault, name) for name, fault in faults.items()]
    results = run(paths, ranks, start)
    assert [r.outcome for r in results.values()] == ["unavailable", "crash", "ok"]
    assert f"on rank {ranks - 1} of {ranks}" in results["pynccl"].detail
    assert "exit code -11" in results["pynccl"].detail


def test_children_that_cannot_start_say_nothing_of_any_path():
    def start(job: Job, log: Path):
        return start_forked(replace(job, device="cuda:7"), log)

    with pytest.raises(ProbeError, match="rank [01]: "):
        run([path_with("healthy")], start=start)


def test_a_child_that_one_process_cannot_start_is_no_ones_fault():
    """As for want of memory: the other processes are told, and do not wait for it."""
    store = host_store()

    def start(job: Job, log: Path):
        if job.rank == 1:
            raise OSError("Cannot allocate memory")
        return start_forked(job, log)

    def worker(rank: int) -> None:
        meeting = store if rank == 0 else (store.host, store.port)
        with pytest.raises(ProbeError, match="rank 1: .*Cannot allocate memory"):
            probe([path_with("healthy")], {rank: "cpu"}, 2, meeting, start)

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(worker, range(2)))
    assert time.monotonic() - began < 20


def test_children_that_do_not_meet_are_given_up():
    """One rank's process is stuck before anything has begun: no path is to blame."""

    def start(job: Job, log: Path):
        return start_forked(replace(job, world_size=3), log)  # waits for a third

    began = time.monotonic()
    with pytest.raises(ProbeError, match="waiting for the other ranks, within 2 s"):
        run([path_with("healthy")], start=start, start_limit_s=2)
    assert time.monotonic() - began < 20


def test_command_line(tmp_path):
    out = tmp_path / "probe.json"
    options = ["--device", "cpu", "--save", "--path", "torch", "--path", "torch_symm_mem"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_backend.comm", *options, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {result["path"]: result["outcome"] for result in json.loads(out.read_text())["results"]}
    assert found == {"torch": "ok", "torch_symm_mem": "unavailable"}
    assert len(list(tmp_path.glob("moe-backend/comm/*.json"))) == 1


@pytest.mark.gpu
@pytest.mark.slow
def test_command_line_on_gpus(tmp_path):
    """What torch offers works here, eager and captured."""
    import torch

    ranks = min(torch.cuda.device_count(), 4)
    if ranks < 2:
        pytest.skip("needs two GPUs")
    out = tmp_path / "probe.json"
    command = [sys.executable, "-m", "moe_backend.comm", "--world-size", str(ranks)]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {r["path"]: r for r in json.loads(out.read_text())["results"]}
    assert found["torch"]["outcome"] == "ok"
    assert found["torch"]["cases"] > 24  # the captured ones are on top of 4 sizes x 3 dtypes x 2
