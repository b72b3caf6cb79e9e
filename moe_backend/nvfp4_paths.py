"""NVFP4 experts at load: kept packed, or folded into FP8. Which, and why.

`packed` reads 0.56 bytes a weight and decodes them in the kernel; `folded` reads 1 byte and has FP8
matrix instructions (`formats/folding.py`). So packed wins while the reading of weights takes the
time, folded once many tokens share each expert, provided that there is room for it. A kernel sees
canonical NVFP4 or canonical FP8 and need not know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from moe_backend import envs
from moe_backend.formats import Fp8BlockWeights, Nvfp4Weights
from moe_backend.formats.folding import BLOCK_SHAPE, FoldingCost, fold, folded_bytes
from moe_backend.kernels.registry import LayerConfig

# Roofline of an H200 (4.3 TB/s measured, 790 TFLOPS bf16 measured, twice that in FP8 assumed): both
# paths take the same time at 92 tokens an expert.
CROSSOVER_TOKENS_PER_EXPERT = 92


class Nvfp4Path(StrEnum):
    """How NVFP4 experts are kept."""

    PACKED = "packed"
    FOLDED = "folded"


@dataclass(frozen=True)
class Deployment:
    """What the choice depends on beside the layer.

    Attributes:
        tokens: tokens that a step routes to these experts when the engine is busy, of all ranks
            that share them; None if unknown.
        free_bytes: device memory that folding every layer may take; None if unknown.
        layers: NVFP4 MoE layers of the model.
    """

    tokens: int | None = None
    free_bytes: int | None = None
    layers: int = 1


@dataclass(frozen=True)
class PathChoice:
    """A path and the reason for it, ready for the log."""

    path: Nvfp4Path
    reason: str

    def __str__(self) -> str:
        return f"nvfp4={self.path} ({self.reason})"


def choose(layer: LayerConfig, deployment: Deployment) -> PathChoice:
    """The path for NVFP4 layers like `layer`: what `MOE_BACKEND_NVFP4` says, or the faster one.

    Raises:
        ValueError: the variable has an unknown value.
    """
    requested = envs.NVFP4.get()
    if requested not in (None, "auto"):
        accepted = ("auto", *Nvfp4Path)
        if requested not in accepted:
            raise ValueError(
                f"{envs.NVFP4.name}={requested!r} is unknown; accepted: {', '.join(accepted)}"
            )
        return PathChoice(Nvfp4Path(requested), f"{envs.NVFP4.name} is set")
    if layer.device == "cpu":
        return PathChoice(Nvfp4Path.PACKED, "on a CPU both decode to bf16, and packed is smaller")
    if deployment.tokens is None:
        return PathChoice(Nvfp4Path.PACKED, "the expected number of tokens is unknown")
    per_expert = deployment.tokens * layer.top_k / layer.num_experts
    expected = f"{per_expert:.0f} tokens per expert expected"
    if per_expert < CROSSOVER_TOKENS_PER_EXPERT:
        return PathChoice(
            Nvfp4Path.PACKED,
            f"{expected}, FP8 is faster from {CROSSOVER_TOKENS_PER_EXPERT} on",
        )
    packed, folded = folded_bytes(
        layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    )
    growth = (folded - packed) * deployment.layers
    if deployment.free_bytes is None or growth > deployment.free_bytes:
        room = "unknown" if deployment.free_bytes is None else _gib(deployment.free_bytes)
        return PathChoice(
            Nvfp4Path.PACKED,
            f"{expected}, but FP8 takes {_gib(growth)} more and the room for it is {room}",
        )
    return PathChoice(Nvfp4Path.FOLDED, f"{expected}, and the {_gib(growth)} that FP8 adds fit")


@dataclass(frozen=True)
class Prepared:
    """A layer on its path.

    Attributes:
        layer, weights: what `FusedMoE` gets.
        choice: the path and why.
        cost: what folding lost; None where nothing was folded.
    """

    layer: LayerConfig
    weights: Nvfp4Weights | Fp8BlockWeights
    choice: PathChoice
    cost: FoldingCost | None = None


def prepare(
    layer: LayerConfig, weights: Nvfp4Weights, choice: PathChoice, where: str = ""
) -> Prepared:
    """Put a layer on a path; the packed weights are checked before they are folded.

    Raises:
        ValueError: a tensor is malformed.
    """
    if choice.path is Nvfp4Path.PACKED:
        return Prepared(layer, weights, choice)
    weights.validate(where)
    folded, cost = fold(weights)
    fp8 = replace(layer, format=Fp8BlockWeights.name, block_shape=BLOCK_SHAPE)
    return Prepared(fp8, folded, choice, cost)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
