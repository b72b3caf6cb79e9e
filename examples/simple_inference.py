"""Serve a model through vLLM and print what it answers, what ran, and how fast.

With no arguments it serves the trained model of examples/tiny_step and knows the right answers;
a wrong one makes the exit code 1.

    python examples/simple_inference.py
    python examples/simple_inference.py MODEL -tp 2 --enable-expert-parallel "1+2+3="
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent
TINY = HERE / "tiny_step" / "checkpoint"
PROMPTS = (  # of the tiny model's tasks; it was trained on none of these
    "57+52=",
    "36+62+79=",
    "sort 7 3 9 1: ",
    "copy l f f x 8 s: ",
    "reverse k 4 d: ",
    "Of Mongolia, the capital is",
    "What do people speak in Japan? They speak",
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(TINY), help="folder or hub name")
    parser.add_argument("prompts", nargs="*", help="prompts; default: tasks of the tiny model")
    parser.add_argument("--moe-backend", default="blockscale")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs, no torch.compile")
    return parser.parse_intermixed_args()  # flags may stand between model and prompts


def prepare_environment(model: str, ranks: int) -> None:
    """What vLLM needs on a machine without a GPU, and for asking the workers what they run."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # our own function, own workers
    # A fork after anything has asked CUDA for its devices cannot use the GPU.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if Path(model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not on_cpu():
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    if ranks > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def main() -> int:
    args = parse()
    prepare_environment(args.model, args.tensor_parallel_size)
    sys.path.insert(0, str(HERE / "tiny_step"))
    import tasks
    from vllm import LLM, SamplingParams

    # The tiny model, or a conversion of it: its tasks have answers to compare with.
    knows_answers = (Path(args.model) / "held_out.jsonl").exists()
    prompts = args.prompts or list(PROMPTS if knows_answers else ("The capital of France is",))
    llm = LLM(
        args.model,
        moe_backend=args.moe_backend,
        tensor_parallel_size=args.tensor_parallel_size,
        enable_expert_parallel=args.enable_expert_parallel,
        enforce_eager=args.enforce_eager or on_cpu(),
        max_model_len=512 if args.model == str(TINY) else None,
    )
    if args.moe_backend == "blockscale":
        print_layers(llm)
    sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    llm.generate(prompts[:1], sampling, use_tqdm=False)  # warm-up, not timed
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start

    wrong = 0
    for output in outputs:
        completion = output.outputs[0].text
        right = tasks.check(output.prompt, completion) if knows_answers else None
        wrong += right is False
        mark = {True: "  right", False: "  WRONG", None: ""}[right]
        print(f"{output.prompt!r} -> {completion!r}{mark}")
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")
    if wrong:
        print(f"{wrong} of {len(outputs)} answers are wrong", file=sys.stderr)
    return 1 if wrong else 0


def print_layers(llm: object) -> None:
    """One line per distinct layer class: format, layout, kernel and why."""
    from moe_backend.engines.vllm_report import describe_layers

    shown: dict[str, str] = {}
    for rank, found in enumerate(llm.collective_rpc(describe_layers)):  # type: ignore[attr-defined]
        for line, layers in found.items():
            if line not in shown:
                shown[line] = f"{len(layers)} layers ({layers[0]}, ...) from rank {rank}"
    for line, where in shown.items():
        print(f"{where}: {line}")


if __name__ == "__main__":
    sys.exit(main())
