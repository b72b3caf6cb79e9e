"""Problems made on the GPU: one layer's weights, and inputs for any number of tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_backend.kernels.reference import fused_experts
from moe_backend.verify.metrics import Difference, difference
from moe_backend.verify.problems import Case, Problem, build, encode
from moe_backend.verify.run import expected, passes

TOKENS = (1, 2, 3, 5, 7, 8, 16, 31, 64, 76, 88, 127, 129, 304, 336, 1000, 4096, 8209)


def small(case: Case) -> Problem:
    """A case of `verify`, whose inputs `routed` replaces. With `ep`, half the experts are here."""
    return build(replace(case, tokens=1)).to("cuda")


def large(case: Case) -> Problem:
    """The same with random weights made on the GPU, where those of a real layer take no time."""
    template = build(replace(case, hidden_size=128, intermediate_size=128, tokens=1)).to("cuda")
    e, h, i = template.layer.num_local_experts, case.hidden_size, case.intermediate_size
    g = torch.Generator("cuda").manual_seed(0)
    w13 = torch.randn(e, 2 * i, h, device="cuda", generator=g) / h**0.5 * 3
    w2 = torch.randn(e, h, i, device="cuda", generator=g) / i**0.5
    with torch.device("cuda"):
        weights = encode(case.format, w13, w2, case.w13_block, case.w2_block)
    layer = replace(template.layer, hidden_size=h, intermediate_size=i)
    return replace(template, case=case, layer=layer, weights=weights)


def routed(problem: Problem, tokens: int, seed: int = 0) -> Problem:
    """The problem with this many tokens; `wrong` finds the answer."""
    layer, case = problem.layer, problem.case
    g = torch.Generator("cuda").manual_seed(seed * 100_000 + tokens)
    scores = torch.rand(tokens, layer.num_experts, device="cuda", generator=g)
    ids = scores.argsort(1)[:, : layer.top_k].int()
    if case.layout in ("dropped", "ep") and ids.numel() > 2:
        ids.view(-1)[:: max(3, ids.numel() // 5)] = -1
    weights = torch.rand(tokens, layer.top_k, device="cuda", generator=g) + 0.1
    weights = weights / weights.sum(1, keepdim=True) * 3.0
    x = torch.randn(tokens, layer.hidden_size, device="cuda", generator=g).bfloat16()
    case = replace(case, tokens=tokens)
    nothing = torch.empty(0, device="cuda")
    return replace(problem, case=case, x=x, topk_weights=weights, topk_ids=ids, reference=nothing)


def answer(p: Problem) -> torch.Tensor:
    """Plain torch in fp32 on the GPU; `verify` holds it against float64."""
    return fused_experts(
        p.x.float(), p.weights, p.topk_weights, p.topk_ids, p.case.activation, p.expert_map
    )


def but_for_one_token(out: torch.Tensor, wanted: torch.Tensor) -> Difference:
    """Without the worst: a single hidden column that rounds to the next FP8 value may outweigh all
    of a token's others, and with activations that do not clamp those of a hundred tokens."""
    worst = (out.double() - wanted.double()).square().sum(1).argmax()
    others = torch.arange(len(out), device=out.device) != worst
    return difference(out[others], wanted[others])


def run(fused, p: Problem) -> torch.Tensor:
    return fused(p.x, p.topk_weights, p.topk_ids, p.expert_map)


def wrong(fused, p: Problem, out: torch.Tensor | None = None) -> str | None:
    """What is wrong with the output on a problem, with activations quantised as it says, if so."""
    groups = fused.selection.kernel.activation_groups(fused.layer, p.case.tokens)
    if groups is None:
        p = replace(p, reference=answer(p))
    found = difference(run(fused, p) if out is None else out, expected(p, groups))
    if passes(found, p.case, quantised=groups is not None):
        return None
    return f"{p.case.name}: {found}"
