"""What a layer is called with, and what it should answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend.bench.shapes import Shape
from moe_backend.formats import Weights
from moe_backend.kernels.reference import fused_experts

ROUTINGS = ("uniform", "zipf")
CHECKED_TOKENS = 64
DRAWS = 64  # of which `typical` takes one


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the answer for a sample of its tokens.

    Attributes:
        x: `[T, H]` bf16. topk_weights, topk_ids: `[T, top_k]`, float32 and int32 global ids.
        expert_map: `[experts]` int32 local slot or -1; None where this rank has all.
        sample: `[min(T, 64)]` token indices; expected: `[len(sample), H]` float32.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    sample: torch.Tensor
    expected: torch.Tensor

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.x, self.topk_weights, self.topk_ids, self.expert_map


def route(
    shape: Shape, tokens: int, routing: str, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing weights and distinct experts per token.

    `uniform`: all experts equally likely. `zipf`: the expert of rank r in a random order has weight
    1/r. At least one slot goes to an expert of this rank, or there would be nothing to measure.
    `typical`: uniform, and of many draws the one that hits this rank's experts the most nearly as
    often as is to be expected; with few tokens a single draw may bring it three times as much.
    """
    draws = DRAWS if routing == "typical" and shape.local < shape.experts else 1
    while True:
        drawn = [_draw(shape, tokens, routing, device) for _ in range(draws)]
        ids = min(drawn, key=lambda ids: _off(shape, ids)) if draws > 1 else drawn[0]
        if (ids < shape.local).any():
            break
    weights = torch.rand(tokens, shape.top_k, device=device) + 0.1
    return weights / weights.sum(1, keepdim=True), ids


def _draw(shape: Shape, tokens: int, routing: str, device: str) -> torch.Tensor:
    score = -torch.log(torch.rand(tokens, shape.experts, device=device))
    if routing == "zipf":
        rank = torch.randperm(shape.experts, device=device) + 1
        score = score * rank  # the k smallest of exponentials with rates 1/rank
    return score.topk(shape.top_k, dim=1, largest=False).indices.int()


def _off(shape: Shape, ids: torch.Tensor) -> float:
    """How far from what is to be expected this rank's slots and experts are."""
    tokens = len(ids)
    slots = tokens * shape.top_k * shape.local / shape.experts
    experts = shape.local * (1 - (1 - shape.top_k / shape.experts) ** tokens)
    own = ids[ids < shape.local]
    return abs(len(own) / slots - 1) + abs(len(own.unique()) / experts - 1)


def make_inputs(
    shape: Shape, weights: Weights, tokens: int, routing: str, device: str = "cuda"
) -> Inputs:
    """The same for shapes that differ in the intermediate size alone; this rank is the first."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16)
    topk_weights, ids = route(shape, tokens, routing, device)
    expert_map = None
    if shape.local != shape.experts:
        expert_map = torch.full((shape.experts,), -1, device=device, dtype=torch.int32)
        expert_map[: shape.local] = torch.arange(shape.local, device=device, dtype=torch.int32)
    sample = torch.randperm(tokens, device=device)[:CHECKED_TOKENS]
    expected = fused_experts(
        x[sample].float(), weights, topk_weights[sample], ids[sample],
        shape.layer().activation, expert_map,
    )  # fmt: skip
    return Inputs(x, topk_weights, ids, expert_map, sample, expected)
