"""`quantization_config` of converted checkpoints: experts quantised, everything else left alone.

An engine quantises every linear layer that the config does not list, so the list has to name them
all, under each name that an engine may look for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_backend.checkpoint.dialects import HF_QUANT_CONFIG, Dialect
from moe_backend.checkpoint.layout import MoeLayer, natural, text_config
from moe_backend.checkpoint.reader import Checkpoint
from moe_backend.formats.nvfp4 import GROUP

# The tools' releases whose layout is written here.
MODELOPT_VERSION = "0.47.0"
COMPRESSED_TENSORS_VERSION = "0.17.0"

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_LAYER = re.compile(r"(?P<before>.*\blayers\.)(?P<index>\d+)\.(?P<rest>.+)")
# Parts of a multi-token-prediction layer that stay outside of its `mtp_block`
# (vLLM 0.32 `models/step3p5_mtp.py`, `models/deepseek_mtp.py`).
_OUTSIDE_MTP_BLOCK = ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head")


def write_configs(
    source: Checkpoint, layers: tuple[MoeLayer, ...], target: Dialect, folder: Path
) -> None:
    """Write `source`'s config.json, with the target's `quantization_config`, to `folder`."""
    modules = unquantised_modules(source, layers)
    if target.name == "fp8-block":
        stated = fp8_block_config(modules, target.block_shape)
    elif target.name == "nvfp4-ct":
        stated = compressed_tensors_config(modules)
    else:
        stated, nested = modelopt_configs(modules, quantised_modules(source, layers))
        _write_json(folder / HF_QUANT_CONFIG, nested)
    _write_json(folder / "config.json", {**source.config, "quantization_config": stated})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unquantised_modules(source: Checkpoint, layers: tuple[MoeLayer, ...]) -> list[str]:
    """Names of all modules with a weight matrix that are not routed experts, in layer order.

    Norms and embeddings are left out: no tool lists them. `lm_head` is always in: a tied one has
    no tensor of its own. Fused modules (`qkv_proj`) stand beside their parts, as in the list of
    Step-3.5-Flash-FP8: some of vLLM's models know only the one name, some only the other.
    """
    experts = quantised_modules(source, layers)
    names = {"lm_head"}
    for name, info in source.tensors.items():
        module, _, kind = name.rpartition(".")
        is_embedding = "embed" in module.rpartition(".")[2]
        if kind == "weight" and len(info.shape) > 1 and not is_embedding and module not in experts:
            names |= {module, *_mtp_names(module, source.config)}
    parents = {name.rpartition(".")[0] for name in names}
    for fused, parts in _FUSED.items():
        whole = (p for p in parents if all(f"{p}.{part}" in names for part in parts))
        names |= {f"{parent}.{fused}" for parent in whole}
    return sorted(names, key=natural)


def quantised_modules(source: Checkpoint, layers: tuple[MoeLayer, ...]) -> set[str]:
    """Names of the routed experts' modules."""
    names = {module.name for layer in layers for module in layer.modules}
    return names | {alias for name in names for alias in _mtp_names(name, source.config)}


def _mtp_names(module: str, config: dict[str, Any]) -> list[str]:
    """What vLLM calls a module of a multi-token-prediction layer, if `module` is in one."""
    match = _LAYER.fullmatch(module)
    depth = text_config(config).get("num_hidden_layers")
    if match is None or depth is None or int(match["index"]) < depth:
        return []
    start = f"{match['before']}{match['index']}"
    rest = match["rest"].removeprefix("transformer.")
    rest = rest.replace("shared_head.output", "shared_head.head")
    if rest.startswith(_OUTSIDE_MTP_BLOCK):
        return [f"{start}.{rest}"]
    return [f"{start}.mtp_block.{rest}"]


def fp8_block_config(modules: list[str], block_shape: tuple[int, int]) -> dict[str, Any]:
    """The fields of DeepSeek-V3's config.json, and the list of Step-3.5-Flash-FP8's."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": modules,
        "quant_method": "fp8",
        "weight_block_size": list(block_shape),
    }


def modelopt_configs(
    modules: list[str], quantised: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`quantization_config` and `hf_quant_config.json`, as modelopt's export writes both.

    Args:
        modules: names from `unquantised_modules`.
        quantised: names from `quantised_modules`.

    The producer is the dialect's: engines recognise hf_quant_config.json by it.
    """
    producer = {"name": "modelopt", "version": MODELOPT_VERSION}
    excluded = summarise(modules, quantised)
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}
    flat = {
        "config_groups": {
            "group_0": {
                "input_activations": four_bits,
                "weights": dict(four_bits),
                "targets": ["Linear"],
            }
        },
        "ignore": excluded,
        "quant_algo": "NVFP4",
        "producer": producer,
        "quant_method": "modelopt",
    }
    nested = {
        "producer": producer,
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": GROUP,
            "exclude_modules": excluded,
        },
    }
    return flat, nested


def summarise(modules: Iterable[str], quantised: Iterable[str]) -> list[str]:
    """Shorten names to `prefix*` or `prefix.*` where no quantised module has that prefix.

    The same forms as modelopt 0.47 (`export/quant_utils.py`). `prefix*` is also a prefix of
    `prefix0`, so `prefix.*` is the second choice, and the name itself the last.
    """
    taken = set(quantised)
    prefixes = {name[:end] for name in taken for end in range(len(name) + 1)}
    summary = set()
    for module in modules:
        for end in (i for i, letter in enumerate(module) if letter == "."):
            prefix = module[:end]
            if prefix not in prefixes:
                summary.add(f"{prefix}*")
                break
            if f"{prefix}." not in prefixes and prefix not in taken:
                summary.add(f"{prefix}.*")
                break
        else:
            summary.add(module)
    return sorted(summary)


def compressed_tensors_config(modules: list[str]) -> dict[str, Any]:
    """What compressed-tensors writes for llm-compressor's preset `NVFP4`."""
    weights: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": GROUP,
        "num_bits": 4,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": "torch.float8_e4m3fn",
        "strategy": "tensor_group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }
    # "local": block scales are computed from each activation, the global scale is static.
    activations = {**weights, "dynamic": "local", "observer": "static_minmax"}
    group = {
        "format": "nvfp4-pack-quantized",
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "nvfp4-pack-quantized",
        "global_compression_ratio": None,
        "ignore": modules,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": COMPRESSED_TENSORS_VERSION,
    }
