"""Our experts classes in vLLM's modular interface, and what they refuse.

Checked on vLLM 0.30.0 to 0.33.0 (read and run). Imported only once a layer asks for our backend,
never at registration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8Dynamic128Sym,
    kNvfp4Dynamic,
    kNvfp4Static,
)

from moe_backend.activation import Activation
from moe_backend.engines.vllm import NAME
from moe_backend.fused_moe import FusedMoE

_ACTIVATIONS = (
    MoEActivation.SILU,
    MoEActivation.SWIGLUSTEP,
    MoEActivation.SWIGLUOAI_UNINTERLEAVE,
)


class BlockscaleExperts(mk.FusedMoEExpertsModular):
    """Hands vLLM's call, activations unquantised, to the layer's `FusedMoE`."""

    consumes_expert_mask = False
    fused_moe: FusedMoE | None = None
    read_tensors: Callable[[], list[torch.Tensor | None]]  # the layer's present weights

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def workspace_shapes(
        self, M: int, N: int, K: int, *_: Any, **__: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()  # apply() weights and reduces

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool = False,
        **_: Any,
    ) -> None:
        if self.fused_moe is None:
            raise RuntimeError(
                "the experts were called before their weights were prepared; "
                "process_weights_after_loading has not run on this layer"
            )
        if apply_router_weight_on_input:  # vLLM's prepare step has multiplied the input by them
            topk_weights = torch.ones_like(topk_weights)
        output.copy_(
            self.fused_moe(
                hidden_states, topk_weights, topk_ids, expert_map, tensors=self.read_tensors()
            )
        )


class Bf16Experts(BlockscaleExperts):
    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None


class Fp8BlockExperts(BlockscaleExperts):
    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        if weight_key is None or activation_key != kFp8Dynamic128Sym:
            return False
        block = weight_key.scale.group_shape
        # vLLM names FP8 after the platform's own: on gfx94x it makes e4m3fnuz of the codes while it
        # processes them (`quantization/fp8.py`), which `vllm_methods` undoes. Also the refined
        # block shapes of TP shards that miss the checkpoint's grid.
        codes = weight_key.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
        return codes and block.row > 1 and block.col > 1


class Nvfp4Experts(BlockscaleExperts):
    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        # None: a weight-only checkpoint. No kernel here needs activation scales.
        return weight_key == kNvfp4Static and activation_key in (kNvfp4Dynamic, None)


# --- Refusals -------------------------------------------------------------------------------------


def refuse_unsupported(prefix: str, quant_config: Any, moe_config: Any) -> None:
    """Raise ValueError for what the configuration alone rules out."""
    if moe_config.is_lora_enabled:
        raise unsupported(prefix, quant_config, "LoRA on the experts is not supported")
    if moe_config.moe_parallel_config.use_batched_activation_format:
        raise unsupported(
            prefix,
            quant_config,
            "the batched activation format of this --all2all-backend is not supported; use "
            "--all2all-backend allgather_reducescatter",
        )
    if moe_config.has_bias:
        raise unsupported(prefix, quant_config, "biases on the experts are not supported")
    if not moe_config.is_act_and_mul or moe_config.activation not in _ACTIVATIONS:
        Activation.from_name(moe_config.activation.value)  # raises, naming the accepted ones


def unsupported(prefix: str, quant_config: Any, why: str, *, of_format: bool = False) -> ValueError:
    """The error for a layer that our backend cannot serve, perhaps because of its format."""
    scheme = "unquantised" if quant_config is None else type(quant_config).__name__
    # Another format of the experts would do, if there is a bf16 checkpoint to make it from.
    convert = ", or convert its bf16 original with `moe-backend convert`" if of_format else ""
    return ValueError(
        f"--moe-backend {NAME} cannot serve {prefix} ({scheme}): {why}. Supported: bf16, FP8 with "
        "block scales and dynamic activations, NVFP4 (modelopt, compressed-tensors; W4A4, W4A16). "
        f"Use another --moe-backend for this model{convert}."
    )
