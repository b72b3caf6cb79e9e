"""`benchmarks/gpu_parallel.py` tried out without a GPU: one server, then nothing is left to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.long]

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_parallel.py"


def call(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), "--no-probe", "--prompts", "4"]
    command += options if "--only" in options else ["--only", "bf16", "off", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=290)


def test_a_run_is_judged_and_not_repeated(tmp_path):
    out = tmp_path / "out.jsonl"
    assert call(out, "--budget", "0").returncode == 3  # not enough for a server
    assert not out.exists()
    done = call(out, "--budget", "280")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["ok"]
    assert row["right"] == 1
    assert len(row["tokens"]) == 4
    assert any("shm off (MOE_BACKEND_ALL_REDUCE=off)" in line for line in row["log"])
    assert call(out, "--budget", "0").returncode == 0  # nothing is left
    other = {**row, "tokens": [[1], *row["tokens"][1:]]}
    out.write_text(json.dumps({**other, "name": "bf16 unset"}) + "\n")
    again = call(out, "--budget", "280")
    assert again.returncode == 1  # the tokens differ from those of the first run
    assert json.loads(out.read_text().splitlines()[-1])["differ"] == [0]


def test_planted_fault_is_found(tmp_path):
    out = tmp_path / "out.jsonl"
    done = call(out, "--only", "faulty", "--budget", "280")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["under_test"]
    assert row["right"] == 1
    assert any("shm off (gave a wrong result" in line for line in row["log"])
