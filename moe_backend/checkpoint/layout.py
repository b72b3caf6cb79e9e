"""Find the routed experts' tensors by name.

Two styles are in use. Stacked, one tensor for all experts of a layer, as in Step-3.5:
`model.layers.3.moe.gate_proj.weight` `[E, I, H]`. Per expert, as in DeepSeek, Qwen3 and everything
that llm-compressor writes: `model.layers.3.mlp.experts.7.gate_proj.weight` `[I, H]`, with `w1`,
`w3`, `w2` for gate, up and down in Mixtral and MiniMax. (Names read in vLLM 0.32
`models/step3p5.py`, `models/deepseek_v2.py`, `models/qwen3_moe.py`, `models/minimax_m2.py`.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moe_backend.checkpoint.reader import CheckpointError

GATE, UP, DOWN = "gate", "up", "down"
PROJECTIONS = {
    "gate_proj": GATE,
    "up_proj": UP,
    "down_proj": DOWN,
    "w1": GATE,
    "w3": UP,
    "w2": DOWN,
}

# Expert counts in config.json: Step and Ernie, Qwen, DeepSeek and GLM, Mixtral and MiniMax.
COUNT_KEYS = ("moe_num_experts", "num_experts", "n_routed_experts", "num_local_experts")

_STACKED = re.compile(
    r"(?P<block>.*\bmoe)\.(?P<projection>gate_proj|up_proj|down_proj)\.(?P<kind>\w+)"
)
_PER_EXPERT = re.compile(
    r"(?P<block>.+)\.experts\.(?P<expert>\d+)"
    r"\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>\w+)"
)


@dataclass(frozen=True)
class ExpertModule:
    """A projection of one expert, or of all experts where they are stacked.

    Attributes:
        name: module name, such as `model.layers.3.moe.gate_proj`.
        projection: `gate`, `up` or `down`.
        expert: index of the expert; None where all are stacked.
        tensors: full tensor name by kind (`weight`, `weight_scale_inv`, `input_scale`, ...).
    """

    name: str
    projection: str
    expert: int | None
    tensors: dict[str, str]


@dataclass(frozen=True)
class MoeLayer:
    """The routed experts of one layer.

    Attributes:
        block: name of the module that holds them, such as `model.layers.3.moe`.
        stacked: whether one tensor holds all experts of a projection.
        modules: the projections, ordered by expert, then gate, up, down.
    """

    block: str
    stacked: bool
    modules: tuple[ExpertModule, ...]

    def experts(self, projection: str) -> set[int]:
        """Experts that have a module of `projection`; only where they are not stacked."""
        found = (m.expert for m in self.modules if m.projection == projection)
        return {e for e in found if e is not None}


def find_moe_layers(names: Iterable[str]) -> tuple[MoeLayer, ...]:
    """Group the routed experts' tensors by layer; shared experts and routers are left out.

    Raises:
        CheckpointError: a layer has both naming styles.
    """
    layers: dict[str, dict[tuple[int | None, str], ExpertModule]] = {}
    for name in names:
        match = _PER_EXPERT.fullmatch(name) or _STACKED.fullmatch(name)
        if match is None:
            continue
        parts = match.groupdict()
        expert = int(parts["expert"]) if "expert" in parts else None
        modules = layers.setdefault(parts["block"], {})
        module = modules.setdefault(
            (expert, PROJECTIONS[parts["projection"]]),
            ExpertModule(
                name.rpartition(".")[0], PROJECTIONS[parts["projection"]], expert, tensors={}
            ),
        )
        module.tensors[parts["kind"]] = name
    return tuple(_layer(block, layers[block]) for block in sorted(layers, key=natural))


def _layer(block: str, modules: dict[tuple[int | None, str], ExpertModule]) -> MoeLayer:
    stacked = {module.expert is None for module in modules.values()}
    if len(stacked) > 1:
        names = [next(m.name for m in modules.values() if (m.expert is None) is s) for s in stacked]
        raise CheckpointError(
            f"{block}: holds experts both stacked and one by one ({' and '.join(sorted(names))}); "
            "one style is accepted. Remove the tensors of the other."
        )
    order = (GATE, UP, DOWN)
    ordered = sorted(modules.values(), key=lambda m: (m.expert or 0, order.index(m.projection)))
    return MoeLayer(block, stacked.pop(), tuple(ordered))


def expert_count(config: dict[str, Any]) -> tuple[str, int] | None:
    """Key and value of the expert count in config.json or its `text_config`; None if unstated."""
    for part, prefix in ((config, ""), (config.get("text_config") or {}, "text_config.")):
        for key in COUNT_KEYS:
            if isinstance(part.get(key), int):
                return prefix + key, part[key]
    return None


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json."""
    return config.get("text_config") or config


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 follows layer 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]
