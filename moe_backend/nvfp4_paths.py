"""NVFP4 experts at load: kept packed, folded into FP8, or unpacked. Which, and why.

`packed` reads 0.56 bytes a weight and decodes them in the kernel; `folded` reads 1 byte and has FP8
matrix instructions (`formats/folding.py`). So packed wins while the reading of weights takes the
time, folded once many tokens share each expert, provided that there is room for it. A CPU has
neither fast decoding nor FP8 instructions: there `unpacked`, 2 bytes a weight, is up to ten times
faster. A kernel sees canonical NVFP4, FP8 or bf16 and need not know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from moe_backend import envs
from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.folding import BLOCK, FoldingCost, fold, folded_bytes, unpack
from moe_backend.kernels.nvfp4_native import Nvfp4NativeKernel
from moe_backend.kernels.registry import LayerConfig

# Tokens per expert from which folding is worth 1.78 times the memory and some accuracy. Measured
# on an H200 (deepseek-v4-flash-ep8 and -folded, packed of 1 December, folded of 30 November 2026):
# at 6 packed takes 0.66 of the time, at 24 0.72, at 96 folded 0.89 of packed's. Packed takes 228 us
# at 48, which folded's 224 at 24 and 263 at 96 put somewhat below the crossing; between 48 and 96
# folded has not been timed.
CROSSOVER_TOKENS_PER_EXPERT = 48


class Nvfp4Path(StrEnum):
    """How NVFP4 experts are kept."""

    PACKED = "packed"
    FOLDED = "folded"
    UNPACKED = "unpacked"


@dataclass(frozen=True)
class Deployment:
    """What the choice depends on beside the layer.

    Attributes:
        tokens: tokens that a step routes to these experts when the engine is busy, of all ranks
            that share them; None if unknown.
        free_bytes: memory of the device that converting every layer may take; None if unknown.
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


def requested() -> Nvfp4Path | None:
    """What `MOE_BACKEND_NVFP4` asks for; None: the faster one.

    Raises:
        ValueError: the variable has an unknown value.
    """
    given = envs.NVFP4.get()
    if given in (None, "auto"):
        return None
    accepted = ("auto", *Nvfp4Path)
    if given not in accepted:
        raise ValueError(f"{envs.NVFP4.name}={given!r} is unknown; accepted: {', '.join(accepted)}")
    return Nvfp4Path(given)


def choose(layer: LayerConfig, deployment: Deployment) -> PathChoice:
    """The path for NVFP4 layers like `layer`: what `MOE_BACKEND_NVFP4` says, or the faster one.

    Raises:
        ValueError: the variable has an unknown value.
    """
    if (asked := requested()) is not None:
        return PathChoice(asked, f"{envs.NVFP4.name} is set")
    if envs.KERNEL.get() == Nvfp4NativeKernel.name:
        return PathChoice(Nvfp4Path.PACKED, f"kernel {Nvfp4NativeKernel.name} multiplies 4 bits")
    packed, folded = folded_bytes(
        layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    )
    if layer.device == "cpu":
        weights = 3 * layer.num_local_experts * layer.hidden_size * layer.intermediate_size
        unpacked = weights * layer.torch_dtype.itemsize
        growth = (unpacked - packed) * deployment.layers
        if _fits(growth, deployment):
            return PathChoice(Nvfp4Path.UNPACKED, f"a CPU decodes slowly, and {_gib(growth)} fit")
        return PathChoice(Nvfp4Path.PACKED, _no_room("unpacked weights take", growth, deployment))
    if deployment.tokens is None:
        return PathChoice(Nvfp4Path.PACKED, "the expected number of tokens is unknown")
    per_expert = deployment.tokens * layer.top_k / layer.num_experts
    expected = f"{per_expert:.0f} tokens per expert expected"
    if per_expert < CROSSOVER_TOKENS_PER_EXPERT:
        return PathChoice(
            Nvfp4Path.PACKED,
            f"{expected}, FP8 is faster from {CROSSOVER_TOKENS_PER_EXPERT} on",
        )
    growth = (folded - packed) * deployment.layers
    if not _fits(growth, deployment):
        return PathChoice(
            Nvfp4Path.PACKED, f"{expected}, but {_no_room('FP8 takes', growth, deployment)}"
        )
    return PathChoice(Nvfp4Path.FOLDED, f"{expected}, and the {_gib(growth)} that FP8 adds fit")


def _fits(growth: int, deployment: Deployment) -> bool:
    return deployment.free_bytes is not None and growth <= deployment.free_bytes


def _no_room(what: str, growth: int, deployment: Deployment) -> str:
    room = "unknown" if deployment.free_bytes is None else _gib(deployment.free_bytes)
    return f"{what} {_gib(growth)} more and the room for it is {room}"


@dataclass(frozen=True)
class Prepared:
    """A layer on its path.

    Attributes:
        layer, weights: what `FusedMoE` gets.
        choice: the path and why.
        cost: what folding lost; None where nothing was folded.
    """

    layer: LayerConfig
    weights: Weights
    choice: PathChoice
    cost: FoldingCost | None = None


def prepare(
    layer: LayerConfig, weights: Nvfp4Weights, choice: PathChoice, where: str = ""
) -> Prepared:
    """Put a layer on a path; the packed weights are checked before they are converted.

    Raises:
        ValueError: a tensor is malformed.
    """
    if choice.path is Nvfp4Path.PACKED:
        return Prepared(layer, weights, choice)
    weights.validate(where)
    if choice.path is Nvfp4Path.UNPACKED:
        unpacked = unpack(weights, layer.torch_dtype)
        return Prepared(replace(layer, format=Bf16Weights.name), unpacked, choice)
    folded, cost = fold(weights)
    fp8 = replace(layer, format=Fp8BlockWeights.name, w13_block=BLOCK, w2_block=BLOCK)
    return Prepared(fp8, folded, choice, cost)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
