"""What the ranks of one expert-parallel group must agree on, checked and reduced at load.

Checked on vLLM 0.30.0 to 0.33.0 (read; 0.32.0 run over gloo): `distributed.get_ep_group`,
`FusedMoEParallelConfig.use_ep` and `.ep_size`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_ep_group

from moe_backend.layout.check import check_conserved, check_maps
from moe_backend.layout.ownership import ExpertMap
from moe_backend.layout.routing import plan_routing


def max_over_ranks(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """Element-wise MAX over the expert-parallel ranks.

    A token is quantised once and may be sent to any rank, so all ranks need the activation scale
    that fits every expert; vLLM reduces over a rank's own experts (`oracle/nvfp4.py`).
    """
    if not _several_ranks(layer):
        return values
    on_host = values.cpu()
    torch.distributed.all_reduce(
        on_host, torch.distributed.ReduceOp.MAX, group=get_ep_group().cpu_group
    )
    return on_host.to(values.device)


def check_ownership(layer: Any) -> None:
    """Every expert is owned by exactly one rank, and routing keeps what it must.

    Raises:
        ValueError: naming the layer and the expert.
    """
    if layer.expert_map is None:
        return
    mine = layer.expert_map.cpu()
    try:
        ids = torch.arange(-1, len(mine), dtype=torch.int32)[:, None]
        plan = plan_routing(ids, layer.local_num_experts, mine)
        check_conserved(plan, ids, layer.local_num_experts, mine)
        if _several_ranks(layer):
            group = get_ep_group()
            maps = [torch.empty_like(mine) for _ in range(group.world_size)]
            torch.distributed.all_gather(maps, mine.contiguous(), group=group.cpu_group)
            check_maps([ExpertMap.of(m) for m in maps])
    except ValueError as error:
        raise ValueError(f"{layer.layer_name}: {error}") from None


def _several_ranks(layer: Any) -> bool:
    parallel = layer.moe_config.moe_parallel_config
    return bool(parallel.use_ep and parallel.ep_size > 1)
