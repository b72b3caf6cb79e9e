"""How quantised experts are stored: tensor names, shapes and dtypes, and what config.json says.

Three dialects are known, each as its own tool writes it:

* `fp8-block`: DeepSeek-V3, Step-3.5-Flash-FP8. `weight` e4m3 and `weight_scale_inv`, the decode
  factor of each block.
* `nvfp4-modelopt`: nvidia-modelopt 0.47 `export/unified_export_hf.py`. `weight` (two codes a byte),
  `weight_scale`, `weight_scale_2 = amax / 2688` and `input_scale`, all in decode direction.
* `nvfp4-ct`: compressed-tensors 0.17 `nvfp4-pack-quantized`, written by llm-compressor.
  `weight_packed`, `weight_scale`, and the encode-direction (inverse) `weight_global_scale` and
  `input_global_scale`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from moe_backend.checkpoint.layout import text_config
from moe_backend.checkpoint.reader import Checkpoint, CheckpointError, read_json
from moe_backend.formats.fp8_block import cdiv
from moe_backend.formats.nvfp4 import GROUP

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HF_QUANT_CONFIG = "hf_quant_config.json"


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of one expert's projection must be.

    Attributes:
        shape: without the expert dimension; `()` and `(1,)` stand for each other.
        dtypes: accepted ones; the first is the one that the dialect's tool writes.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Dialect:
    """One way to store an expert's projection.

    Attributes:
        name: `bf16`, `fp8-block`, `nvfp4-modelopt`, `nvfp4-ct`, or `unknown`.
        block_shape: rows and columns that one FP8 scale covers.
        has_input_scale: False for weight-only NVFP4.
    """

    name: str
    block_shape: tuple[int, int] = (128, 128)
    has_input_scale: bool = True

    @property
    def codes(self) -> str:
        """Kind of the tensor that holds the weight."""
        return "weight_packed" if self.name == "nvfp4-ct" else "weight"

    @property
    def codes_dtypes(self) -> tuple[torch.dtype, ...]:
        return self.tensors(GROUP, GROUP)[self.codes].dtypes

    def columns(self, stored: int) -> int:
        """Weight columns from the stored tensor's last dimension."""
        return 2 * stored if self.name.startswith("nvfp4") else stored

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Every tensor by kind, for a weight `[rows, columns]`."""
        if self.name == "bf16":
            return {"weight": TensorSpec((rows, columns), FLOATS)}
        if self.name == "fp8-block":
            blocks = (cdiv(rows, self.block_shape[0]), cdiv(columns, self.block_shape[1]))
            scales = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
            return {
                "weight": TensorSpec((rows, columns), (torch.float8_e4m3fn,)),
                "weight_scale_inv": TensorSpec(blocks, scales),
            }
        modelopt = self.name == "nvfp4-modelopt"
        scalar = TensorSpec(() if modelopt else (1,), (torch.float32, torch.bfloat16))
        specs = {
            self.codes: TensorSpec((rows, columns // 2), (torch.uint8,)),
            "weight_scale": TensorSpec((rows, columns // GROUP), (torch.float8_e4m3fn,)),
            "weight_scale_2" if modelopt else "weight_global_scale": scalar,
        }
        if self.has_input_scale:
            specs["input_scale" if modelopt else "input_global_scale"] = scalar
        return specs


BF16 = Dialect("bf16")
UNKNOWN = Dialect("unknown")


@dataclass(frozen=True)
class Quantisation:
    """What config.json says about the experts.

    Attributes:
        source: where it says so, for messages; empty if the checkpoint is not quantised.
        method: `fp8`, `modelopt`, `compressed-tensors` or another.
        groups: dialects with their targets; a module belongs to the first that matches it.
        ignored: names and patterns of modules that are not quantised.
    """

    source: str = ""
    method: str = ""
    groups: tuple[tuple[Dialect, tuple[str, ...]], ...] = ()
    ignored: tuple[str, ...] = ()

    def dialect_of(self, block: str, projection: str) -> Dialect:
        """The dialect that config.json gives to the experts of `block`; `BF16` if left out.

        Args:
            projection: as in the tensors' names: `gate_proj`, `w2`, ...

        The names are the ones for which vLLM asks, whatever the tensors are called: a pattern such
        as `*.moe.gate*` means the router and not the stacked `moe.gate_proj` of the experts.
        """
        name = f"{block}.experts"
        if self.method == "compressed-tensors":
            name = f"{name}.0.{projection}"
        if any(self._ignores(entry, name) for entry in self.ignored):
            return BF16
        for dialect, targets in self.groups:
            if any(_matches(target, name) for target in targets):
                return dialect
        return BF16

    def _ignores(self, entry: str, name: str) -> bool:
        """Whether an entry of the ignore list means `name`, by the rules of vLLM 0.32.

        `quant_utils.py is_layer_skipped` (fp8, modelopt): an entry that names a single expert's
        projection means all of the layer. `modelopt.py is_layer_excluded`: any part of a name, and
        shell patterns. `compressed_tensors/utils.py should_ignore_layer`.
        """
        if self.method == "compressed-tensors":
            return _matches(entry, name)
        if self.method == "modelopt" and (entry in name or fnmatchcase(name, entry)):
            return True
        return name in entry


def read_quantisation(checkpoint: Checkpoint) -> Quantisation:
    """Interpret `quantization_config`; a method that is none of ours yields `UNKNOWN` modules."""
    config = checkpoint.config
    source, stated = "config.json quantization_config", config.get("quantization_config")
    if stated is None:
        stated = text_config(config).get("quantization_config") or config.get("compression_config")
    if stated is None and (checkpoint.path / HF_QUANT_CONFIG).exists():
        # modelopt up to 0.29 wrote nothing else.
        source = HF_QUANT_CONFIG
        stated = {"quant_method": "modelopt", **read_json(checkpoint.path / HF_QUANT_CONFIG)}
    if not stated:
        return Quantisation()
    if not isinstance(stated, dict):
        raise CheckpointError(f"{checkpoint.path}: {source} is not a JSON object.")
    method = str(stated.get("quant_method", "")).lower().replace("_", "-")
    everything = ("*",)
    if method == "fp8":
        dialect = _fp8(stated, text_config(config))
        ignored = stated.get("ignored_layers") or stated.get("modules_to_not_convert") or []
        return Quantisation(source, method, ((dialect, everything),), tuple(ignored))
    if method.startswith("modelopt"):
        dialect, ignored = _modelopt(stated)
        return Quantisation(source, "modelopt", ((dialect, everything),), tuple(ignored))
    if method == "compressed-tensors":
        groups = [_group(g, stated.get("format")) for g in stated.get("config_groups", {}).values()]
        return Quantisation(source, method, tuple(groups), tuple(stated.get("ignore") or []))
    return Quantisation(source, method, ((UNKNOWN, everything),))


def _fp8(stated: dict[str, Any], config: dict[str, Any]) -> Dialect:
    block = stated.get("weight_block_size")
    # DeepSeek-V4 and MiMo keep their experts in another format under the same method.
    others = ("expert_dtype", "store_dtype", "moe_quant_algo")
    if any(part.get(key) not in (None, "fp8") for part in (stated, config) for key in others):
        return UNKNOWN
    if not isinstance(block, list) or len(block) != 2:
        return UNKNOWN  # one scale per tensor or channel
    return Dialect("fp8-block", (int(block[0]), int(block[1])))


def _modelopt(stated: dict[str, Any]) -> tuple[Dialect, list[str]]:
    """Dialect and excluded modules, from the flat or the nested form."""
    details = stated.get("quantization", stated)
    algorithm = str(details.get("quant_algo", "")).upper()
    ignored = details.get("exclude_modules") or details.get("ignore") or []
    group_size = int(details.get("group_size") or GROUP)
    if algorithm not in ("NVFP4", "W4A16_NVFP4") or group_size != GROUP:
        return UNKNOWN, ignored
    groups = list((stated.get("config_groups") or {}).values())
    # vLLM takes "NVFP4" without activations in any group as weight-only (`modelopt.py`).
    weight_only = bool(groups) and all(g.get("input_activations") is None for g in groups)
    has_input_scale = algorithm == "NVFP4" and not weight_only
    return Dialect("nvfp4-modelopt", has_input_scale=has_input_scale), ignored


def _group(group: dict[str, Any], common_format: str | None) -> tuple[Dialect, tuple[str, ...]]:
    """Dialect and targets of one compressed-tensors group."""
    weights = group.get("weights") or {}
    nvfp4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP}
    is_nvfp4 = all(weights.get(key) == value for key, value in nvfp4.items())
    is_packed = (group.get("format") or common_format) == "nvfp4-pack-quantized"
    dialect = UNKNOWN
    if is_nvfp4 and is_packed:
        dialect = Dialect("nvfp4-ct", has_input_scale=group.get("input_activations") is not None)
    # To the tool, experts are modules of class Linear; vLLM adds its own class names.
    classes = ("Linear", "FusedMoE", "RoutedExperts")
    return dialect, tuple("*" if t in classes else t for t in group.get("targets") or [])


def _matches(target: str, name: str) -> bool:
    """Whether a compressed-tensors target, or `*`, means `name`."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in ("*", name)
