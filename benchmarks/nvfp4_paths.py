"""NVFP4 packed, folded into FP8 and unpacked: time and accuracy by tokens per expert, in one run.

    python benchmarks/nvfp4_paths.py [--device cpu|cuda] [--json FILE] [--plot FILE.png]

Weights are heavy-tailed, quantised to NVFP4; accuracy is the signal to noise of each path's output
against the layer in the unquantised weights, in fp32. On a GPU calls are replayed from a CUDA
graph. Where the lines of packed and folded cross is what `CROSSOVER_TOKENS_PER_EXPERT` should be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_backend import __version__
from moe_backend.activation import Activation
from moe_backend.formats import Bf16Weights, Nvfp4Weights, nvfp4
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.reference import fused_experts
from moe_backend.kernels.registry import LayerConfig
from moe_backend.nvfp4_paths import Nvfp4Path, PathChoice, prepare
from moe_backend.verify.metrics import difference

# Experts on this rank, top-k, hidden, intermediate: Step-3.5 on one of eight ranks, and one that a
# CPU gets through.
SHAPES = {"cuda": (36, 8, 4096, 1280), "cpu": (16, 4, 2048, 768)}
TOKENS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def student(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Student's t with four degrees of freedom: heavy-tailed, as trained weights are."""
    device = generator.device
    chi = torch.zeros(shape, device=device)
    for _ in range(4):
        chi += torch.randn(shape, generator=generator, device=device).square() / 4
    return torch.randn(shape, generator=generator, device=device) / chi.sqrt()


def quantised(
    experts: int, hidden: int, intermediate: int, device: str
) -> tuple[Bf16Weights, Nvfp4Weights]:
    """Weights, and the same in NVFP4; one expert at a time."""
    g = torch.Generator(device).manual_seed(0)
    master: list[list[torch.Tensor]] = [[], []]
    packed: list[list[torch.Tensor]] = [[], [], [], [], [], []]
    for _ in range(experts):
        halves = student(g, 2, intermediate, hidden) / hidden**0.5
        down = student(g, hidden, intermediate) / intermediate**0.5
        g13 = nvfp4.global_scale_of(halves.abs().amax((1, 2)))
        g2 = nvfp4.global_scale_of(down.abs().amax()).reshape(1)
        c13, s13 = nvfp4.quantize(halves, g13[:, None, None])
        c2, s2 = nvfp4.quantize(down, g2)
        master[0].append(halves.flatten(0, 1).bfloat16())
        master[1].append(down.bfloat16())
        parts = (c13.flatten(0, 1), s13.flatten(0, 1), g13, c2, s2, g2)
        for held, part in zip(packed, parts, strict=True):
            held.append(part)
    weights = Nvfp4Weights(*(torch.stack(part) for part in packed))
    return Bf16Weights(*(torch.stack(part) for part in master)), weights


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median of repeated calls; on a GPU of graph replays."""
    if device == "cuda":
        from triton.testing import do_bench

        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return float(do_bench(graph.replay, warmup=20, rep=60, return_mode="median"))
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(device: str, kernel: str | None) -> list[dict[str, Any]]:
    experts, top_k, hidden, intermediate = SHAPES[device]
    master, weights = quantised(experts, hidden, intermediate, device)
    layer = LayerConfig(
        format="nvfp4",
        num_experts=experts,
        num_local_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=Activation.from_name("swiglustep"),
        dtype="bfloat16",
        device=device,
    )
    paths = {}
    for path in Nvfp4Path:
        ready = prepare(layer, weights, PathChoice(path, "benchmark"))
        fused = FusedMoE(replace(ready.layer, device=device), ready.weights, kernel=kernel)
        paths[path] = fused
        print(f"{path}: kernel {fused.selection.kernel.name}; {ready.cost or 'exact or rounded'}")
    rows = []
    for per_expert in TOKENS_PER_EXPERT:
        tokens = per_expert * experts // top_k
        g = torch.Generator(device).manual_seed(tokens)
        x = torch.randn(tokens, hidden, generator=g, device=device)
        channel = torch.exp2(torch.randn(hidden, generator=g, device=device)).clamp(max=32)
        x = x * channel
        x = (x / x.square().mean(1, keepdim=True).sqrt()).bfloat16()
        scores = torch.rand(tokens, experts, generator=g, device=device)
        topk_weights, ids = scores.topk(top_k)
        given = (x, topk_weights / topk_weights.sum(1, keepdim=True), ids.int())
        answer = fused_experts(x.float(), master, *given[1:], layer.activation)
        row: dict[str, Any] = {"tokens_per_expert": per_expert, "tokens": tokens}
        for path, fused in paths.items():
            found = difference(fused(*given), answer)
            row[f"{path}_db"] = round(-20 * torch.tensor(found.rel_l2).log10().item(), 2)
            row[f"{path}_ms"] = round(milliseconds(partial(fused, *given), device), 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def plot(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for path in Nvfp4Path:
        times = [row[f"{path}_ms"] for row in rows]
        axes.plot([row["tokens_per_expert"] for row in rows], times, marker="o", label=str(path))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens per expert")
    axes.set_ylabel("ms per layer")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kernel", help="use this kernel for every path")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = measure(args.device, args.kernel)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "one CPU thread"
    if args.json:
        report = {
            "device": name,
            "shape": SHAPES[args.device],
            "versions": {"moe-backend": __version__, "torch": torch.__version__},
            "date": datetime.date.today().isoformat(),
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        experts, _, hidden, intermediate = SHAPES[args.device]
        plot(rows, args.plot, f"{name}: {experts} experts, {hidden}x{intermediate}")


if __name__ == "__main__":
    main()
