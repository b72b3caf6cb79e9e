"""One server of `gpu_parallel.py`: all prompts, and what it said, as JSON.

    python benchmarks/gpu_parallel_serve.py JOB

JOB is JSON; its fields are read in `main`. `gpu_answers.py` has its runs done here too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm_server import free_port, serving

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "tiny_step")]

CAPTURED = [1, 2, 4, 8, 16, 32, 64]
MAX_TOKENS = 32
START_S = 400  # of a server, until it answers


def main() -> None:
    job = json.loads(sys.argv[1])
    import simple_inference
    import tasks

    simple_inference.prepare_environment(job["model"], job["ranks"])
    job["eager"] = job.get("eager", False) or simple_inference.on_cpu()
    samples = tasks.held_out(job["prompts"])
    ask = ask_over_http if job["data_parallel"] else ask_offline
    answer = ask(job, [prompt for _, prompt, _ in samples])
    right = [
        tasks.check(prompt, text) is True
        for (_, prompt, _), text in zip(samples, answer.pop("texts"), strict=True)
    ]
    names = ["cpu"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(rank) for rank in range(job["ranks"])]
    answer |= {
        "right": sum(right) / len(right),
        "devices": names,
        "versions": dict(versions()),
    }
    Path(job["answer"]).write_text(json.dumps(answer))


def compilation(job: dict[str, Any]) -> dict[str, Any]:
    if job["no_compile"]:
        return {
            "cudagraph_capture_sizes": CAPTURED,
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
        }
    return {"cudagraph_capture_sizes": CAPTURED}


def ask_offline(job: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    """Through `vllm.LLM`, which also tells how often each path was called."""
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    llm = LLM(
        job["model"],
        moe_backend="blockscale",
        tensor_parallel_size=job["ranks"],
        enable_expert_parallel=job["expert_parallel"],
        enforce_eager=job["eager"],
        max_model_len=512,
        max_num_seqs=max(CAPTURED),
        compilation_config=compilation(job),
        worker_extension_cls="gpu_parallel_worker.CountingWorker",
        **job.get("engine", {}),
    )
    started = time.monotonic()
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False
    )
    ended = time.monotonic()
    calls, checked = llm.collective_rpc("collective_calls")[0]
    return {
        "start_s": round(started - began, 1),
        "generate_s": round(ended - started, 2),
        "texts": [output.outputs[0].text for output in outputs],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "calls": calls,
        "checked": checked,
    }


def ask_over_http(job: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    """Through `vllm serve` with data parallelism, which `vllm.LLM` does not do in one process."""
    port = free_port()
    options = ["--moe-backend", "blockscale", "--served-model-name", "tiny"]
    options += ["--data-parallel-size", str(job["ranks"]), "--enable-expert-parallel"]
    options += ["--max-model-len", "512", "--max-num-seqs", str(max(CAPTURED))]
    options += ["--enforce-eager"] if job["eager"] else []
    options += ["--compilation-config", json.dumps(compilation(job))]
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": MAX_TOKENS}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({**body, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with serving(job["model"], options, port, START_S, own_session=False) as start_s:
        began = time.monotonic()
        with urllib.request.urlopen(request, timeout=300) as response:
            choices = json.load(response)["choices"]
        ended = time.monotonic()
    choices.sort(key=lambda choice: choice["index"])
    return {
        "start_s": round(start_s, 1),
        "generate_s": round(ended - began, 2),
        "texts": [choice["text"] for choice in choices],
        "tokens": [choice["token_ids"] for choice in choices],
        "calls": {},
        "checked": 0,
    }


def versions() -> Iterator[tuple[str, str]]:
    from moe_backend import __version__
    from moe_backend.comm.machine import nccl_version

    yield "moe-backend", __version__
    yield "torch", torch.__version__
    if torch.cuda.is_available():
        yield "nccl", nccl_version()
    for name in ("vllm", "triton", "flashinfer-python"):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    main()
