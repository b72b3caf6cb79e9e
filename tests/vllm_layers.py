"""Build a real vLLM MoE layer around the tensors of a verify problem."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.config import (
    DeviceConfig,
    KernelConfig,
    LoadConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.forward_context import set_forward_context

from moe_backend.activation import ActivationKind
from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights
from moe_backend.verify.problems import Problem

PREFIX = "model.layers.1.moe.experts"
# `_a16`: weight-only, as the checkpoint's configuration says it.
NVFP4_DIALECTS = ("nvfp4_modelopt", "nvfp4_ct", "nvfp4_modelopt_a16", "nvfp4_ct_a16")
DIALECTS = ("bf16", "fp8_block", *NVFP4_DIALECTS)


def format_of(dialect: str) -> str:
    return dialect.split("_")[0] if dialect.startswith("nvfp4") else dialect


@cache
def vllm_config(backend: str = "blockscale", load_format: str = "auto") -> VllmConfig:
    return VllmConfig(
        kernel_config=KernelConfig(moe_backend=backend),
        device_config=DeviceConfig(device="cpu"),
        load_config=LoadConfig(load_format=load_format),
    )


def quant_config(dialect: str, block_shape: tuple[int, int] = (128, 128)) -> Any:
    if dialect == "bf16":
        return None
    if dialect == "fp8_block":
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config

        return Fp8Config(
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            weight_block_size=list(block_shape),
        )
    weight_only = dialect.endswith("_a16")
    if dialect.startswith("nvfp4_modelopt"):
        from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

        return ModelOptNvFp4Config.from_config(
            {
                "quantization": {
                    "quant_algo": "W4A16_NVFP4" if weight_only else "NVFP4",
                    "group_size": 16,
                    "kv_cache_quant_algo": None,
                    "exclude_modules": [],
                }
            }
        )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    arguments = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
    }
    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "ignore": [],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": "nvfp4-pack-quantized",
                    "weights": {**arguments, "dynamic": False},
                    "input_activations": (
                        None if weight_only else {**arguments, "dynamic": "local"}
                    ),
                }
            },
        }
    )


@dataclass
class Layer:
    """A vLLM `MoERunner` and the config that it was built under."""

    runner: Any
    config: VllmConfig

    @property
    def experts(self) -> Any:
        return self.runner.routed_experts

    def load(self, weights: Any, dialect: str, *, skip: tuple[str, ...] = ()) -> None:
        """Load through the parameters' own weight loaders, as a model would."""
        for name, shard, expert, tensor in checkpoint_tensors(weights, dialect):
            if name not in skip:
                self.load_one(name, shard, expert, tensor)

    def load_one(self, name: str, shard: str, expert: int, tensor: torch.Tensor) -> None:
        param = getattr(self.experts, name)
        param.weight_loader(
            param,
            tensor,
            f"{PREFIX}.routed_experts.{name}",
            shard_id=shard,
            expert_id=expert,
        )

    def finish(self) -> None:
        with set_current_vllm_config(self.config):
            self.experts.quant_method.process_weights_after_loading(self.experts)

    def __call__(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        with set_current_vllm_config(self.config), set_forward_context(None, self.config):
            return self.experts.quant_method.apply(
                layer=self.experts,
                x=x,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                shared_experts=None,
                shared_experts_input=None,
            )


def make_layer(
    problem: Problem,
    dialect: str,
    *,
    backend: str = "blockscale",
    load_format: str = "auto",
    **kw: Any,
) -> Layer:
    """An unloaded layer with the sizes and activation of a problem."""
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    case = problem.case
    activation = case.activation
    name = str(activation.kind)
    limits: dict[str, Any] = {}
    if activation.kind is ActivationKind.CLAMPED_SILU:
        name, limits = "silu", {"swiglu_limit": activation.limit}
    elif activation.kind is ActivationKind.SWIGLUOAI_UNINTERLEAVE:
        limits = {
            "swiglu_limit": activation.limit,
            "swiglu_alpha": activation.alpha,
            "swiglu_beta": activation.beta,
        }
    # Each layer gets a config of its own: vLLM refuses two layers of one name in one config.
    config = VllmConfig(
        kernel_config=KernelConfig(moe_backend=backend),
        device_config=DeviceConfig(device="cpu"),
        load_config=LoadConfig(load_format=load_format),
    )
    with set_current_vllm_config(config):
        runner = FusedMoEFactory(
            **{
                "num_experts": case.num_experts,
                "top_k": case.top_k,
                "hidden_size": case.hidden_size,
                "intermediate_size": case.intermediate_size,
                "params_dtype": torch.bfloat16,
                "quant_config": quant_config(dialect, case.w13_block),
                "prefix": PREFIX,
                "activation": name,
                "scoring_func": "sigmoid",
                "e_score_correction_bias": torch.zeros(case.num_experts),
                **limits,
                **kw,
            }
        )
    return Layer(runner, config)


def reloadable(problem: Problem, dialect: str, **kw: Any) -> Layer:
    """A loaded layer of which vLLM knows how its parameters were created."""
    from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

    layer = make_layer(problem, dialect, **kw)
    record_metadata_for_reloading(layer.experts)
    layer.load(problem.weights, dialect)
    layer.finish()
    return layer


def reload(layer: Layer, tensors: list[tuple[str, str, int, torch.Tensor]]) -> None:
    """vLLM's reload in place of the layer's checkpoint tensors."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    with set_current_vllm_config(layer.config):
        initialize_layerwise_reload(layer.experts)
        for tensor in tensors:
            layer.load_one(*tensor)
        finalize_layerwise_reload(layer.experts, None)


def swap_experts(layer: Layer, topk_ids: torch.Tensor) -> torch.Tensor:
    """Swap the first two experts inside the parameters, as EPLB does; the ids that follow them."""
    for weight in layer.experts.get_expert_weights():
        weight[[0, 1]] = weight[[1, 0]]
    return torch.where(topk_ids == 0, 1, torch.where(topk_ids == 1, 0, topk_ids))


def checkpoint_tensors(weights: Any, dialect: str) -> list[tuple[str, str, int, torch.Tensor]]:
    """`(parameter, shard, expert, tensor)` of a checkpoint in a dialect."""
    out: list[tuple[str, str, int, torch.Tensor]] = []
    i = weights.intermediate_size

    def gate_up_down(stem: str, w13: torch.Tensor, w2: torch.Tensor, rows: int) -> None:
        for e in range(weights.num_experts):
            out.append((f"w13_{stem}", "w1", e, w13[e, :rows]))
            out.append((f"w13_{stem}", "w3", e, w13[e, rows:]))
            out.append((f"w2_{stem}", "w2", e, w2[e]))

    def scalars(stem: str, w13: torch.Tensor, w2: torch.Tensor) -> None:
        for e in range(weights.num_experts):
            out.append((f"w13_{stem}", "w1", e, w13[e, 0].reshape(1)))
            out.append((f"w13_{stem}", "w3", e, w13[e, 1].reshape(1)))
            out.append((f"w2_{stem}", "w2", e, w2[e, 0].reshape(1)))

    if isinstance(weights, Bf16Weights):
        gate_up_down("weight", weights.w13, weights.w2, i)
    elif isinstance(weights, Fp8BlockWeights):
        gate_up_down("weight", weights.w13, weights.w2, i)
        rows = weights.w13_scale.shape[1] // 2
        gate_up_down("weight_scale_inv", weights.w13_scale, weights.w2_scale, rows)
    else:
        assert isinstance(weights, Nvfp4Weights)
        ct = dialect.startswith("nvfp4_ct")
        gate_up_down("weight_packed" if ct else "weight", weights.w13, weights.w2, i)
        gate_up_down("weight_scale", weights.w13_scale, weights.w2_scale, i)
        g13, g2 = weights.w13_global_scale, weights.w2_global_scale
        scalars(
            "weight_global_scale" if ct else "weight_scale_2",
            *((1 / g13, 1 / g2) if ct else (g13, g2)),
        )
        if dialect.endswith("_a16"):
            return out
        one = torch.ones_like(g13)
        scalars("input_global_scale" if ct else "input_scale", one, one[:, :1])
    return out
