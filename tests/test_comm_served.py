"""The trained model at -tp 2: the same tokens on every path, and with a path that is faulty."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comm_shm import needs_shm

pytest.importorskip("vllm")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("comm_served.py")
SETTINGS = ("on", "auto", "off", "on:wrong", "auto:wrong")


@needs_shm
def test_same_tokens_on_every_path_and_with_a_fault(tiny, tmp_path):
    """One process serves five times in turn: vLLM's import alone takes seconds."""
    out = tmp_path / "answers.json"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tiny), str(out), *SETTINGS],
        capture_output=True,
        text=True,
        timeout=290,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "XDG_CACHE_HOME": str(tmp_path),
        },
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    log = dict(zip(SETTINGS, result.stdout.split("--- ")[1:], strict=True))
    assert "tried in place: shm" in log["auto"]
    assert "shm off (MOE_BACKEND_ALL_REDUCE=off), torch instead" in log["off"]
    assert "shm off (gave a wrong result: all_reduce bfloat16[128]" in log["auto:wrong"]
    answers = json.loads(out.read_text())
    assert len(answers["on"]) == 16
    assert answers["auto"] == answers["off"] == answers["on"]
    assert answers["auto:wrong"] == answers["on"]
    assert answers["on:wrong"] != answers["on"]  # nobody looked, so the fault is in the answers
