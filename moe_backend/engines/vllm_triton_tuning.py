"""A tuned table for vLLM's Triton experts, as its users can make one: the best of a few tilings.

vLLM ships tables for some shapes and takes others from VLLM_TUNED_CONFIG_FOLDER. Here the choice is
made per token count and applied through `fused_moe.override_config` (vLLM 0.30 to 0.33). What vLLM
would take by itself is always among the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Config = dict[str, int]
Args = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
Experts = Callable[..., torch.Tensor]

# Rows and columns of a tile, depth of a step, tiles in a group, warps, stages. With FP8 vLLM cuts
# the depth to that of a scale block. Picked from the tables that vLLM 0.33 ships for an H200.
_Tiling = tuple[int, int, int, int, int, int]
FEW: dict[str, tuple[_Tiling, ...]] = {
    "fp8_block": (
        (16, 64, 128, 1, 4, 3), (16, 64, 128, 1, 4, 4), (16, 64, 128, 1, 4, 5),
        (16, 128, 128, 1, 4, 3), (16, 128, 128, 1, 4, 4), (16, 128, 128, 1, 8, 4),
        (16, 32, 128, 1, 4, 4), (16, 256, 128, 1, 8, 3),
    ),
    "bf16": (
        (16, 32, 128, 1, 4, 4), (16, 64, 128, 1, 4, 4), (16, 64, 128, 1, 4, 5),
        (16, 64, 256, 1, 8, 3), (16, 128, 64, 1, 4, 5), (16, 128, 128, 1, 4, 3),
        (16, 128, 128, 1, 8, 3), (16, 64, 64, 1, 4, 5),
    ),
}  # fmt: skip
SOME: dict[str, tuple[_Tiling, ...]] = {
    "fp8_block": (
        (16, 128, 128, 1, 4, 3), (16, 128, 128, 1, 4, 4), (32, 64, 128, 1, 4, 4),
        (32, 128, 128, 1, 4, 3), (32, 128, 128, 1, 4, 4), (32, 128, 128, 32, 4, 3),
        (64, 64, 128, 1, 4, 4), (64, 128, 128, 1, 4, 3), (64, 128, 128, 16, 4, 4),
    ),
    "bf16": (
        (16, 128, 64, 1, 4, 4), (16, 128, 128, 1, 8, 3), (32, 64, 128, 1, 4, 3),
        (32, 128, 64, 1, 4, 4), (64, 64, 64, 1, 4, 4), (64, 128, 64, 1, 4, 4),
        (64, 128, 64, 1, 8, 4), (64, 256, 64, 1, 8, 3), (128, 128, 64, 1, 8, 3),
    ),
}  # fmt: skip
MANY: dict[str, tuple[_Tiling, ...]] = {
    "fp8_block": (
        (64, 64, 128, 32, 4, 4), (64, 128, 128, 1, 4, 3), (64, 128, 128, 1, 4, 4),
        (64, 128, 128, 32, 4, 3), (64, 128, 128, 64, 4, 4), (64, 256, 128, 16, 8, 3),
        (128, 64, 128, 16, 4, 4), (128, 128, 128, 16, 8, 3), (128, 128, 128, 32, 8, 4),
    ),
    "bf16": (
        (64, 128, 64, 1, 4, 4), (64, 256, 64, 16, 8, 4), (128, 128, 64, 1, 8, 3),
        (128, 128, 64, 16, 8, 4), (128, 128, 64, 16, 4, 4), (128, 256, 64, 1, 8, 3),
        (128, 256, 64, 16, 8, 4), (256, 128, 64, 16, 8, 3),
    ),
}  # fmt: skip


def candidates(format_name: str, slots_per_expert: float) -> list[Config | None]:
    """What to try, for this many slots per expert on average; None is vLLM's own choice."""
    table = FEW if slots_per_expert < 4 else SOME if slots_per_expert < 40 else MANY
    return [None, *(_config(*tiling) for tiling in table[format_name])]


def _config(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Config:
    return {
        "BLOCK_SIZE_M": m,
        "BLOCK_SIZE_N": n,
        "BLOCK_SIZE_K": k,
        "GROUP_SIZE_M": group,
        "num_warps": warps,
        "num_stages": stages,
    }


def describe(config: Config | None) -> str:
    if config is None:
        return "vLLM's own choice"
    return " ".join(map(str, config.values())) + " (m n k group warps stages)"


def under(config: Config | None, call: Experts) -> Experts:
    """The call with this configuration in force; None leaves vLLM its own."""
    if config is None:
        return call

    def configured(*args: Any) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe import override_config

        failure: Exception
        with override_config(config):
            try:
                return call(*args)
            except Exception as error:  # override_config forgets to undo itself when one passes
                failure = error
        raise failure

    return configured


def fastest(
    configs: Iterable[Config | None],
    call: Experts,
    args: Args,
    milliseconds: Callable[[Experts, Args], float],
) -> Config | None:
    """The quickest of those that run; None, vLLM's own choice, where no other is quicker."""
    best: Config | None = None
    least = float("inf")
    for config in configs:
        try:
            taken = milliseconds(under(config, call), args)
        except Exception:  # too much shared memory, or a tile that vLLM's kernel cannot take
            continue
        if taken < least:
            best, least = config, taken
    return best
