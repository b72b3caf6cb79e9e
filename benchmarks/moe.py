"""Our kernels beside the other backends of the installed vLLM, layer by layer, on one GPU.

    python benchmarks/moe.py [--shape NAME ...] [--routing uniform|zipf] [--json FILE] [--plot FILE]

Every call is captured in a CUDA graph and its replays are timed; the median counts. Every output is
checked against the plain-torch kernel in the same run (for many tokens, on a sample of them) and a
wrong one is marked wrong, not timed. Floor: the larger of the bytes of the experts that were hit
over 4.3 TB/s (an H200's measured copy rate) and the operations over its measured matrix rates
(1583 TFLOP/s FP8, 790 bf16).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rivals
import torch
import triton
from shapes import SHAPES, Shape
from triton.testing import do_bench

from moe_backend import __version__
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.reference import fused_experts

BYTES_PER_SECOND = 4.3e12
OPERATIONS_PER_SECOND = {"fp8_block": 1583e12, "nvfp4": 790e12, "bf16": 790e12}
BYTES_PER_WEIGHT = {"fp8_block": 1.0, "nvfp4": 0.5625, "bf16": 2.0}
CHECKED_TOKENS = 64
# FP8 activations are 4 % from exact ones; the rivals and ours may quantise them or not.
WRONG = 0.08


@dataclass
class Row:
    """One shape and token count."""

    case: str
    routing: str
    tokens: int
    floor_us: float
    ours_us: float | str | None = None
    rivals: dict[str, float | str | None] = field(default_factory=dict)
    rel_l2: float | None = None
    kernel: str = ""


@dataclass
class Inputs:
    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    sample: torch.Tensor
    expected: torch.Tensor


def route(shape: Shape, tokens: int, routing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts per token: all equally likely, or by Zipf's law in a random order."""
    score = -torch.log(torch.rand(tokens, shape.experts, device="cuda"))
    if routing == "zipf":
        rank = torch.randperm(shape.experts, device="cuda") + 1
        score = score * rank  # the k smallest of exponentials with rates 1/rank
    ids = score.topk(shape.top_k, dim=1, largest=False).indices.int()
    weights = torch.rand(tokens, shape.top_k, device="cuda") + 0.1
    return weights / weights.sum(1, keepdim=True), ids


def make_inputs(shape: Shape, weights: Any, tokens: int, routing: str) -> Inputs:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    topk_weights, ids = route(shape, tokens, routing)
    expert_map = None
    if shape.local != shape.experts:
        expert_map = torch.full((shape.experts,), -1, device="cuda", dtype=torch.int32)
        expert_map[: shape.local] = torch.arange(shape.local, device="cuda", dtype=torch.int32)
    sample = torch.randperm(tokens, device="cuda")[:CHECKED_TOKENS]
    expected = fused_experts(
        x[sample].float(), weights, topk_weights[sample], ids[sample],
        shape.layer().activation, expert_map,
    )  # fmt: skip
    return Inputs(x, topk_weights, ids, expert_map, sample, expected)


def floor_us(shape: Shape, ids: torch.Tensor) -> float:
    hit = ids[ids < shape.local]
    weight = 3 * shape.intermediate * shape.hidden
    moved = hit.unique().numel() * weight * BYTES_PER_WEIGHT[shape.format]
    moved += ids.shape[0] * shape.hidden * 4
    operations = 2 * hit.numel() * weight
    return max(moved / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND[shape.format]) * 1e6


def measure(call: Callable[..., torch.Tensor], given: Inputs) -> tuple[float | str, float]:
    """Microseconds or `wrong`, and the relative L2 error of the sampled tokens."""
    args = (given.x, given.topk_weights, given.topk_ids, given.expert_map)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            call(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    out.fill_(float("nan"))
    graph.replay()
    found = out[given.sample].float()
    error = ((found - given.expected).norm() / given.expected.norm()).item()
    if not error < WRONG:  # NaN as well
        return "wrong", error
    return do_bench(graph.replay, warmup=15, rep=60, return_mode="median") * 1e3, error


def run(shape: Shape, routing: str) -> list[Row]:
    weights = shape.weights()
    layer = shape.layer()
    inputs = {t: make_inputs(shape, weights, t, routing) for t in shape.tokens}
    rows = {
        t: Row(shape.name, routing, t, round(floor_us(shape, given.topk_ids), 1))
        for t, given in inputs.items()
    }
    ours = FusedMoE(layer, weights)
    for tokens, given in inputs.items():
        row = rows[tokens]
        row.ours_us, row.rel_l2 = measure(ours, given)
        row.kernel = ours.selection.kernel.name
    del ours
    for name, rival in rivals.build(layer, weights):
        for tokens, given in inputs.items():
            if isinstance(rival, str):
                rows[tokens].rivals[name] = None
                continue
            try:
                rows[tokens].rivals[name] = measure(rival, given)[0]
            except Exception as error:
                print(f"{name}, {tokens} tokens: {error!r}"[:300])
                rows[tokens].rivals[name] = None
        del rival
        gc.collect()
        torch.cuda.empty_cache()
    return list(rows.values())


def report(row: Row) -> str:
    timed = {k: v for k, v in row.rivals.items() if isinstance(v, float)}
    text = f"{row.case:22} {row.tokens:6} floor {row.floor_us:7.1f}"
    if isinstance(row.ours_us, float):
        text += f"  ours {row.ours_us:7.1f} ({row.ours_us / row.floor_us:.2f}x floor)"
        if timed:
            best = min(timed, key=timed.__getitem__)
            ratio = timed[best] / row.ours_us
            text += f"  best rival {timed[best]:7.1f} {best} ({ratio:.2f}x ours)"
    else:
        text += f"  ours {row.ours_us}"
    return text


def plot(rows: list[Row], path: Path) -> None:
    """Time over floor against tokens, a panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r.case for r in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        own = [r for r in rows if r.case == name]
        lines = {"moe_backend": {r.tokens: r.ours_us for r in own}}
        for r in own:
            for rival, value in r.rivals.items():
                lines.setdefault(rival, {})[r.tokens] = value
        floors = {r.tokens: r.floor_us for r in own}
        for label, line in lines.items():
            points = [(t, v / floors[t]) for t, v in line.items() if isinstance(v, float)]
            if points:
                style = {"linewidth": 2.5, "color": "black"} if label == "moe_backend" else {}
                axis.plot(*zip(*points, strict=True), marker="o", label=label, **style)
        axis.axhline(1, color="grey", linewidth=0.7)
        axis.set(xscale="log", yscale="log", title=name, xlabel="tokens", ylabel="time / floor")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def versions() -> dict[str, str]:
    found = {"moe-backend": __version__, "torch": torch.__version__, "triton": triton.__version__}
    try:
        import vllm

        found["vllm"] = vllm.__version__
    except ImportError:
        pass
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return {**found, "driver": driver[0] if driver else "unknown"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: all")
    parser.add_argument("--routing", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--tokens", type=int, action="append", help="default: the shape's own")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows: list[Row] = []
    common = {
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    with rivals.vllm_context():
        for name in args.shape or SHAPES:
            shape = SHAPES[name]
            if args.tokens:
                shape = replace(shape, tokens=tuple(args.tokens))
            for row in run(shape, args.routing):
                rows.append(row)
                print(report(row), flush=True)
            if args.json:  # after every shape, so that an interrupted run leaves what it has
                data = [{**vars(r), **common} for r in rows]
                args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
