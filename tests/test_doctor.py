"""What `moe-backend doctor` says of kernels, variables and folders."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest
import torch

from moe_backend import doctor, envs, folders
from moe_backend.cli import main
from moe_backend.comm import __main__ as comm_main
from moe_backend.comm import cache
from moe_backend.comm.policy import ProbeResult
from moe_backend.doctor import LayerRow
from moe_backend.engines import vllm
from moe_backend.tune import command

NO_GPU, ONLY = "not hopper: no GPU", "not vllm_cpu: bf16 only"


def test_each_reason_is_told_once_with_its_layers():
    rows = [
        LayerRow("bf16", "silu", "vllm_cpu", "faster", (NO_GPU,)),
        LayerRow("bf16", "swiglustep(limit=7.0)", "reference", "plain", (NO_GPU,)),
        LayerRow("nvfp4", "silu", "reference", "plain", (NO_GPU, ONLY)),
    ]
    assert doctor.reasons(rows) == {
        "vllm_cpu: faster": ["bf16 silu"],
        NO_GPU: ["all"],
        "reference: plain": ["bf16 swiglustep", "nvfp4"],
        ONLY: ["nvfp4"],
    }


def test_no_reason_is_lost():
    layers = doctor.examine().layers
    told = doctor.reasons(layers)
    assert any(row.refusals for row in layers)
    for row in layers:
        assert {f"{row.kernel}: {row.reason}", *row.refusals} <= told.keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MOE_BACKEND_KERNEL", "foo", "kernel 'foo' is unknown"),
        ("MOE_BACKEND_NVFP4", "foo", "MOE_BACKEND_NVFP4='foo' is unknown; accepted: auto, packed"),
        ("MOE_BACKEND_WARMUP", "abc", "MOE_BACKEND_WARMUP='abc': a number of seconds"),
        ("MOE_BACKEND_ALL_REDUCE", "foo", "MOE_BACKEND_ALL_REDUCE='foo': accepted are auto, probe"),
        ("MOE_BACKEND_TUNED", "/nope", "MOE_BACKEND_TUNED='/nope': there is no such folder"),
    ],
)
def test_a_wrong_variable_is_a_problem(name, value, message, monkeypatch, capsys):
    """Those that are read only where there is such a layer, or several ranks, too."""
    monkeypatch.setenv(name, value)
    assert main(["doctor"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert [message in line for line in lines] == [True]


def test_right_variables_are_no_problem(monkeypatch, tmp_path):
    for tuned in (str(tmp_path), "off", ""):
        monkeypatch.setenv("MOE_BACKEND_TUNED", tuned)
        monkeypatch.setenv("MOE_BACKEND_NVFP4", "folded")
        monkeypatch.setenv("MOE_BACKEND_WARMUP", "0")
        monkeypatch.setenv("MOE_BACKEND_ALL_REDUCE", "-custom,-quick")
        assert doctor.examine().problems == []


def test_names_and_reasons_are_whole_in_a_narrow_window(monkeypatch, capsys):
    """They are there to be copied; a value is written on as many lines as it takes."""
    value = f"/{'long' * 30}[end]"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MOE_BACKEND_TUNED", value)
    main(["doctor"])
    shown = capsys.readouterr().out
    assert "\u2026" not in shown
    for variable in envs.VARIABLES:
        assert variable.name in shown
    assert f"problem: MOE_BACKEND_TUNED={value!r}: there is no such folder" in shown
    cells = [line.split("\u2502")[2].strip() for line in shown.splitlines() if "\u2502" in line]
    assert value in "".join(cells)


# --- Without a home folder ------------------------------------------------------------------------


@pytest.fixture
def homeless(monkeypatch):
    """A user who is in no list, as in a container that is started under any number."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


@pytest.mark.usefixtures("homeless")
def test_doctor_without_a_home_folder(capsys):
    assert main(["doctor"]) == 0
    assert doctor.examine().facts["compiled kernels"].endswith(", as there is no home folder")


@pytest.mark.usefixtures("homeless")
def test_tune_without_a_home_folder_says_what_to_give(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no home folder for the table; give --out FILE, or a fol"):
        command._own_file("GPU")
    monkeypatch.setenv("MOE_BACKEND_TUNED", str(tmp_path))
    assert command._own_file("GPU") == tmp_path / "GPU.json"


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_no_verdicts_are_kept(monkeypatch, capsys):
    machine = comm_main.describe(torch.device("cpu"), [("here", "cpu")] * 2)
    assert cache.folder() is None
    assert cache.load(machine) == {}
    assert not cache.save(machine, {"shm": ProbeResult("shm", "ok")})
    with cache.marked(machine, ["shm"]):
        assert cache.unfinished(machine) == []
    monkeypatch.setattr(comm_main, "probe", lambda *_: {"shm": ProbeResult("shm", "ok")})
    assert comm_main.main(["--device", "cpu", "--save"]) == 0
    assert "there is no home folder; nothing was kept" in capsys.readouterr().err


def test_folders_with_a_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.cache_root() == tmp_path / ".cache" / "moe-backend"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert folders.cache_root() == tmp_path / "other" / "moe-backend"


def test_a_vllm_that_cannot_be_imported_is_a_problem(monkeypatch):
    def broken():
        raise OSError("no such library")

    monkeypatch.setattr(vllm, "installed_version", broken)
    report = doctor.examine()
    assert report.facts["vLLM"] == "cannot be imported"
    assert report.problems == ["vLLM cannot be imported: OSError('no such library')"]
