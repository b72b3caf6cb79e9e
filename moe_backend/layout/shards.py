"""Tensor-parallel shards: which rows of the intermediate dimension a rank stores, and their scales.

Rank r owns a run of rows of gate and of up, and the same columns of w2. The sum of the ranks'
outputs is the unsharded layer's output, because the activation works element by element.

Two layouts. `even`: every rank owns I / tp rows, whatever the grid of scale blocks; where a shard
begins inside a block, scales are refined (repeated) to the coarsest grid that is exact for every
rank. `whole_block`: the first ranks own whole blocks and the rest is padding (codes 0, scale 1),
as vLLM 0.31 and later lay out for kernels that insist. Weights are never quantised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import gcd
from typing import Literal

import torch

from moe_backend.formats import FORMATS, Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import Block, by, cdiv
from moe_backend.formats.nvfp4 import GROUP

Part = tuple[int, int]
Projection = Literal["gate", "up", "down"]
Kind = Literal["weight", "scale", "global_scale", "input_scale"]


@dataclass(frozen=True)
class TpPlan:
    """How one layer's experts are split over the ranks of a tensor-parallel group.

    Attributes:
        layout: `even` or `whole_block`.
        format: name of the weight format.
        hidden_size: not split. intermediate_size: of the model, split.
        rows: intermediate rows that every rank stores, padding included.
        parts: for each rank the rows `[start, end)` of the checkpoint that it owns; they come
            first, padding fills up to `rows`.
        checkpoint_block: `(n, k)` of the checkpoint's FP8 scales; None in other formats.
        w13_block, w2_block: `(n, k)` of a shard's FP8 scales, counted from the shard's own first
            row or column; None in other formats.
    """

    layout: Literal["even", "whole_block"]
    format: str
    hidden_size: int
    intermediate_size: int
    rows: int
    parts: tuple[Part, ...]
    checkpoint_block: Block | None = None
    w13_block: Block | None = None
    w2_block: Block | None = None

    @property
    def tp(self) -> int:
        return len(self.parts)

    @property
    def padding(self) -> float:
        """The fraction of the stored rows, over all ranks, that is padding."""
        return 1 - self.intermediate_size / (self.rows * self.tp)

    def check(self) -> None:
        """Every row has one owner and every scale of a shard stands for one checkpoint block.

        Raises:
            ValueError: naming the row, or the rank and its block.
        """
        next_row = 0
        for rank, (start, end) in enumerate(self.parts):
            if start != next_row or not start <= end <= start + self.rows:
                raise ValueError(
                    f"rank {rank} of {self.tp} owns rows {start} to {end} and stores {self.rows}; "
                    f"its rows must start at {next_row} and fit"
                )
            next_row = end
        if next_row != self.intermediate_size:
            raise ValueError(f"rows {next_row} to {self.intermediate_size} are owned by no rank")
        if self.format == Nvfp4Weights.name:
            for size in (self.rows, *(bound for part in self.parts for bound in part)):
                if size % GROUP:
                    raise ValueError(
                        f"NVFP4 shards must start and end at multiples of {GROUP} rows, {size} is "
                        f"none (intermediate size {self.intermediate_size} over {self.tp} ranks). "
                        "Use a smaller tensor-parallel size or expert parallelism."
                    )
        if self.checkpoint_block is None or self.w13_block is None or self.w2_block is None:
            return
        (n, k) = self.checkpoint_block
        for label, block, refined in (
            ("w13 rows", n, self.w13_block[0]),
            ("w2 columns", k, self.w2_block[1]),
        ):
            for rank, (start, end) in enumerate(self.parts):
                for first in range(start, end, refined):
                    last = min(first + refined, end) - 1
                    if first // block != last // block:
                        raise ValueError(
                            f"{label}: one scale of rank {rank} would cover {first} to {last}, "
                            f"which lie in two blocks of {block}; {refined} is too coarse"
                        )
        for label, block, refined in (
            ("w13 columns", k, self.w13_block[1]),
            ("w2 rows", n, self.w2_block[0]),
        ):
            if block % refined:
                raise ValueError(f"{label}: blocks of {refined} do not divide blocks of {block}")

    def describe(self) -> str:
        """One clause for the log."""
        if self.tp == 1 and not self.padding:
            return "not split"
        blocks = ""
        if self.checkpoint_block is not None:
            kept = self.checkpoint_block == self.w13_block == self.w2_block
            shapes = dict.fromkeys(by(b) for b in (self.w13_block, self.w2_block) if b is not None)
            blocks = f", scale blocks {by(self.checkpoint_block)}" + (
                " kept" if kept else f" refined losslessly to {' and '.join(shapes)}"
            )
        if self.layout == "even":
            return f"tp {self.tp}, even split, {self.rows} rows a rank{blocks}"
        owned = ", ".join(str(end - start) for start, end in self.parts)
        return (
            f"tp {self.tp}, whole blocks as the kernel insists, {self.rows} rows a rank of which "
            f"{owned} are used ({self.padding:.1%} padding){blocks}"
        )


def plan_tp(
    format_name: str,
    hidden_size: int,
    intermediate_size: int,
    tp: int,
    block_shape: Block | None = None,
    *,
    whole_blocks_of: int | None = None,
) -> TpPlan:
    """The even split; whole blocks where a kernel insists on them and the even split has none.

    Args:
        block_shape: of the checkpoint's FP8 scales.
        whole_blocks_of: rows of which a kernel needs a multiple (128 for aiter's CK kernels); None
            for a kernel that takes any.

    Raises:
        ValueError: the sizes do not split this way; the message says what would.
    """
    if format_name not in FORMATS:
        raise ValueError(f"format {format_name!r} is unknown; accepted: {', '.join(FORMATS)}")
    if (block_shape is None) != (format_name != Fp8BlockWeights.name):
        raise ValueError(
            f"format {format_name} with block shape {block_shape}: fp8_block needs one"
        )
    if tp < 1:
        raise ValueError(f"tensor-parallel size {tp} found, at least 1 expected")
    share = cdiv(intermediate_size, tp)
    even = intermediate_size % tp == 0
    if whole_blocks_of is None or (even and share % whole_blocks_of == 0):
        if not even:
            raise ValueError(
                f"intermediate size {intermediate_size} does not split evenly over {tp} ranks. "
                "Use a tensor-parallel size that divides it, or expert parallelism."
            )
        layout: Literal["even", "whole_block"] = "even"
        rows = share
    else:
        layout = "whole_block"
        rows = cdiv(share, whole_blocks_of) * whole_blocks_of
    bounds = [min(r * rows, intermediate_size) for r in range(tp + 1)]
    parts = tuple((bounds[r], bounds[r + 1]) for r in range(tp))
    plan = TpPlan(layout, format_name, hidden_size, intermediate_size, rows, parts)
    if block_shape is not None:
        (n, k) = block_shape
        plan = replace(
            plan,
            checkpoint_block=block_shape,
            w13_block=(lossless_block(n, parts), k),
            w2_block=(n, lossless_block(k, parts)),
        )
    plan.check()
    return plan


def lossless_block(block: int, parts: Sequence[Part]) -> int:
    """The largest divisor of `block` whose grid, laid from each part's start, is exact.

    A part that crosses a border of the checkpoint's grid needs that border on its own grid: the
    distance from its start to the border, and with it `start % block`, must be a multiple of the
    refined block. A part inside one block needs nothing: it has one scale anyway.
    """
    refined = block
    for start, end in parts:
        if start < end and start // block != (end - 1) // block:
            refined = gcd(refined, start)
    return refined


def even_shard(weights: Weights, tp: int, rank: int) -> Weights:
    """Rank `rank`'s rows `[rank * I / tp, (rank + 1) * I / tp)`."""
    return shard(weights, _plan_of(weights, tp, None), rank)


def whole_block_shard(weights: Weights, tp: int, rank: int, block: int = 128) -> Weights:
    """Rank `rank`'s whole blocks of rows, padded to as many as the first rank has."""
    return shard(weights, _plan_of(weights, tp, block), rank)


def shard(weights: Weights, plan: TpPlan, rank: int) -> Weights:
    """The canonical weights of one rank's shard; tensors that are not split are shared."""

    def w13(tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
        halves = tensor.unflatten(1, (2, -1))  # gate and up rows are split alike
        return shard_of(halves, "gate", kind, plan, rank).flatten(1, 2)

    def w2(tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
        return shard_of(tensor, "down", kind, plan, rank)

    if weights.name != plan.format:
        raise ValueError(f"{weights.name} weights found, the plan is for {plan.format}")
    codes = {"w13": w13(weights.w13, "weight"), "w2": w2(weights.w2, "weight")}
    if isinstance(weights, Bf16Weights):
        return replace(weights, **codes)
    scales = {
        "w13_scale": w13(weights.w13_scale, "scale"),
        "w2_scale": w2(weights.w2_scale, "scale"),
    }
    if isinstance(weights, Nvfp4Weights):
        return replace(weights, **codes, **scales)
    assert plan.w13_block is not None
    assert plan.w2_block is not None
    return replace(weights, **codes, **scales, w13_block=plan.w13_block, w2_block=plan.w2_block)


def shard_of(
    tensor: torch.Tensor, projection: Projection, kind: Kind, plan: TpPlan, rank: int
) -> torch.Tensor:
    """One rank's shard of one checkpoint tensor, for loaders that see a tensor at a time.

    Args:
        tensor: `[..., rows, columns]` of one projection, unsplit, as in the canonical form;
            leading dimensions (experts, gate and up) are kept.
        kind: `scale` is a block scale; global and input scales belong to the whole projection
            and come back as they are.
    Returns:
        A contiguous tensor, which may share the given one's memory.

    Raises:
        ValueError: the tensor has not the size that the plan's model has.
    """
    if kind in ("global_scale", "input_scale"):
        return tensor
    if not 0 <= rank < plan.tp:
        raise ValueError(f"rank {rank} found, 0 to {plan.tp - 1} expected")
    found, expected = tuple(tensor.shape[-2:]), _checkpoint_shape(projection, kind, plan)
    if found != expected:
        raise ValueError(f"{projection} {kind}: shape {found} found, {expected} expected")
    axis = -1 if projection == "down" else -2
    fill = 1 if kind == "scale" else 0
    start, end = plan.parts[rank]
    if kind == "scale" and plan.checkpoint_block is not None:
        refined = plan.w2_block if projection == "down" else plan.w13_block
        assert refined is not None
        own, hidden = tensor, (0, plan.hidden_size)
        for dim in (-2, -1):
            run = (start, end) if dim == axis else hidden
            own = _spread(own, dim, plan.checkpoint_block[dim], refined[dim], run)
        return _padded(own, axis, cdiv(plan.rows, refined[axis]), fill)
    unit = _entry(projection, kind, plan.format)[axis]
    own = tensor.narrow(axis, start // unit, (end - start) // unit)
    return _padded(own, axis, plan.rows // unit, fill)


def merge_scale(
    scale: torch.Tensor, axis: int, refined: int, block: int, where: str = "scale"
) -> torch.Tensor:
    """Block scales refined along an axis that is not split, back to one for each `block`.

    Args:
        scale: `[..., rows, columns]`, one entry per `refined` along `axis`, which divides `block`.
        where: the tensor's name, for the message.
    Raises:
        ValueError: entries of one block differ, so that no single one can stand for them.
    """
    size, repeats = scale.shape[axis], block // refined
    merged = scale.index_select(axis, torch.arange(0, size, repeats, device=scale.device))
    spread = merged.repeat_interleave(repeats, axis).narrow(axis, 0, size)
    if not torch.equal(spread.nan_to_num(), scale.nan_to_num()):  # NaN is found by `validate`
        raise ValueError(
            f"{where}: scales were repeated from blocks of {block} to {refined}, but some of one "
            "block differ. Load the checkpoint itself, not weights saved from a running "
            "server (--load-format sharded_state and the like), or use expert parallelism."
        )
    return merged


def take_experts(weights: Weights, experts: Sequence[int]) -> Weights:
    """The weights of some experts, in this order; experts may repeat."""
    index = torch.tensor(experts, dtype=torch.int64, device=weights.w13.device)
    taken = {
        f.name: value.index_select(0, index)
        for f in fields(weights)
        if isinstance(value := getattr(weights, f.name), torch.Tensor)
        and not f.name.endswith("input_scale")  # one for all experts
    }
    return replace(weights, **taken)  # type: ignore[arg-type]


def _plan_of(weights: Weights, tp: int, whole_blocks_of: int | None) -> TpPlan:
    block = None
    if isinstance(weights, Fp8BlockWeights):
        block = weights.w13_block
        if block != weights.w2_block:
            raise ValueError(
                f"scale blocks of {by(block)} and {by(weights.w2_block)} found: these weights are "
                "a shard already; split the whole ones"
            )
    return plan_tp(
        weights.name,
        weights.hidden_size,
        weights.intermediate_size,
        tp,
        block,
        whole_blocks_of=whole_blocks_of,
    )


def _entry(projection: Projection, kind: Kind, format_name: str) -> tuple[int, int]:
    """Rows and columns that one entry of a tensor stands for; FP8 scales excepted."""
    if format_name == Nvfp4Weights.name:
        return (1, 2) if kind == "weight" else (1, GROUP)
    if kind == "weight":
        return (1, 1)
    raise ValueError(f"{format_name} has no {projection} {kind}")


def _checkpoint_shape(projection: Projection, kind: Kind, plan: TpPlan) -> tuple[int, int]:
    h, i = plan.hidden_size, plan.intermediate_size
    rows, columns = (h, i) if projection == "down" else (i, h)
    if kind == "scale" and plan.checkpoint_block is not None:
        n, k = plan.checkpoint_block
    else:
        n, k = _entry(projection, kind, plan.format)
    return cdiv(rows, n), cdiv(columns, k)


def _spread(scale: torch.Tensor, axis: int, block: int, refined: int, part: Part) -> torch.Tensor:
    """Entries of `scale`, one per `block`, repeated to one per `refined` from `part`'s start."""
    start, end = part
    sources = [first // block for first in range(start, end, refined)]
    if sources == list(range(scale.shape[axis])):
        return scale
    return scale.index_select(axis, torch.tensor(sources, dtype=torch.int64, device=scale.device))


def _padded(tensor: torch.Tensor, axis: int, size: int, fill: int) -> torch.Tensor:
    own = tensor.shape[axis]
    if own == size:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[axis] = size
    out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device).fill_(fill)
    out.narrow(axis, 0, own).copy_(tensor)
    return out
