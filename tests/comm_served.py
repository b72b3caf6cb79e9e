"""Serve a model with `-tp 2` once per setting of the collectives, and write what it answers.

    python tests/comm_served.py MODEL OUT.json auto off auto:wrong

A setting is a value of MOE_BACKEND_ALL_REDUCE, with `:wrong` after it if vLLM's shared-memory
all-reduce is to give a wrong result on rank 1 (`comm_faulty_worker`).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROMPTS = 16


def serve(model: str, setting: str) -> list[list[int]]:
    """The token ids that it answers."""
    from vllm import LLM, SamplingParams

    value, _, fault = setting.partition(":")
    os.environ.update(MOE_BACKEND_ALL_REDUCE=value, MOE_BACKEND_TEST_FAULT=fault)
    print(f"--- {setting}", flush=True)
    llm = LLM(
        model,
        moe_backend="blockscale",
        tensor_parallel_size=2,
        enforce_eager=True,
        max_model_len=256,
        worker_extension_cls="comm_faulty_worker.FaultyWorker",
    )
    import tasks

    prompts = [prompt for _, prompt, _ in tasks.held_out(PROMPTS)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    model, out, *settings = sys.argv[1:]
    examples = HERE.parent / "examples"
    sys.path[:0] = [str(examples), str(examples / "tiny_step")]
    os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    import simple_inference

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    simple_inference.prepare_environment(model, 2)
    answers = {setting: serve(model, setting) for setting in settings}
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
