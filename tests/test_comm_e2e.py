"""vLLM with two tensor-parallel ranks on the CPU: the same tokens whatever carries the sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

VARIABLE = "MOE_BACKEND_ALL_REDUCE"
SCRIPT = """
import json, pathlib, sys

def main():
    from vllm import LLM, SamplingParams

    folder = pathlib.Path(sys.argv[1])
    lines = (folder / "held_out.jsonl").read_text().splitlines()[:16]
    llm = LLM(str(folder), moe_backend="blockscale", tensor_parallel_size=2, enforce_eager=True)
    prompts = [json.loads(line)["prompt"] for line in lines]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))

if __name__ == "__main__":
    main()
"""


def test_same_tokens_with_each_path(tiny, tmp_path):
    """`on` is vLLM's own start; `auto` tries the paths; `off` leaves shared memory out."""
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    said = {
        "on": f"paths are not tried: {VARIABLE}=on",
        "auto": "all paths on: shm, torch; tried in place: shm",
        "off": f"shm off ({VARIABLE}=off), torch instead",
    }
    tokens = {}
    for value, line in said.items():
        done = subprocess.run(
            [sys.executable, str(script), str(tiny)],
            capture_output=True,
            text=True,
            timeout=200,
            env={
                **os.environ,
                VARIABLE: value,
                "XDG_CACHE_HOME": str(tmp_path),
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "VLLM_NO_USAGE_STATS": "1",
            },
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (printed,) = [x for x in done.stdout.splitlines() if x.startswith("TOKENS ")]
        tokens[value] = json.loads(printed.removeprefix("TOKENS "))
        assert (done.stdout + done.stderr).count(line) == 1, done.stdout
    assert tokens["on"] == tokens["auto"] == tokens["off"]
    assert len({tuple(t) for t in tokens["on"]}) > 4  # not all the same answer
