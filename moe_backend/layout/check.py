"""Start-up checks: experts owned, scale slots written, routing conserved.

All of these read values back to the host. They belong at load time and in tests, not in a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch

from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.formats.nvfp4 import GROUP
from moe_backend.layout.ownership import ExpertMap, ExpertPlacement, check_owners
from moe_backend.layout.routing import RoutingPlan, local_ids, plan_routing
from moe_backend.layout.shards import Kind, Projection, TpPlan


def check_start_up(
    placement: ExpertPlacement, rank: int, plan: TpPlan, weights: Weights, where: str = ""
) -> None:
    """All of it for one rank's loaded layer; once per layer, after loading.

    Args:
        placement: of the experts over the expert-parallel ranks, and this rank's number there.
        weights: what was loaded into `empty_weights(plan, ...)`.
        where: the layer's name, a prefix for messages.

    Raises:
        ValueError: naming the layer and the expert, row, scale slot or token that is wrong.
    """
    try:
        placement.check()
        plan.check()
        held = (weights.name, weights.num_experts, weights.hidden_size, weights.intermediate_size)
        meant = (plan.format, len(placement.rank_ids[rank]), plan.hidden_size, plan.rows)
        if held != meant:
            raise ValueError(
                f"(format, experts, hidden size, rows) are {held}, the plan says {meant}"
            )
        # A probe: every expert once, and a dropped slot, on the device that will do it.
        device = weights.w13.device
        ids = torch.arange(-1, placement.num_ids, dtype=torch.int32, device=device)[:, None]
        maps = [placement.expert_map(r).to(device) for r in range(placement.num_ranks)]
        plans = [plan_routing(ids, m.num_local_experts, m) for m in maps]
        check_conserved(plans[rank], ids, maps[rank].num_local_experts, maps[rank])
        check_conserved_over_ranks(plans, ids)
        check_written(weights)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def check_maps(maps: Sequence[ExpertMap]) -> None:
    """The maps that the ranks really hold give each expert to exactly one of them.

    Args:
        maps: rank by rank, gathered.

    Raises:
        ValueError: naming the expert and its ranks.
    """
    tables = [ExpertMap.of(m.tensor).tensor.tolist() for m in maps]
    if len({len(t) for t in tables}) != 1:
        raise ValueError(f"the ranks' expert maps differ in length: {[len(t) for t in tables]}")
    owners = [[r for r, table in enumerate(tables) if table[i] >= 0] for i in range(len(tables[0]))]
    check_owners(owners, len(maps))


def check_conserved(
    plan: RoutingPlan,
    topk_ids: torch.Tensor,
    num_local_experts: int,
    expert_map: ExpertMap | torch.Tensor | None = None,
) -> None:
    """The plan has every slot once, and behind each expert's offsets that expert's slots in order.

    Raises:
        ValueError: naming the expert or the slot.
    """
    ids = local_ids(topk_ids, num_local_experts, expert_map).flatten().tolist()
    slots, ends = plan.slots.tolist(), plan.expert_offsets.tolist()
    if sorted(slots) != list(range(len(ids))):
        raise ValueError(
            f"the routing plan's {len(slots)} slots are not each of the {len(ids)} (tokens x "
            "top_k) slots exactly once"
        )
    if len(ends) != num_local_experts:
        raise ValueError(f"{len(ends)} expert offsets for {num_local_experts} local experts")
    start = 0
    for expert, end in enumerate(ends):
        expected = [s for s, i in enumerate(ids) if i == expert]
        if slots[start:end] != expected:
            raise ValueError(
                f"local expert {expert} is given slots {slots[start:end]}, routed to it are "
                f"{expected}"
            )
        start = end
    kept = sum(i >= 0 for i in ids)
    if start != kept or int(plan.counts.sum()) != kept:
        raise ValueError(f"the routing plan keeps {start} slots, {kept} are routed to this rank")


def check_conserved_over_ranks(plans: Sequence[RoutingPlan], topk_ids: torch.Tensor) -> None:
    """Every slot with an expert is kept by exactly one rank, every other slot by none.

    Args:
        plans: rank by rank, made from the same `topk_ids`.

    Raises:
        ValueError: naming the slot's token, its expert and the ranks.
    """
    keepers: list[list[int]] = [[] for _ in range(topk_ids.numel())]
    for rank, plan in enumerate(plans):
        for slot in plan.slots[: int(plan.counts.sum())].tolist():
            keepers[slot].append(rank)
    for slot, (ranks, expert) in enumerate(zip(keepers, topk_ids.flatten().tolist(), strict=True)):
        if len(ranks) != (expert >= 0):
            raise ValueError(
                f"token {slot // topk_ids.shape[1]}, expert {expert}: computed by "
                f"{len(ranks)} ranks ({ranks})"
            )


def empty_weights(
    plan: TpPlan,
    num_experts: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    input_scales: bool = False,
    device: torch.device | str = "cpu",
) -> Weights:
    """Canonical weights of one rank's shard to be filled, every scale slot poisoned.

    Args:
        num_experts: slots of this rank.
        dtype: of unquantised experts.
        input_scales: whether an NVFP4 checkpoint has them.
        device: `meta` counts bytes without memory.
    """
    e, h, i = num_experts, plan.hidden_size, plan.rows

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if plan.format == Bf16Weights.name:
        return Bf16Weights(empty(dtype, e, 2 * i, h), empty(dtype, e, h, i))
    weights: Weights
    if plan.format == Nvfp4Weights.name:
        weights = Nvfp4Weights(
            empty(torch.uint8, e, 2 * i, h // 2),
            empty(torch.float8_e4m3fn, e, 2 * i, h // GROUP),
            empty(torch.float32, e, 2),
            empty(torch.uint8, e, h, i // 2),
            empty(torch.float8_e4m3fn, e, h, i // GROUP),
            empty(torch.float32, e, 1),
            empty(torch.float32, 1) if input_scales else None,
            empty(torch.float32, 1) if input_scales else None,
        )
    else:
        assert plan.w13_block is not None
        assert plan.w2_block is not None
        (n13, k13), (n2, k2) = plan.w13_block, plan.w2_block
        weights = Fp8BlockWeights(
            empty(torch.float8_e4m3fn, e, 2 * i, h),
            empty(torch.float32, e, 2 * cdiv(i, n13), cdiv(h, k13)),
            empty(torch.float8_e4m3fn, e, h, i),
            empty(torch.float32, e, cdiv(h, n2), cdiv(i, k2)),
            plan.w13_block,
            plan.w2_block,
        )
    poison(weights)
    return weights


def place(
    weights: Weights, slot: int, projection: Projection, kind: Kind, tensor: torch.Tensor
) -> None:
    """Write one projection's shard (from `shard_of`) into expert slot `slot`.

    Input scales are one for all experts: reduce them with MAX and write them yourself.

    Raises:
        ValueError: the format has no such tensor, or its shape or dtype differs. (copy_ alone
            would broadcast and convert.)
    """
    stem = "w2" if projection == "down" else "w13"
    name = stem if kind == "weight" else f"{stem}_{kind}"
    if kind == "input_scale" or not hasattr(weights, name):
        raise ValueError(f"{weights.name} has no {name} for each expert")
    target: torch.Tensor = getattr(weights, name)[slot]
    if stem == "w13":
        target = target.unflatten(0, (2, -1))[1 if projection == "up" else 0]
    if kind == "global_scale":
        tensor = tensor.reshape(1) if tensor.numel() == 1 else tensor
    if target.shape != tensor.shape or target.dtype != tensor.dtype:
        raise ValueError(
            f"{name}, expert slot {slot}, {projection}: {tensor.dtype} {tuple(tensor.shape)} "
            f"found, {target.dtype} {tuple(target.shape)} expected"
        )
    target.copy_(tensor)


def poison(weights: Weights) -> None:
    """Set every scale to NaN, so that a slot that is never written shows."""
    for _, scale in _scales(weights):
        scale.fill_(float("nan"))


def check_written(weights: Weights, where: str = "") -> None:
    """No scale is NaN: after `poison`, all of them were written.

    Args:
        where: the layer's name, a prefix for the message.

    Raises:
        ValueError: naming the tensor, the number of slots and the first one's expert.
    """
    for name, scale in _scales(weights):
        unwritten = scale.float().isnan()
        if count := int(unwritten.sum()):
            first = tuple(unwritten.nonzero()[0].tolist())
            raise ValueError(
                f"{where}{name}: {count} of {scale.numel()} scale slots were never written; the "
                f"first is {first} (expert slot {first[0]}). The checkpoint is incomplete or the "
                "loader does not know its names."
            )


def _scales(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    for f in fields(weights):
        value = getattr(weights, f.name)
        if f.name.endswith("scale") and value is not None:
            yield f.name, value
