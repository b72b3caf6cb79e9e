"""Reports, decisions and memory: everything about the paths that needs no second process."""

from __future__ import annotations

import ctypes
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_backend.comm import (
    PATHS,
    REPORTS,
    VARIABLE,
    Collective,
    Machine,
    NoUsablePathError,
    Override,
    ProbeResult,
    World,
    cache,
    decide,
    parse_override,
    reports_for,
    run_checks,
)
from moe_backend.comm.checks import Findings, everyone, total, values
from moe_backend.comm.machine import describe, device_identity, nccl_version
from moe_backend.comm.policy import refusal
from moe_backend.comm.reports import probe_first
from moe_backend.comm.summary import rows, this_machine

H200 = Machine("sm_90", 8, linked=True)
MI355 = Machine("gfx950", 8, linked=True, hip="7.2.2")
PCIE = Machine("sm_89", 2, linked=False)


# --- The table ------------------------------------------------------------------------------------


def test_every_report_names_a_path_a_source_and_a_status():
    for report in REPORTS:
        assert report.path in PATHS
        assert re.search(r"#\d+|\.py$", report.source), report
        assert report.status
        re.compile(report.arch)


def test_docs_list_every_report_and_path():
    text = (Path(__file__).parents[1] / "docs" / "communication.md").read_text()
    for name, path in PATHS.items():
        assert f"| `{name}` | {path.what} | " in text
    rows = [line for line in text.splitlines() if re.match(r"\| \w+ \| `(gfx|sm_|cpu)", line)]
    assert len(rows) == len(REPORTS)
    for report in REPORTS:
        said = f"| {report.symptom}: {report.condition} | {report.source} | {report.status} | "
        (row,) = [row for row in rows if row.startswith(f"| {report.path} | ") and said in row]
        assert f"`{report.arch}`" in row
        hazard = not report.settled and report.symptom in ("hang", "crash")
        assert row.endswith("| yes |" if hazard else "|  |")


def test_every_path_falls_back_on_torch():
    for path in PATHS.values():
        seen = {path.name}
        while path.instead:
            path = PATHS[path.instead]
            assert path.name not in seen
            seen.add(path.name)
        assert path.name == "torch"


def test_reports_match_their_machines_only():
    assert {r.path for r in reports_for(MI355)} >= {"aiter", "custom", "pynccl", "torch"}
    assert not any(r.arch.startswith("sm") for r in reports_for(MI355))
    assert {r.path for r in reports_for(PCIE)} >= {"custom", "pynccl"}
    unlinked = [r for r in reports_for(PCIE) if r.unlinked]
    assert unlinked
    assert not any(r in reports_for(replace(PCIE, linked=None)) for r in unlinked)


@pytest.mark.parametrize(
    ("machine", "paths"),
    [
        (H200, []),
        (replace(MI355, world_size=4), ["aiter"]),
        (MI355, ["aiter", "pynccl", "torch"]),
        (replace(MI355, world_size=2, hip="7.2.0.70200-43"), ["custom", "aiter"]),
        (Machine("gfx942", 8, hip="7.1"), ["custom", "aiter"]),
        (PCIE, ["custom", "pynccl", "torch"]),
        (Machine("cpu", 2), []),
        (Machine("cpu", 2, hosts=2), ["shm"]),
    ],
)
def test_what_is_tried_in_child_processes_first(machine, paths):
    assert probe_first(machine) == paths


# --- What the user asks for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "override"),
    [
        (None, Override()),
        ("", Override()),
        ("probe", Override("probe")),
        ("on", Override("on")),
        ("custom", Override(only=("custom",))),
        ("-custom, -quick", Override(without=("custom", "quick"))),
    ],
)
def test_override(text, override):
    assert parse_override(text) == override


@pytest.mark.parametrize("text", ["fast", "custom,-quick", "auto,custom", "-torch", ",", "-"])
def test_override_not_understood(text):
    with pytest.raises(ValueError, match="accepted are auto, probe, on, off, one or more of"):
        parse_override(text)


# --- The decision ---------------------------------------------------------------------------------

GPU = ("custom", "symm_mem", "pynccl", "torch")


def bad(path: str, outcome="hang") -> dict[str, ProbeResult]:
    return {path: ProbeResult(path, outcome, "all_reduce bfloat16[128], on rank 1 of 2")}


def test_nothing_is_off_without_a_finding():
    decision = decide(GPU, {"custom": ProbeResult("custom", "ok")}, Override())
    assert decision.on == GPU
    assert decision.describe() == "all paths on: custom, symm_mem, pynccl, torch"


@pytest.mark.parametrize("outcome", ["nan", "wrong", "error", "crash", "hang"])
def test_a_finding_switches_its_path_off(outcome):
    decision = decide(GPU, bad("custom", outcome), Override())
    assert set(decision.off) == {"custom"}
    assert decision.instead_of("custom") == "symm_mem"
    assert "on rank 1 of 2), symm_mem instead" in decision.describe()


@pytest.mark.parametrize("outcome", ["ok", "unused", "unavailable"])
def test_other_outcomes_do_not(outcome):
    assert not decide(GPU, bad("custom", outcome), Override()).off


def test_override_decides_over_findings():
    assert not decide(GPU, bad("custom"), Override("on")).off
    assert decide(GPU, {}, Override("off")).on == ("torch",)
    assert decide(GPU, {}, Override(only=("custom",))).on == ("custom", "pynccl", "torch")
    assert decide(GPU, {}, Override(only=("torch",))).on == ("torch",)
    assert decide(("shm", "torch"), {}, Override(only=("shm",))).on == ("shm", "torch")
    assert decide(GPU, {}, Override(without=("pynccl",))).on == ("custom", "symm_mem", "torch")


def test_what_stands_in_is_never_off_itself():
    decision = decide(GPU, bad("pynccl") | bad("symm_mem"), Override(without=("custom",)))
    assert {decision.instead_of(name) for name in decision.off} == {"torch"}


def test_refusals_name_the_way_out():
    with pytest.raises(NoUsablePathError, match=f"{VARIABLE}=auto to use what works") as error:
        decide(GPU, bad("custom"), Override(only=("custom",)))
    assert f"{VARIABLE}=probe tries it again" in str(error.value)  # the finding may be a stored one
    with pytest.raises(NoUsablePathError, match="NCCL_P2P_DISABLE=1") as error:
        decide(GPU, bad("torch"), Override())
    assert f"{VARIABLE}=probe" in str(error.value)
    assert "did not finish" in refusal(bad("torch")["torch"], asked=False)


# --- Known sums -----------------------------------------------------------------------------------


def lonely(rank: int = 0, world_size: int = 2) -> World:
    return World(rank, world_size, torch.device("cpu"), None)  # type: ignore[arg-type]


def simulated(world: World, sum_of=None) -> Collective:
    """A path that knows the other ranks' data: each call has the step after the last."""
    step = 0

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal step
        step += 1
        result = total(world, tensor.numel(), tensor.dtype, step)
        return sum_of(result) if sum_of else result

    return Collective(all_reduce)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("world_size", [2, 8, 16])
def test_sums_are_exact_in_every_dtype(dtype, world_size):
    world = lonely(0, world_size)
    for step in range(20):
        shares = [values(r, 512, dtype, world.device, step) for r in range(world_size)]
        added = torch.stack(shares).sum(0)
        assert torch.equal(added, total(world, 512, dtype, step))
        assert torch.equal(everyone(world, 512, dtype, step), torch.cat(shares))
        assert added.abs().max() <= 8 * world_size
    assert not torch.equal(shares[0], shares[1])


def test_healthy_simulation_passes():
    world = lonely()
    findings = run_checks(simulated(world), world)
    assert findings == Findings(cases=9, outcome="ok", now="all_reduce float32[65536]")


@pytest.mark.parametrize(
    ("spoil", "outcome", "says"),
    [
        (lambda t: t * float("nan"), "nan", "128 of 128 values differ"),
        (lambda t: t + 1, "wrong", "all_reduce bfloat16[128]: 128 of 128"),
        (lambda t: t[:-1], "wrong", "shape (127,), not (128,)"),
        (lambda t: torch.where(t == t.max(), float("inf"), t), "wrong", "is inf, not"),
    ],
)
def test_spoiled_simulation_is_found(spoil, outcome, says):
    world = lonely()
    findings = run_checks(simulated(world, spoil), world)
    assert findings.outcome == outcome
    assert says in findings.detail
    assert findings.cases == 9  # it goes on, so that the other ranks do not wait


def test_path_that_takes_nothing_is_unused():
    path = Collective(torch.clone, accepts=lambda _: False)
    assert run_checks(path, lonely()).outcome == "unused"


def test_gather_that_the_path_leaves_to_others_is_no_case():
    """aiter's may return None, and vLLM then takes the next path."""
    world = lonely()
    path = replace(simulated(world), all_gather=lambda tensor: None)
    assert run_checks(path, world).cases == 9


def test_quantised_path_may_be_a_little_off():
    world = lonely()
    path = replace(simulated(world, lambda t: t * 1.01), tolerance=0.02)
    assert run_checks(path, world).outcome == "ok"
    path = replace(simulated(world, lambda t: t * 1.1), tolerance=0.02)
    assert run_checks(path, world).outcome == "wrong"


# --- Memory ---------------------------------------------------------------------------------------


def two_processes() -> Machine:
    return describe(torch.device("cpu"), [device_identity(torch.device("cpu"))] * 2)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return two_processes()


def test_verdicts_are_kept_and_merged(machine):
    assert cache.load(machine) == {}
    assert cache.save(machine, bad("custom"))
    assert cache.save(machine, {"shm": ProbeResult("shm", "ok")})
    assert cache.load(machine) == {**bad("custom"), "shm": ProbeResult("shm", "ok")}


def test_a_failure_of_what_everything_falls_back_on_is_not_remembered(machine):
    """It would refuse every later start untried."""
    assert cache.save(machine, bad("torch") | bad("custom"))
    assert cache.load(machine) == bad("custom")


def test_verdicts_hold_for_their_machine_only(machine, monkeypatch):
    cache.save(machine, bad("custom"))
    assert cache.load(replace(machine, world_size=4)) == {}
    assert cache.load(replace(machine, driver="580.1")) == {}
    assert cache.load(replace(machine, versions={**machine.versions, "torch": "9"})) == {}
    assert cache.load(replace(machine, linked=True)) != {}
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert cache.load(two_processes()) == {}


def test_verdicts_hold_for_the_nccl_that_is_loaded(monkeypatch):
    def get_version(number):
        number._obj.value = 22907
        return 0

    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(ncclGetVersion=get_version))
    assert nccl_version() == "2.29.7"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert nccl_version() == "2.28.9"


def test_damaged_or_missing_memory_is_no_memory(machine, monkeypatch):
    cache.save(machine, bad("custom"))
    cache.verdict_file(machine).write_text('{"results": {"custom": {"who": 1}}}')
    assert cache.load(machine) == {}
    cache.verdict_file(machine).write_text("half a fi")
    assert cache.load(machine) == {}
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert not cache.save(machine, bad("custom"))
    with cache.marked(machine, ["custom"]):
        pass
    assert cache.unfinished(machine) == []


def test_mark_of_a_start_that_died(machine):
    with cache.marked(machine, ["custom"]):
        assert cache.unfinished(machine) == []  # this process is still at it
    assert not list(cache.folder().glob("*.pending"))
    with pytest.raises(RuntimeError), cache.marked(machine, ["custom", "pynccl"]):
        raise RuntimeError
    (mark,) = cache.folder().glob("*.pending")
    assert cache.unfinished(machine) == []
    record = json.loads(mark.read_text())
    record["process"] = f"elsewhere {os.getpid()} 1"
    mark.write_text(json.dumps(record))
    assert cache.unfinished(machine) == ["custom", "pynccl"]
    assert cache.unfinished(machine, clear=True) == ["custom", "pynccl"]
    assert cache.unfinished(machine) == []


def test_rows_for_the_doctor(machine):
    assert rows(machine) == []
    cache.save(
        machine,
        {"shm": ProbeResult("shm", "wrong", "half of it"), "torch": ProbeResult("torch", "ok")},
    )
    assert [(r.path, r.verdict, r.start) for r in rows(machine)] == [
        ("shm", "gave a wrong result: half of it", "left out"),
        ("torch", "ok", "tried in place"),
    ]
    (aiter,) = [r for r in rows(MI355) if r.path == "aiter"]
    assert aiter.start == "tried in child processes first"
    assert "ROCm/aiter#3548, withdrawn" in aiter.reports
    assert this_machine().world_size >= 1
