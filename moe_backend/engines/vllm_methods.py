"""vLLM's stock quantisation methods, adopted: checked loading and canonical weights.

A stock method creates and loads the parameters of one layer. Once it has selected our experts
(`engines/vllm.py`), `adopt` gives it a subclass that records the loading, takes the tensors into
canonical form, and hands them to `FusedMoE`. Parameter names checked on vLLM 0.30.0
to 0.33.0 (read and run): `quantization/fp8.py`, `quantization/modelopt.py`,
`quantization/compressed_tensors/.../compressed_tensors_moe_w4a4_nvfp4.py`,
`fused_moe/unquantized_fused_moe_method.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.utils import replace_parameter

from moe_backend.activation import Activation
from moe_backend.engines import vllm_nvfp4
from moe_backend.engines.vllm_experts import BlockscaleExperts, unsupported
from moe_backend.engines.vllm_loading import LoadRecord
from moe_backend.engines.vllm_ranks import check_ownership
from moe_backend.formats import (
    Bf16Weights,
    Fp8BlockWeights,
    Nvfp4Weights,
    Weights,
    weights_from_tensors,
)
from moe_backend.formats.fp8_block import Block
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.registry import LayerConfig
from moe_backend.layout.shards import merge_scale

logger = logging.getLogger("vllm.moe_backend")  # under vLLM's logger, so that its settings apply
_logged: set[str] = set()  # layer descriptions already in the log


def adopt(method: Any, prefix: str, quant_config: Any) -> Any:
    """Give a stock method that selected our experts the loading that they need.

    The method keeps its class's name: vLLM's weight loader decides by substrings of it
    (`fused_moe/routed_experts.py`).

    Raises:
        ValueError: the method did not select our experts, or is of a kind never checked.
    """
    experts = getattr(method, "experts_cls", None)
    if experts is None or not issubclass(experts, BlockscaleExperts):
        why = f"{type(method).__name__} did not take our experts"
        raise unsupported(prefix, quant_config, why, of_format=True)
    if type(method).__name__ not in _METHODS:
        known = ", ".join(_METHODS)
        raise unsupported(
            prefix, quant_config, f"{type(method).__name__} is none of {known}", of_format=True
        )
    method.__class__ = _adopted(type(method))  # type: ignore[arg-type]
    return method


@cache
def _adopted(stock: type) -> type:
    """A subclass of `stock`, of the same name, that checks loading and takes canonical weights."""
    kind = _METHODS[stock.__name__]
    base: Any = stock

    def create_weights(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config()
        record = LoadRecord(layer, kwargs["weight_loader"], config.load_config.load_format)
        base.create_weights(self, layer, *args, **{**kwargs, "weight_loader": record.weight_loader})
        block = getattr(self, "weight_block_size", None)
        refined = getattr(self, "moe_block_shape", block) != block
        # Both NVFP4 methods say so where the checkpoint has no activation scales.
        layer.moe_backend_weight_only = bool(getattr(self, "use_a16", False))
        unfilled = vllm_nvfp4.INPUT_SCALES if layer.moe_backend_weight_only else ()
        record.expect_parameters(block, refined, unfilled)
        record.poison()
        layer.moe_backend_load_record = record
        model = config.model_config
        layer.moe_backend_eager = model is None or model.enforce_eager
        layer.moe_backend_config = config
        if kind.format == Nvfp4Weights.name:
            layer.moe_backend_model = vllm_nvfp4.count_layer(config)

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        record: LoadRecord = layer.moe_backend_load_record
        record.check_complete()
        check_ownership(layer)
        if record.is_dummy:
            _make_scales_positive(layer)
        kept = kind.before(layer, self)
        base.process_weights_after_loading(self, layer)
        kind.after(layer, kept)
        _prepare(layer, kind, kept, self)

    namespace = {
        "__module__": stock.__module__,
        "create_weights": create_weights,
        "process_weights_after_loading": process_weights_after_loading,
        "supports_eplb": property(lambda self: True),
        # vLLM can hand over weights saved in a kernel's layout; ours are always the checkpoint's.
        "supports_pre_processed_weights": False,
    }
    return type(stock.__name__, (stock,), namespace)


def _prepare(layer: Any, kind: _Method, kept: Any, method: Any) -> None:
    """Build the layer's `FusedMoE` and say what runs."""
    blocks = kept if isinstance(kept, _Fp8Blocks) else ()
    weights = packed = weights_from_tensors(kind.format, kind.read(layer, kept), *blocks)
    config = _layer_config(layer, weights)
    parameters, read, origin = kind.parameters, kind.read, ""
    if isinstance(weights, Nvfp4Weights):
        prepared = vllm_nvfp4.prepare(layer, config, weights)
        config, weights, origin = prepared.layer, prepared.weights, str(prepared.choice)
        path = prepared.choice.path
        parameters, read = vllm_nvfp4.PATH_PARAMETERS[path], partial(vllm_nvfp4.read_path, path)
    fused = FusedMoE(config, weights, where=f"{layer.layer_name}.", origin=origin)
    kernel = fused.selection.kernel
    if weights.w13.device.type != "cpu" and not kernel.graph_safe and not layer.moe_backend_eager:
        raise ValueError(
            f"{layer.layer_name}: kernel {kernel.name} ({fused.selection.reason}) cannot be "
            "captured in a CUDA graph. Serve with --enforce-eager."
        )
    record: LoadRecord = layer.moe_backend_load_record
    how = f"is in the layout of kernel {kernel.name}"
    if weights is not packed:
        how = f"was converted from {packed.name.upper()} ({path})"
    tensors = fused.hand_over()  # in the order of `Weights.tensors()`, whatever the kernel
    replaced = False
    for name, tensor in zip(parameters, tensors[: len(parameters)], strict=True):
        # One copy stays: a kernel's own layout takes the place of the checkpoint's.
        if tensor is not None and tensor.data_ptr() != getattr(layer, name).data_ptr():
            replace_parameter(layer, name, tensor)
            record.note_converted(name, how)
            replaced = True
    if isinstance(packed, Nvfp4Weights):
        vllm_nvfp4.note_scales(layer, record)
        if replaced:
            vllm_nvfp4.forget_checkpoint_scales(layer, method, path)
    experts = method.moe_kernel.fused_experts
    experts.fused_moe = fused
    experts.read_tensors = partial(read, layer, kept)
    line = fused.describe()
    if line not in _logged:
        _logged.add(line)
        logger.info("%s and layers like it: %s", layer.layer_name, line)
    report = fused.warm_up(_most_tokens(layer.moe_backend_config), tensors=experts.read_tensors())
    if report is not None:
        level = logging.WARNING if report.left else logging.INFO
        logger.log(level, "%s and layers like it: %s", layer.layer_name, report)


def _most_tokens(config: Any) -> int:
    """Tokens of one call: a step's, of every data-parallel rank whose tokens come here."""
    scheduler, parallel = config.scheduler_config, config.parallel_config
    return int(scheduler.max_num_batched_tokens * parallel.data_parallel_size)


def _layer_config(layer: Any, weights: Weights) -> LayerConfig:
    config = layer.moe_config
    return LayerConfig(
        format=weights.name,
        num_experts=layer.global_num_experts,
        num_local_experts=layer.local_num_experts,
        top_k=config.experts_per_token,
        hidden_size=config.hidden_dim,
        intermediate_size=config.intermediate_size_per_partition,
        activation=Activation.from_name(
            layer.activation.value,
            limit=layer.swiglu_limit,
            alpha=layer.swiglu_alpha,
            beta=layer.swiglu_beta,
        ),
        dtype=str(config.in_dtype).removeprefix("torch."),
        device=weights.w13.device.type,
        expert_parallel=layer.expert_map is not None,
        w13_block=getattr(weights, "w13_block", None),
        w2_block=getattr(weights, "w2_block", None),
    )


# --- From each method's parameters to canonical weights -------------------------------------------


def _make_scales_positive(layer: Any) -> None:
    """`--load-format dummy` fills scales with values of either sign; any positive number serves."""
    for name, parameter in layer.named_parameters():
        if "scale" in name:
            parameter.data.fill_(2.0**-6)


def _nothing(layer: Any, _: Any) -> None:
    return None


def _read_bf16(layer: Any, kept: None) -> list[torch.Tensor | None]:
    return [layer.w13_weight, layer.w2_weight]


class _Fp8Blocks(NamedTuple):
    """Rows and columns that one scale covers."""

    w13: Block
    w2: Block


def _merge_fp8_scales(layer: Any, method: Any) -> _Fp8Blocks:
    """Undo what vLLM refines beyond need.

    For a tensor-parallel shard that misses the checkpoint's grid vLLM refines every axis (`oracle/
    fp8.py refine_fp8_moe_block_shape`); the hidden axis is not split and keeps its blocks here.
    """
    n, k = method.weight_block_size
    refined_n, refined_k = getattr(method, "moe_block_shape", None) or (n, k)
    for name, axis, refined, block in (
        ("w13_weight_scale_inv", -1, refined_k, k),
        ("w2_weight_scale_inv", -2, refined_n, n),
    ):
        if refined != block:
            where = f"{layer.layer_name}.{name}"
            merged = merge_scale(getattr(layer, name).data, axis, refined, block, where)
            replace_parameter(layer, name, merged)
            layer.moe_backend_load_record.note_converted(name, "has merged blocks")
    return _Fp8Blocks((refined_n, k), (n, refined_k))


def _undo_fnuz(layer: Any, kept: _Fp8Blocks) -> None:
    """Codes as the checkpoint has them, where vLLM has read them as gfx94x's own.

    The same byte means half as much there, so it doubles the scales (`w8a8_utils.py
    normalize_e4m3fn_to_e4m3fnuz`); and it makes -0, which is fnuz's NaN, 0. NaN, which is fnuz's
    largest number, is NaN again, and refused as everywhere.
    """
    for name in ("w13_weight", "w2_weight"):
        codes = getattr(layer, name).data
        if codes.dtype != torch.float8_e4m3fnuz:
            continue
        replace_parameter(layer, name, codes.view(torch.float8_e4m3fn))
        scale = f"{name}_scale_inv"
        replace_parameter(layer, scale, getattr(layer, scale).data / 2)


def _read_fp8_block(layer: Any, kept: _Fp8Blocks) -> list[torch.Tensor | None]:
    return [
        layer.w13_weight,
        layer.w13_weight_scale_inv,
        layer.w2_weight,
        layer.w2_weight_scale_inv,
    ]


@dataclass(frozen=True)
class _Method:
    """How one stock method's parameters become canonical weights.

    Attributes:
        format: name of the format.
        before: takes layer and method; puts right or saves what vLLM's own processing needs, drops
            or inverts.
        after: puts it where it is needed, once that processing is done.
        read: the layer's present tensors in the order of `Weights.tensors()`. It is called in every
            step: a reload puts other parameters in place, and EPLB writes into those there are.
        parameters: their names on the layer, as far as a kernel may replace them.
    """

    format: str
    before: Callable[[Any, Any], Any]
    after: Callable[[Any, Any], None]
    read: Callable[[Any, Any], list[torch.Tensor | None]]
    parameters: tuple[str, ...]


_METHODS = {
    "UnquantizedFusedMoEMethod": _Method(
        Bf16Weights.name, _nothing, _nothing, _read_bf16, ("w13_weight", "w2_weight")
    ),
    "Fp8MoEMethod": _Method(
        Fp8BlockWeights.name,
        _merge_fp8_scales,
        _undo_fnuz,
        _read_fp8_block,
        ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv"),
    ),
    "ModelOptNvFp4FusedMoE": _Method(
        Nvfp4Weights.name,
        vllm_nvfp4.modelopt_scales,
        vllm_nvfp4.keep_scales,
        vllm_nvfp4.read,
        vllm_nvfp4.PARAMETERS,
    ),
    "CompressedTensorsW4A4Nvfp4MoEMethod": _Method(
        Nvfp4Weights.name,
        vllm_nvfp4.compressed_tensors_scales,
        vllm_nvfp4.keep_scales,
        vllm_nvfp4.read,
        vllm_nvfp4.PARAMETERS,
    ),
}
