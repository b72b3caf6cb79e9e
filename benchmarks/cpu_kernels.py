"""The CPU kernels side by side, one run, bf16 silu: prints the table of docs/kernels.md.

OMP_NUM_THREADS=1 python benchmarks/cpu_kernels.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from vllm.platforms import current_platform

from moe_backend.activation import Activation
from moe_backend.formats import Bf16Weights
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.registry import LayerConfig
from moe_backend.verify.metrics import difference

SHAPES = ((8, 2, 128, 384), (64, 8, 1024, 512), (32, 4, 2048, 768))  # experts, top-k, H, I
TOKENS = (1, 8, 64, 512)
KERNELS = ("reference", "vllm_cpu")


def milliseconds(call: Callable[[], object], runs: int = 9) -> float:
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    current_platform.import_kernels()  # vLLM's compiled ops
    torch.set_num_threads(1)
    print("| layer | tokens | reference, ms | vllm_cpu, ms | ratio |\n|---|---|---|---|---|")
    for experts, top_k, hidden, intermediate in SHAPES:
        weights = Bf16Weights(
            (torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5).bfloat16(),
            (torch.randn(experts, hidden, intermediate) / intermediate**0.5).bfloat16(),
        )
        layer = LayerConfig(
            format="bf16",
            num_experts=experts,
            num_local_experts=experts,
            top_k=top_k,
            hidden_size=hidden,
            intermediate_size=intermediate,
            activation=Activation.from_name("silu"),
            dtype="bfloat16",
            device="cpu",
        )
        layers = [FusedMoE(layer, weights, kernel=name) for name in KERNELS]
        for tokens in TOKENS:
            x = torch.randn(tokens, hidden).bfloat16()
            topk_weights, ids = torch.rand(tokens, experts).topk(top_k)
            outputs = [run(x, topk_weights, ids.int()) for run in layers]
            assert difference(outputs[1], outputs[0]).within(2e-2)
            a, b = (milliseconds(partial(run, x, topk_weights, ids.int())) for run in layers)
            name = f"{experts} experts top-{top_k}, {hidden}x{intermediate}"
            print(f"| {name} | {tokens} | {a:.3f} | {b:.3f} | {a / b:.2f} |")


if __name__ == "__main__":
    main()
