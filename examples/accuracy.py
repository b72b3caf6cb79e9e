"""Accuracy of the tiny model in every format, each served through vLLM with our backend.

Converts the bf16 model to each checkpoint dialect, asks the held-out prompts greedily, and prints
the table of the README. Exit code 1 if FP8 loses more than 1 point against bf16, NVFP4 more than
3, or the two NVFP4 dialects answer differently.

    python examples/accuracy.py [--prompts 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
TINY = HERE / "tiny_step" / "checkpoint"
ALLOWED_LOSS = {  # points
    "bf16": 0.0,
    "fp8-block": 1.0,
    "nvfp4-modelopt": 3.0,
    "nvfp4-ct": 3.0,
    # Kept as in the checkpoint, or converted to FP8, whatever `auto` does on this machine.
    "nvfp4-modelopt packed": 3.0,
    "nvfp4-modelopt folded": 3.0,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--moe-backend", default="blockscale")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="compile and capture CUDA graphs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--answer", metavar="MODEL", help=argparse.SUPPRESS)  # the child's part
    args = parser.parse_args()
    if args.answer:
        return answer(args)

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ALLOWED_LOSS:
            dialect, _, path = name.partition(" ")
            model = TINY if dialect == "bf16" else Path(scratch) / dialect
            if not model.exists():
                command = [sys.executable, "-m", "moe_backend.cli", "convert"]
                subprocess.run([*command, str(TINY), str(model), "--to", dialect], check=True)
            results[name] = ask(model, args, {"MOE_BACKEND_NVFP4": path} if path else {})
    return report(results, args)


def ask(model: Path, args: argparse.Namespace, environment: dict[str, str]) -> dict:
    """Serve `model` in a process of its own; `{"completions": [...], "right": [...], ...}`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        own = {**vars(args), "answer": str(model), "json": Path(out.name)}
        # A fork: where the caller has imported vLLM, the six processes need not.
        context = multiprocessing.get_context("fork")
        child = context.Process(target=answer, args=(argparse.Namespace(**own), environment))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{model}: exit code {child.exitcode}")
        return json.loads(Path(out.name).read_text())


def answer(args: argparse.Namespace, environment: Mapping[str, str] = {}) -> int:
    """The child: serve one model, ask everything, write what it said."""
    os.environ.update(environment)
    sys.path[:0] = [str(HERE), str(HERE / "tiny_step")]
    import simple_inference
    import tasks

    simple_inference.prepare_environment(args.answer, args.tensor_parallel_size)
    from vllm import LLM, SamplingParams

    samples = tasks.held_out(args.prompts)
    llm = LLM(
        args.answer,
        moe_backend=args.moe_backend,
        tensor_parallel_size=args.tensor_parallel_size,
        enable_expert_parallel=args.enable_expert_parallel,
        enforce_eager=not args.graphs,
        max_model_len=512,
    )
    if args.moe_backend == "blockscale":
        simple_inference.print_layers(llm)
    outputs = llm.generate(
        [prompt for _, prompt, _ in samples],
        SamplingParams(temperature=0, max_tokens=32),
        use_tqdm=False,
    )
    said = [o.outputs[0].text for o in outputs]
    right = [tasks.check(p, c) is True for (_, p, _), c in zip(samples, said, strict=True)]
    args.json.write_text(
        json.dumps({"tasks": [t for t, _, _ in samples], "completions": said, "right": right})
    )
    return 0


def report(results: dict[str, dict], args: argparse.Namespace) -> int:
    """Print the table, write the JSON, and say whether every promise is kept."""
    names = sorted(set(results["bf16"]["tasks"]))
    accuracy = {name: percent(r["right"]) for name, r in results.items()}
    print(f"| format | all | {' | '.join(names)} |")
    print(f"|---|---|{'---|' * len(names)}")
    for name, result in results.items():
        per_task = [
            percent([r for r, t in zip(result["right"], result["tasks"], strict=True) if t == task])
            for task in names
        ]
        cells = " | ".join(f"{value:.1f}" for value in per_task)
        print(f"| {name} | **{accuracy[name]:.1f} %** | {cells} |")
    same = results["nvfp4-modelopt"]["completions"] == results["nvfp4-ct"]["completions"]
    print(f"\n{args.prompts} held-out prompts; NVFP4 dialects answer alike: {same}")
    if args.json:
        args.json.write_text(json.dumps({"prompts": args.prompts, "accuracy": accuracy}) + "\n")
    lost = [n for n, points in ALLOWED_LOSS.items() if accuracy["bf16"] - accuracy[n] > points]
    for name in lost:
        print(f"{name} loses more than {ALLOWED_LOSS[name]} points", file=sys.stderr)
    return 1 if lost or not same or accuracy["bf16"] < 97 else 0


def percent(right: list[bool]) -> float:
    return 100 * sum(right) / len(right)


if __name__ == "__main__":
    sys.exit(main())
