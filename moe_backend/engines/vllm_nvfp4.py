"""NVFP4 experts in vLLM: from both dialects' parameters to canonical weights, packed or folded.

Parameter names checked on vLLM 0.30.0 to 0.33.0 (read and run): `quantization/modelopt.py`,
`quantization/compressed_tensors/.../compressed_tensors_moe_w4a4_nvfp4.py`. Both methods also serve
weight-only checkpoints (`use_a16`): they have the parameters of the activation scales, which no
tensor fills.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.utils import replace_parameter

from moe_backend import nvfp4_paths
from moe_backend.engines.vllm_loading import LoadRecord
from moe_backend.engines.vllm_ranks import max_over_ranks
from moe_backend.formats import Nvfp4Weights
from moe_backend.formats.checks import expect_positive
from moe_backend.kernels.registry import LayerConfig
from moe_backend.nvfp4_paths import Deployment, Nvfp4Path, PathChoice, Prepared

logger = logging.getLogger("vllm.moe_backend")

PARAMETERS = (
    "w13_weight",
    "w13_weight_scale",
    "moe_backend_w13_global_scale",
    "w2_weight",
    "w2_weight_scale",
    "w2_weight_scale_2",
)
# What a layer on each path keeps its weights in. A folded layer's global scales are in its block
# scales, an unpacked layer's scales in its weights.
PATH_PARAMETERS = {
    Nvfp4Path.PACKED: PARAMETERS,
    Nvfp4Path.FOLDED: ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"),
    Nvfp4Path.UNPACKED: ("w13_weight", "w2_weight"),
}

INPUT_SCALES = (
    "w13_input_scale",
    "w2_input_scale",
    "w13_input_global_scale",
    "w2_input_global_scale",
)
# A folded layer this far from its checkpoint is worth a warning; 31 dB is usual.
FOLDING_WARNING_DB = 28.0


# --- Scales ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scales:
    """Global scales in decode direction, taken before vLLM drops the one of up."""

    w13_global: torch.Tensor  # [E, 2]
    w13_input: torch.Tensor | None  # [1]; None for weight-only checkpoints
    w2_input: torch.Tensor | None  # [1]


def modelopt_scales(layer: Any, _: Any) -> Scales:
    _expect_scales(layer, "weight_scale_2")
    w13_input, w2_input = _input_scales(layer, "input_scale", inverse=False)
    return Scales(layer.w13_weight_scale_2.data.float().clone(), w13_input, w2_input)


def compressed_tensors_scales(layer: Any, _: Any) -> Scales:
    """This dialect stores encode-direction scales: the inverse, whose MAX is a minimum."""
    _expect_scales(layer, "weight_global_scale")
    w13_input, w2_input = _input_scales(layer, "input_global_scale", inverse=True)
    return Scales(1.0 / layer.w13_weight_global_scale.data.float(), w13_input, w2_input)


def _input_scales(
    layer: Any, name: str, *, inverse: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """MAX over all experts on all ranks, of w13 and of w2; None for weight-only checkpoints."""
    if layer.moe_backend_weight_only:
        for stem in ("w13", "w2"):  # vLLM divides by them, whatever they are
            getattr(layer, f"{stem}_{name}").data.fill_(1.0)
        return None, None
    _expect_scales(layer, name)
    found = []
    for stem in ("w13", "w2"):
        values = getattr(layer, f"{stem}_{name}").data.float()
        values = 1.0 / values if inverse else values
        found.append(max_over_ranks(layer, values.amax().reshape(1)))
    # A captured graph reads the scales where they were: a reload writes into the same memory.
    held = getattr(layer, "moe_backend_input_scales", None)
    if held is None:
        layer.moe_backend_input_scales = held = tuple(found)
    for kept, new in zip(held, found, strict=True):
        kept.copy_(new)
    return held  # type: ignore[no-any-return]


def _expect_scales(layer: Any, name: str) -> None:
    for stem in ("w13", "w2"):
        expect_positive(f"{layer.layer_name}.{stem}_{name}", getattr(layer, f"{stem}_{name}"))


def keep_scales(layer: Any, kept: Scales) -> None:
    """Both global scales of w13 as a parameter, so that EPLB moves them with their experts."""
    replace_parameter(layer, "moe_backend_w13_global_scale", kept.w13_global)


def note_scales(layer: Any, record: LoadRecord) -> None:
    """Global and input scales are copied once; what is loaded into them later goes unread."""
    for name in record.expected:
        kind = name.partition("_")[2]
        if kind not in ("weight", "weight_scale") and getattr(layer, name, None) is not None:
            record.note_converted(name, "was prepared with the other NVFP4 scales")


def read(layer: Any, kept: Scales) -> list[torch.Tensor | None]:
    """The layer's present tensors in the order of `Nvfp4Weights.tensors()`."""
    return [
        layer.w13_weight,
        layer.w13_weight_scale,
        layer.moe_backend_w13_global_scale,
        layer.w2_weight,
        layer.w2_weight_scale,
        layer.w2_weight_scale_2.view(-1, 1),
        kept.w13_input,
        kept.w2_input,
    ]


def read_path(path: Nvfp4Path, layer: Any, kept: Scales) -> list[torch.Tensor | None]:
    """The layer's present tensors in the order of its canonical weights' `tensors()`."""
    if path is Nvfp4Path.PACKED:
        return read(layer, kept)
    return [getattr(layer, name) for name in PATH_PARAMETERS[path]]


# --- Packed, folded or unpacked -------------------------------------------------------------------


@dataclass
class ModelFacts:
    """What the NVFP4 layers of one model share: their number, and the path once it is chosen.

    The path is chosen once and kept for reloads, whose tensors go into the same memory.
    """

    layers: int = 0
    choice: PathChoice | None = None
    logged: bool = False


def count_layer(config: Any) -> ModelFacts:
    """Note one more NVFP4 layer of the model that `config` (a VllmConfig) describes."""
    facts = getattr(config, "_moe_backend_nvfp4", None)
    if facts is None:
        facts = ModelFacts()
        object.__setattr__(config, "_moe_backend_nvfp4", facts)
    facts.layers += 1
    return facts  # type: ignore[no-any-return]


def prepare(layer: Any, config: LayerConfig, weights: Nvfp4Weights) -> Prepared:
    """The layer on the path that its model takes, with a log line of what folding cost."""
    facts: ModelFacts = layer.moe_backend_model
    if facts.choice is None:
        facts.choice = _choose(layer, config, facts)
    prepared = nvfp4_paths.prepare(config, weights, facts.choice, f"{layer.layer_name}.")
    if prepared.cost is not None:
        cost = prepared.cost
        low = cost.snr_db < FOLDING_WARNING_DB
        level = logging.WARNING if low else logging.DEBUG if facts.logged else logging.INFO
        logger.log(level, "%s: NVFP4 folded to FP8 128x128: %s", layer.layer_name, cost)
        facts.logged = True
    return prepared


def forget_checkpoint_scales(layer: Any, method: Any, path: Nvfp4Path) -> None:
    """Drop the block scales as they were loaded, a ninth of the weights, where others serve."""
    for weight in (method.moe_quant_config._w1, method.moe_quant_config._w2):
        weight.scale = None
    if path is Nvfp4Path.UNPACKED:
        layer.w13_weight_scale = layer.w2_weight_scale = None


def _choose(layer: Any, config: LayerConfig, facts: ModelFacts) -> PathChoice:
    choice = nvfp4_paths.choose(config, _deployment(layer, config, facts))
    # EPLB moves experts between ranks, so no rank may keep them in another form.
    is_packed = torch.tensor([choice.path is Nvfp4Path.PACKED], dtype=torch.int32)
    on_any_rank = bool(max_over_ranks(layer, is_packed))
    if choice.path is not Nvfp4Path.PACKED and on_any_rank:
        return PathChoice(Nvfp4Path.PACKED, "another rank of the expert-parallel group keeps it so")
    return choice


# Limit and use of a container's memory, in control groups of version 2 and 1.
_CONTAINER_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_memory() -> int | None:
    """Bytes of main memory that are free and that this process's container may use (Linux)."""
    found = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvailable:")]
    for limit, used in _CONTAINER_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # not such a container, or "max": no limit
            found.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return min(found, default=None)


def _deployment(layer: Any, config: LayerConfig, facts: ModelFacts) -> Deployment:
    vllm_config = layer.moe_backend_config
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    # A busy engine decodes for every sequence that it may hold, on every data-parallel rank.
    tokens = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    free: int | None = None
    if config.device == "cuda":
        available, total = torch.cuda.mem_get_info()
        # What vLLM may use and does not yet; half of it stays for the key-value cache.
        unused = available - (1 - vllm_config.cache_config.gpu_memory_utilization) * total
        free = max(0, int(unused)) // 2
    elif config.device == "cpu":
        memory = available_memory()
        # Other ranks on the machine read the same number.
        free = None if memory is None else memory // 4
    return Deployment(tokens * parallel.data_parallel_size, free, facts.layers)
