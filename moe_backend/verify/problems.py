"""Cases, and the tensors of each: what a kernel is given and what it must return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from moe_backend.activation import Activation, ActivationKind
from moe_backend.formats import (
    Bf16Weights,
    Fp8BlockWeights,
    Nvfp4Weights,
    Weights,
    fp8_block,
    nvfp4,
)
from moe_backend.formats.fp8_block import Block, by, cdiv
from moe_backend.kernels.registry import LayerConfig
from moe_backend.verify.naive import naive_experts

ACTIVATIONS = (
    Activation.from_name("silu"),
    Activation.from_name("swiglustep"),
    Activation.from_name("silu", limit=10.0),
    Activation.from_name("swigluoai_uninterleave"),
)


@dataclass(frozen=True)
class Case:
    """One case of the matrix; `build` makes its tensors.

    Attributes:
        format: `bf16`, `fp8_block` or `nvfp4`.
        activation: the gated activation.
        layout: `unsharded`, `ep` (an expert_map that leaves half the experts to another rank) or
            `dropped` (some ids are -1).
        tokens: number of tokens.
        integer: integer-valued data whose result every exact kernel returns bit for bit.
    """

    format: str
    activation: Activation
    layout: str = "unsharded"
    tokens: int = 7
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 128
    intermediate_size: int = 192
    w13_block: Block = (128, 128)
    w2_block: Block = (128, 128)
    integer: bool = False

    @property
    def name(self) -> str:
        data = "integer" if self.integer else "random"
        blocks = dict.fromkeys((by(self.w13_block), by(self.w2_block)))
        block = "+".join(blocks) if self.format == "fp8_block" else ""
        return (
            f"{self.format}{block} {self.activation.kind} {self.layout} {data} T{self.tokens} "
            f"E{self.num_experts} top{self.top_k} H{self.hidden_size} I{self.intermediate_size}"
        )


@dataclass(frozen=True)
class Problem:
    """Tensors of a case, built on the CPU; `reference` is float64 `[T, H]`."""

    case: Case
    layer: LayerConfig
    weights: Weights
    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    reference: torch.Tensor

    def to(self, device: str) -> Problem:
        """The same with every tensor, and the layer, on a device."""
        if self.layer.device == device:
            return self

        tensors = {n: v.to(device) for n, v in vars(self.weights).items() if torch.is_tensor(v)}
        return Problem(
            self.case,
            replace(self.layer, device=device),
            replace(self.weights, **tensors),  # type: ignore[arg-type]
            self.x.to(device),
            self.topk_weights.to(device),
            self.topk_ids.to(device),
            None if self.expert_map is None else self.expert_map.to(device),
            self.reference.to(device),
        )


def cases(quick: bool = False) -> Iterator[Case]:
    """Every format with every activation, and around them what breaks kernels."""
    for name in ("bf16", "fp8_block", "nvfp4"):
        for activation in ACTIVATIONS:
            case = Case(name, activation)
            yield case
            if quick:
                continue
            yield replace(case, layout="ep")
            yield replace(case, layout="dropped")
            yield replace(case, tokens=1)
            yield replace(case, tokens=64, top_k=1)
            yield replace(case, tokens=31, top_k=case.num_experts)
            yield replace(case, intermediate_size=160, hidden_size=256)
        for kind in (ActivationKind.SILU, ActivationKind.SWIGLUSTEP):
            # The other two are not exact in integers.
            yield Case(name, Activation.from_name(kind), integer=True, layout="ep")
        yield Case(name, ACTIVATIONS[1], layout="ep", tokens=0)
        # Enough tokens for methods that sort them, and hidden columns that fill their tiles.
        if not quick:
            yield Case(name, ACTIVATIONS[1], layout="ep", tokens=129, intermediate_size=256)
    for block in ((64, 64), (32, 32), (64, 128), (128, 64)):
        yield Case("fp8_block", ACTIVATIONS[1], w13_block=block, w2_block=block)
    for refined in (64, 32):  # shards of Step-3.5 at TP4 and TP8, which are refined on one axis
        yield Case(
            "fp8_block", ACTIVATIONS[1], hidden_size=256, intermediate_size=160,
            w13_block=(refined, 128), w2_block=(128, refined),
        )  # fmt: skip


@lru_cache(maxsize=512)
def build(case: Case, seed: int = 0) -> Problem:
    """Make the tensors of a case, the same for the same seed; they are shared: do not write."""
    g = torch.Generator().manual_seed(seed)
    e, h, i, t = case.num_experts, case.hidden_size, case.intermediate_size, case.tokens
    ids = torch.rand(t, e, generator=g).argsort(dim=1)[:, : case.top_k].int()
    expert_map = None
    local = e
    if case.layout == "ep":
        # The odd experts are here, in reverse, so that a map taken for a mask shows.
        local = e // 2
        expert_map = torch.full((e,), -1, dtype=torch.int32)
        expert_map[1::2] = torch.arange(local, dtype=torch.int32).flip(0)
    if case.layout in ("dropped", "ep") and ids.numel() > 2:
        ids.view(-1)[:: max(3, ids.numel() // 5)] = -1
    if case.integer:
        w13, w2, x, topk_weights = _integers(case, local, g)
    else:
        w13 = torch.randn(local, 2 * i, h, generator=g) / h**0.5 * 3
        # Rows and columns of very different size: a scale read from a neighbour shows.
        w13 *= _steps(local, cdiv(2 * i, 32), 1, g).repeat_interleave(32, 1)[:, : 2 * i]
        w2 = torch.randn(local, h, i, generator=g) / i**0.5
        w2 *= _steps(local, 1, cdiv(i, 32), g).repeat_interleave(32, 2)[..., :i]
        x = torch.randn(t, h, generator=g)
        topk_weights = torch.rand(t, case.top_k, generator=g) + 0.1
        topk_weights = topk_weights / topk_weights.sum(1, keepdim=True) * 3.0
    x = x.bfloat16()
    weights = encode(case.format, w13, w2, case.w13_block, case.w2_block)
    layer = LayerConfig(
        format=case.format,
        num_experts=e,
        num_local_experts=local,
        top_k=case.top_k,
        hidden_size=h,
        intermediate_size=i,
        activation=case.activation,
        dtype="bfloat16",
        device="cpu",
        expert_parallel=expert_map is not None,
        w13_block=case.w13_block if case.format == "fp8_block" else None,
        w2_block=case.w2_block if case.format == "fp8_block" else None,
    )
    reference = naive_experts(x, weights, topk_weights, ids, case.activation, expert_map)
    return Problem(case, layer, weights, x, topk_weights, ids, expert_map, reference)


def _steps(e: int, rows: int, columns: int, g: torch.Generator) -> torch.Tensor:
    """Random powers of two from 1/8 to 8."""
    return torch.exp2(torch.randint(-3, 4, (e, rows, columns), generator=g))


def _integers(
    case: Case, local: int, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data for which every intermediate is an integer (or its half) that bf16 holds.

    The gate is 32, where silu(32) is 32 in fp32 and swiglustep's clamp gives 7; up and down have
    so few entries of -1, 1 or 2 that sums stay within bf16's eight bits.
    """
    e, h, i, t = local, case.hidden_size, case.intermediate_size, case.tokens

    def sparse(values: tuple[float, ...], per_row: float, *shape: int) -> torch.Tensor:
        chosen = torch.tensor(values)[torch.randint(0, len(values), shape, generator=g)]
        return chosen * (torch.rand(shape, generator=g) < per_row / shape[-1])

    x = torch.randint(-1, 2, (t, h), generator=g).float()
    x[:, 0] = 1.0
    gate = torch.zeros(e, i, h)
    gate[:, :, 0] = 32.0
    up = sparse((-1.0, 1.0), 1.0, e, i, h)
    up[:, :, 0] = 0.0
    topk_weights = torch.exp2(-torch.randint(0, 2, (t, case.top_k), generator=g).float())
    return torch.cat((gate, up), 1), sparse((-1.0, 1.0, 2.0), 2.0, e, h, i), x, topk_weights


def encode(
    format_name: str,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_block: Block = (128, 128),
    w2_block: Block | None = None,
) -> Weights:
    """Quantise float `[E, 2I, H]` and `[E, H, I]` into canonical weights of a format.

    Args:
        w13_block, w2_block: of fp8_block; the second is as the first if it is not given.

    NVFP4's gate and up get different global scales. Integer-valued weights get scales that are
    powers of two, with which they decode exactly.
    """
    if format_name == "bf16":
        return Bf16Weights(w13.bfloat16(), w2.bfloat16())
    e, two_i, h = w13.shape
    halves = w13.view(e, 2, two_i // 2, h)
    integral = bool((w13 == w13.round()).all())
    if format_name == "fp8_block":
        w2_block = w2_block or w13_block
        c13, s13 = fp8_block.quantize_blocks(halves, w13_block)
        c2, s2 = fp8_block.quantize_blocks(w2, w2_block)
        if integral:
            s13, s2 = _power_of_two(s13), _power_of_two(s2)
            c13 = (halves / fp8_block.spread_scale(s13, two_i // 2, h, w13_block)).to(c13.dtype)
            c2 = (w2 / fp8_block.spread_scale(s2, h, two_i // 2, w2_block)).to(c2.dtype)
        c13, s13 = c13.view(e, two_i, h), s13.flatten(1, 2)
        return Fp8BlockWeights(c13, s13, c2, s2, w13_block, w2_block)
    g13 = nvfp4.global_scale_of(halves.abs().amax((2, 3))) * torch.tensor([1.0, 5.7])
    g2 = nvfp4.global_scale_of(w2.abs().amax((1, 2)))[:, None]
    if integral:
        # Twice that, so that a block whose largest value takes code 4 (not 6) fits E4M3.
        g13, g2 = 2 * _power_of_two(g13), 2 * _power_of_two(g2)
    p13, s13 = _encode_nvfp4(halves, g13[:, :, None, None], integral)
    p2, s2 = _encode_nvfp4(w2, g2[:, :, None], integral)
    one = torch.ones(1)
    return Nvfp4Weights(p13.flatten(1, 2), s13.flatten(1, 2), g13, p2, s2, g2, one, one)


def _power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The next power of two, at least as large."""
    return torch.exp2(scale.log2().ceil())


def _encode_nvfp4(
    w: torch.Tensor, global_scale: torch.Tensor, integral: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not integral:
        return nvfp4.quantize(w, global_scale)
    # Blocks whose largest value is a power of two: it takes code 4, so that the scale is one too.
    blocks = w.unflatten(-1, (-1, nvfp4.GROUP))
    amax = blocks.abs().amax(-1)
    step = torch.where(amax > 0, amax / 4, global_scale)
    codes = nvfp4.encode_e2m1((blocks / step[..., None]).flatten(-2))
    return nvfp4.pack(codes), (step / global_scale).to(torch.float8_e4m3fn)
