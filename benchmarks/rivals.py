"""The other mixture-of-experts backends of an installed vLLM, built for a layer of random weights.

Each comes through vLLM's own oracle, `model_executor/layers/fused_moe/oracle/` (checked on 0.33.0),
so weights are laid out as vLLM would lay them out. Without vLLM there are no rivals.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator

import torch

from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.kernels.registry import LayerConfig

Experts = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]  # x, topk_weights, topk_ids, expert_map

FP8 = ("TRITON", "DEEPGEMM", "MARLIN", "HUMMING")
NVFP4 = ("MARLIN", "HUMMING")


@contextlib.contextmanager
def vllm_context() -> Iterator[None]:
    """What vLLM's layers expect around them; nothing where vLLM is not installed."""
    try:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.forward_context import set_forward_context
        from vllm.v1.worker.workspace import init_workspace_manager
    except ImportError:
        yield
        return
    init_workspace_manager(torch.device("cuda:0"))
    config = VllmConfig()
    with set_current_vllm_config(config), set_forward_context(None, config):
        yield


def build(layer: LayerConfig, weights: Weights) -> Iterator[tuple[str, Experts | str]]:
    """Name and call of each rival, one at a time, or the reason why it could not be built.

    The caller drops one before it asks for the next, so that one copy of the weights is held.
    """
    try:
        import vllm  # noqa: F401
    except ImportError:
        return
    if isinstance(weights, Bf16Weights):
        yield "vllm-triton", _bf16(layer, weights)
        return
    names = FP8 if isinstance(weights, Fp8BlockWeights) else NVFP4
    if layer.w13_block not in (None, (128, 128)):
        return  # no backend of vLLM takes these blocks
    for name in names:
        try:
            one = _fp8 if isinstance(weights, Fp8BlockWeights) else _nvfp4
            yield from one(name, layer, weights)  # type: ignore[arg-type]
        except Exception as error:
            traceback.print_exc(limit=-2)
            yield f"vllm-{name.lower()}", f"not built: {error!r}"[:300]


def _bf16(layer: LayerConfig, weights: Bf16Weights) -> Experts:
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    def call(x, topk_weights, topk_ids, expert_map):  # type: ignore[no-untyped-def]
        return fused_experts(
            x, weights.w13, weights.w2, topk_weights, topk_ids, activation=MoEActivation.SILU,
            global_num_experts=layer.num_experts, expert_map=expert_map,
        )  # fmt: skip

    return call


def _fp8(name: str, layer: LayerConfig, weights: Fp8BlockWeights):  # type: ignore[no-untyped-def]
    from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle

    backend = getattr(oracle.Fp8MoeBackend, name)
    module, config = _module(name, layer), _config(layer)
    module.weight_block_size = [128, 128]
    module.moe_config = config
    w13, w2 = weights.w13.clone(), weights.w2.clone()
    s13, s2 = weights.w13_scale.clone(), weights.w2_scale.clone()
    if name == "HUMMING":
        _parameters(
            module, w13_weight=w13, w2_weight=w2,
            w13_weight_scale_inv=s13, w2_weight_scale_inv=s2,
        )  # fmt: skip
    w13, w2, s13, s2 = oracle.convert_to_fp8_moe_kernel_format(
        backend, module, w13, w2, s13, s2, None, None
    )
    quant = oracle.make_fp8_moe_quant_config(
        backend, s13, s2, None, None, block_shape=[128, 128], swiglu_limit=None, layer=module
    )
    for cls in oracle.backend_to_kernel_cls(backend):
        if "Batched" not in cls.__name__:
            kernel = oracle.make_fp8_moe_kernel(quant, config, cls, backend)
            yield _label(name, cls), _call(layer, kernel, w13, w2)


def _nvfp4(name: str, layer: LayerConfig, weights: Nvfp4Weights):  # type: ignore[no-untyped-def]
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle

    backend = getattr(oracle.NvFp4MoeBackend, name)
    module, config = _module(name, layer), _config(layer)
    module.moe_config = config
    w13, w2 = weights.w13.clone(), weights.w2.clone()
    s13, s2 = weights.w13_scale.clone(), weights.w2_scale.clone()
    # vLLM takes one global scale for gate and up.
    g13, g2 = weights.w13_global_scale[:, 0].clone(), weights.w2_global_scale[:, 0].clone()
    if name == "HUMMING":
        _parameters(
            module, w13_weight=w13, w2_weight=w2, w13_weight_scale=s13, w2_weight_scale=s2,
            w13_weight_scale_2=g13, w2_weight_scale_2=g2,
        )  # fmt: skip
    a = torch.full_like(g13, 1e-2)
    w13, s13, g13, a13, w2, s2, g2, a2 = oracle.convert_to_nvfp4_moe_kernel_format(
        backend, module, w13, s13, g13, a, w2, s2, g2, a.clone(), True
    )
    quant = oracle.make_nvfp4_moe_quant_config(backend, s13, s2, g13, g2, a13, a2, layer=module)
    for cls in oracle.backend_to_kernel_cls(backend):
        if "Batched" not in cls.__name__:
            kernel = oracle.make_nvfp4_moe_kernel(quant, config, cls, backend)
            yield _label(name, cls), _call(layer, kernel, w13, w2)


def _label(name: str, cls: type) -> str:
    if name != "HUMMING":
        return f"vllm-{name.lower()}"
    return "vllm-humming-" + ("indexed" if "Indexed" in cls.__name__ else "grouped")


def _call(layer: LayerConfig, kernel, w13: torch.Tensor, w2: torch.Tensor) -> Experts:  # type: ignore[no-untyped-def]
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    def call(x, topk_weights, topk_ids, expert_map):  # type: ignore[no-untyped-def]
        return kernel.apply(
            hidden_states=x, w1=w13, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids,
            activation=MoEActivation.SILU, global_num_experts=layer.num_experts,
            expert_map=expert_map, apply_router_weight_on_input=False,
        )  # fmt: skip

    return call


def _config(layer: LayerConfig):  # type: ignore[no-untyped-def]
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return config.FusedMoEConfig(
        num_experts=layer.num_experts,
        experts_per_token=layer.top_k,
        hidden_dim=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_local_experts=layer.num_local_experts,
        num_logical_experts=layer.num_experts,
        activation=MoEActivation.SILU,
        device="cuda",
        routing_method=config.RoutingMethodType.Renormalize,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        max_num_tokens=16384,
    )


def _module(name: str, layer: LayerConfig) -> torch.nn.Module:
    """What the oracles read of a layer. Humming wants vLLM's own class."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    if name == "HUMMING":
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        class Module(RoutedExperts):
            def __setattr__(self, key, value):  # type: ignore[no-untyped-def]
                try:
                    super().__setattr__(key, value)
                except Exception:  # read-only properties of the parent
                    object.__setattr__(self, key, value)

        module = Module.__new__(Module)
        torch.nn.Module.__init__(module)
        module.layer_name = "model.layers.3.moe.experts"
    else:
        module = torch.nn.Module()
    module.num_experts = module.local_num_experts = layer.num_local_experts
    module.hidden_size = layer.hidden_size
    module.intermediate_size_per_partition = layer.intermediate_size
    module.params_dtype = module.orig_dtype = torch.bfloat16
    module.activation = MoEActivation.SILU
    return module


def _parameters(module: torch.nn.Module, **tensors: torch.Tensor) -> None:
    for name, value in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
