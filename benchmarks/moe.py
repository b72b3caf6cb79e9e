"""The Triton kernels on one GPU against the memory and matrix floors, in CUDA-graph replay.

    python benchmarks/moe.py [--json FILE]

Floor: the larger of the bytes of the experts that were hit over 4.3 TB/s (the copy rate measured on
an H200) and the operations over the matrix rate measured there (1583 TFLOP/s FP8, 790 bf16).
Every output is checked against the plain-torch kernel in the same run; a wrong one is not timed.
Other backends are not timed here yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from moe_backend import __version__
from moe_backend.activation import Activation
from moe_backend.formats import Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import Block, cdiv
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.registry import LayerConfig
from moe_backend.verify.metrics import difference

BYTES_PER_SECOND = 4.3e12
OPERATIONS_PER_SECOND = {"fp8_block": 1583e12, "nvfp4": 790e12}
BYTES_PER_WEIGHT = {"fp8_block": 1.0, "nvfp4": 0.5625}


@dataclass(frozen=True)
class Shape:
    """A layer on one rank."""

    name: str
    format: str
    experts: int
    local: int
    top_k: int
    hidden: int
    intermediate: int
    blocks: tuple[Block, Block] | None
    tokens: tuple[int, ...]


GRID = ((128, 128), (128, 128))
REFINED = ((32, 128), (128, 32))
SHAPES = (
    Shape("step-3.5 EP8", "fp8_block", 288, 36, 8, 4096, 1280, GRID, (1, 8, 64, 1024, 4096)),
    Shape("step-3.5 TP8 even", "fp8_block", 288, 288, 8, 4096, 160, REFINED, (1, 8, 64, 1024)),
    Shape("deepseek-v4-flash EP8", "nvfp4", 256, 32, 6, 4096, 2048, None, (1, 8, 64, 1024)),
)


def random_weights(s: Shape) -> Weights:
    e, h, i = s.local, s.hidden, s.intermediate
    if s.blocks is None:

        def codes(*shape: int) -> torch.Tensor:
            return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)

        def scales(*shape: int) -> torch.Tensor:
            return (torch.rand(shape, device="cuda") * 100 + 20).to(torch.float8_e4m3fn)

        factors = torch.full((e, 2), 1e-4, device="cuda")
        w13, s13 = codes(e, 2 * i, h // 2), scales(e, 2 * i, h // 16)
        w2, s2 = codes(e, h, i // 2), scales(e, h, i // 16)
        return Nvfp4Weights(w13, s13, factors, w2, s2, factors[:, :1].clone())
    (n13, k13), (n2, k2) = s.blocks

    def fp8(rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(e, rows, columns, device="cuda", dtype=torch.float8_e4m3fn)
        for expert in out:
            expert.copy_(torch.randn(rows, columns, device="cuda") * 64)
        return out

    s13 = torch.rand(e, 2 * cdiv(i, n13), cdiv(h, k13), device="cuda") * 1e-4 + 1e-4
    s2 = torch.rand(e, cdiv(h, n2), cdiv(i, k2), device="cuda") * 1e-4 + 1e-4
    return Fp8BlockWeights(fp8(2 * i, h), s13, fp8(h, i), s2, *s.blocks)


def measure(s: Shape, fused: FusedMoE, reference: FusedMoE, tokens: int) -> dict[str, object]:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, s.hidden, device="cuda", dtype=torch.bfloat16)
    weights, ids = torch.rand(tokens, s.experts, device="cuda").topk(s.top_k)
    given = [x, weights / weights.sum(1, keepdim=True), ids.int(), None]
    if s.local != s.experts:
        table = torch.full((s.experts,), -1, device="cuda", dtype=torch.int32)
        table[: s.local] = torch.arange(s.local, device="cuda", dtype=torch.int32)
        given[3] = table
    found = difference(fused(*given), reference(*given))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused(*given)
    microseconds = do_bench(graph.replay, warmup=20, rep=60, return_mode="median") * 1e3
    hit = ids[ids < s.local]
    weight = 3 * s.intermediate * s.hidden
    moved = hit.unique().numel() * weight * BYTES_PER_WEIGHT[s.format] + tokens * s.hidden * 4
    operations = 2 * hit.numel() * weight
    floor = max(moved / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND[s.format]) * 1e6
    return {
        "case": s.name,
        "tokens": tokens,
        "floor_us": round(floor, 1),
        "ours_us": round(microseconds, 1) if found.within(2e-2) else "wrong",
        "rivals": {},
        "rel_l2": found.rel_l2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    for s in SHAPES:
        canonical = random_weights(s)
        layer = LayerConfig(
            format=s.format,
            num_experts=s.experts,
            num_local_experts=s.local,
            top_k=s.top_k,
            hidden_size=s.hidden,
            intermediate_size=s.intermediate,
            activation=Activation.from_name("swiglustep"),
            dtype="bfloat16",
            device="cuda",
            expert_parallel=s.local != s.experts,
            **(dict(zip(("w13_block", "w2_block"), s.blocks, strict=True)) if s.blocks else {}),
        )
        layers = [FusedMoE(layer, canonical, kernel=name) for name in ("triton", "reference")]
        for tokens in s.tokens:
            row = {
                **measure(s, *layers, tokens),
                "device": torch.cuda.get_device_name(),
                "versions": {
                    "moe-backend": __version__,
                    "torch": torch.__version__,
                    "triton": triton.__version__,
                },
                "date": datetime.date.today().isoformat(),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
