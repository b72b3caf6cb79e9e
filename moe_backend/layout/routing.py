"""Token slots grouped by local expert.

A slot is one (token, k) pair of `topk_ids`, numbered `token * top_k + k`. Slots of experts that
live on other ranks, and slots with id -1, belong to no group and are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend.layout.ownership import ExpertMap, ExpertMask


@dataclass(frozen=True)
class RoutingPlan:
    """Slots sorted by local expert; nothing here was read back to the host.

    Attributes:
        slots: `[T * top_k]` int64, a permutation of all slots: first those of local expert 0 in
            token order, then expert 1, ...; dropped slots last.
        expert_offsets: `[num_local_experts]` int32 END offsets into `slots` (no leading zero).
    """

    slots: torch.Tensor
    expert_offsets: torch.Tensor

    @property
    def expert_starts(self) -> torch.Tensor:
        """`[num_local_experts + 1]` int32 START offsets; the last is the number of kept slots."""
        return torch.nn.functional.pad(self.expert_offsets, (1, 0))

    @property
    def counts(self) -> torch.Tensor:
        """`[num_local_experts]` int32, slots of each local expert."""
        starts = self.expert_starts
        return starts[1:] - starts[:-1]


def local_ids(
    topk_ids: torch.Tensor,
    num_local_experts: int,
    expert_map: ExpertMap | torch.Tensor | None,
) -> torch.Tensor:
    """Local expert slot of each id, -1 where it is none or lives on another rank.

    Args:
        topk_ids: `[T, top_k]` global expert ids; -1, or one beyond the last expert, for a slot that
            is left out.
        expert_map: `[num_experts]` int32, global id to local slot or -1; None when all experts
            are local. Not a 0/1 mask.

    Raises:
        TypeError: an ExpertMask is given for the map.
    """
    if isinstance(expert_map, ExpertMask):
        raise TypeError("an ExpertMask is given where an ExpertMap is needed")
    ids = topk_ids.long()
    if expert_map is None:
        return torch.where((ids >= 0) & (ids < num_local_experts), ids, -1)
    table = expert_map.tensor if isinstance(expert_map, ExpertMap) else expert_map
    last = len(table) - 1
    return torch.where((ids >= 0) & (ids <= last), table.long()[ids.clamp(0, last)], -1)


def plan_routing(
    topk_ids: torch.Tensor,
    num_local_experts: int,
    expert_map: ExpertMap | torch.Tensor | None = None,
) -> RoutingPlan:
    """Group the slots of `topk_ids` `[T, top_k]` by local expert, without a host read."""
    ids = local_ids(topk_ids, num_local_experts, expert_map).flatten()
    # Dropped slots sort behind the last expert. bincount would read its result back, scatter_add
    # does not.
    key = torch.where(ids < 0, num_local_experts, ids)
    slots = torch.sort(key, stable=True).indices
    counts = torch.zeros(num_local_experts + 1, dtype=torch.int64, device=key.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    return RoutingPlan(slots, counts[:-1].cumsum(0).int())
