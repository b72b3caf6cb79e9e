"""The other mixture-of-experts backends of an installed vLLM, built for one layer's weights.

Each comes through vLLM's own oracle, `fused_moe/oracle/{fp8,nvfp4,unquantized}.py` (read on 0.32.0
and 0.33.0, run on 0.33.0), so weights are laid out as vLLM would lay them out. Used by `bench/`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_backend.engines import vllm_triton_tuning
from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import Block
from moe_backend.kernels.registry import LayerConfig

Args = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
Experts = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]  # x, topk_weights, topk_ids, expert_map
Fit = Callable[[Args], tuple[Experts, str]]

NAMES = (
    "triton", "triton-tuned", "deepgemm", "marlin", "humming-indexed", "humming-grouped",
    "flashinfer-cutlass",
)  # fmt: skip
# What vLLM 0.33 offers on a Hopper GPU. FP8 in other blocks than 128x128 is Triton's alone.
OFFERED = {
    "fp8_block": NAMES,
    "refined": ("triton", "triton-tuned"),
    "nvfp4": ("marlin", "humming-indexed", "humming-grouped"),
    "bf16": ("triton", "triton-tuned", "flashinfer-cutlass"),
}


@dataclass(frozen=True)
class Rival:
    """A backend with the layer's weights in its own layout.

    Attributes:
        fit: makes the call to be timed with the given arguments; a tuned one chooses here.
            Returns it with a note on what was chosen, empty where nothing was.
    """

    name: str
    fit: Fit


@dataclass(frozen=True)
class Missing:
    """A backend that cannot be had here, and why."""

    name: str
    reason: str


def installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


@contextlib.contextmanager
def context() -> Iterator[None]:
    """What vLLM's layers expect around them; nothing where vLLM is not installed."""
    if not installed():
        yield
        return
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.workspace import init_workspace_manager

    init_workspace_manager(torch.device("cuda:0"))
    config = VllmConfig()
    with set_current_vllm_config(config), set_forward_context(None, config):
        yield


def offered(layer: LayerConfig) -> tuple[str, ...]:
    """Names of the backends that take a layer of this format."""
    refined = (layer.w13_block or (128, 128)) != (128, 128) or layer.w2_block != layer.w13_block
    return OFFERED["refined" if refined else layer.format]


def build(
    layer: LayerConfig,
    weights: Weights,
    wanted: Collection[str],
    milliseconds: Callable[[Experts, Args], float],
) -> Iterator[Rival | Missing]:
    """Each wanted backend that is offered, one at a time.

    The caller drops one before it asks for the next, so that one copy of the weights is held.

    Args:
        milliseconds: times a call, for the tuning.
    """
    names = [n for n in offered(layer) if n in wanted]
    groups = dict.fromkeys(n.partition("-")[0] for n in names)  # built together: humming-*
    for group in groups:
        mine = [n for n in names if n.partition("-")[0] == group]
        if group == "flashinfer" and (reason := _flashinfer_missing()) is not None:
            yield Missing(mine[0], reason)
            continue
        built: set[str] = set()
        try:
            for name, call in _calls(group.upper(), layer, weights):
                if name in mine:
                    built.add(name)
                    # FlashInfer's FP8 block-scale path picks by shape and has no tactics.
                    tune = group == "flashinfer" and isinstance(weights, Bf16Weights)
                    yield Rival(name, _autotuned(call) if tune else _as_is(call))
                if group == "triton" and "triton-tuned" in mine:
                    built.add("triton-tuned")
                    yield Rival("triton-tuned", _tuned(layer, call, milliseconds))
                del call
        except Exception as error:  # whatever vLLM raises, the other backends can be had
            text = " ".join(str(error).split()) or "no message"
            for name in mine:
                if name not in built:
                    yield Missing(name, f"{type(error).__name__}: {text}"[:300])


def _calls(group: str, layer: LayerConfig, weights: Weights) -> Iterator[tuple[str, Experts]]:
    if isinstance(weights, Fp8BlockWeights):
        return _fp8(group, layer, weights)
    if isinstance(weights, Nvfp4Weights):
        return _nvfp4(group, layer, weights)
    return _bf16(group, layer, weights)


def _as_is(call: Experts) -> Fit:
    return lambda args: (call, "")


def _tuned(
    layer: LayerConfig, call: Experts, milliseconds: Callable[[Experts, Args], float]
) -> Fit:
    def fit(args: Args) -> tuple[Experts, str]:
        slots = len(args[0]) * layer.top_k / layer.num_experts
        candidates = vllm_triton_tuning.candidates(layer.format, slots)
        config = vllm_triton_tuning.fastest(candidates, call, args, milliseconds)
        return vllm_triton_tuning.under(config, call), vllm_triton_tuning.describe(config)

    return fit


# --- FlashInfer -----------------------------------------------------------------------------------

FLASHINFER_MODULE = "fused_moe_90"


def _flashinfer_missing() -> str | None:
    """Why FlashInfer's CUTLASS experts cannot be had without compiling them for an hour."""
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed"
    from vllm.utils.flashinfer import has_flashinfer_cutlass_fused_moe

    if not has_flashinfer_cutlass_fused_moe():
        return "vLLM finds FlashInfer unusable: it needs nvcc and ninja, or flashinfer-cubin"
    from flashinfer.jit import env

    built_here = env.FLASHINFER_JIT_DIR / FLASHINFER_MODULE / f"{FLASHINFER_MODULE}.so"
    if not (env.get_aot_path(FLASHINFER_MODULE).exists() or built_here.exists()):
        return (
            f"FlashInfer's module {FLASHINFER_MODULE} is not compiled here; install "
            "flashinfer-jit-cache of FlashInfer's version (`vllm download-kernels`)"
        )
    return None


def _autotuned(call: Experts) -> Fit:
    """As vLLM's warm-up does before it serves."""

    def fit(args: Args) -> tuple[Experts, str]:
        from vllm.utils.flashinfer import autotune

        with autotune(True):
            call(*args)
        return call, ""

    return fit


# --- Formats --------------------------------------------------------------------------------------

BACKENDS = {"FLASHINFER": "FLASHINFER_CUTLASS"}  # where vLLM's name is not the group's


def _bf16(group: str, layer: LayerConfig, weights: Bf16Weights) -> Iterator[tuple[str, Experts]]:
    if group == "TRITON":
        yield "triton", _functional(layer, weights)
        return
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.oracle import unquantized as oracle

    backend = getattr(oracle.UnquantizedMoeBackend, BACKENDS.get(group, group))
    config = _config(layer, expert_parallel=True)
    w13, w2 = oracle.convert_to_unquantized_kernel_format(
        backend, config, weights.w13.clone(), weights.w2
    )
    for cls in oracle.backend_to_kernel_cls(backend):
        kernel = oracle.make_unquantized_moe_kernel(
            FUSED_MOE_UNQUANTIZED_CONFIG, config, backend, cls
        )
        yield _label(group, cls), _call(layer, kernel, w13, w2)


def _functional(layer: LayerConfig, weights: Bf16Weights) -> Experts:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def call(
        x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        out: torch.Tensor = fused_experts(
            x, weights.w13, weights.w2, topk_weights, topk_ids, activation=MoEActivation.SILU,
            global_num_experts=layer.num_experts, expert_map=expert_map,
        )  # fmt: skip
        return out

    return call


def _fp8(group: str, layer: LayerConfig, weights: Fp8BlockWeights) -> Iterator[tuple[str, Experts]]:
    from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle

    backend = getattr(oracle.Fp8MoeBackend, BACKENDS.get(group, group))
    module = _module(group, layer)
    module.moe_config = config = _config(layer, expert_parallel=group == "FLASHINFER")
    # vLLM refines both blocks to one square (`refine_fp8_moe_block_shape`).
    edge = min(*weights.w13_block, *weights.w2_block)
    block = (edge, edge)
    module.weight_block_size = list(block)
    w13, w2 = weights.w13.clone(), weights.w2.clone()
    s13 = _refined(weights.w13_scale, weights.w13_block, block, weights.w13)
    s2 = _refined(weights.w2_scale, weights.w2_block, block, weights.w2)
    if group == "HUMMING":
        _parameters(
            module, w13_weight=w13, w2_weight=w2,
            w13_weight_scale_inv=s13, w2_weight_scale_inv=s2,
        )  # fmt: skip
    w13, w2, s13, s2 = oracle.convert_to_fp8_moe_kernel_format(
        backend, module, w13, w2, s13, s2, None, None
    )
    quant = oracle.make_fp8_moe_quant_config(
        backend, s13, s2, None, None, block_shape=list(block), swiglu_limit=None, layer=module
    )
    for cls in oracle.backend_to_kernel_cls(backend):
        if "Batched" not in cls.__name__:
            kernel = oracle.make_fp8_moe_kernel(quant, config, cls, backend)
            yield _label(group, cls), _call(layer, kernel, w13, w2)


def _refined(scale: torch.Tensor, block: Block, finer: Block, codes: torch.Tensor) -> torch.Tensor:
    """A copy with each scale repeated over the finer blocks inside its own; gate and up alike."""
    spread = scale.repeat_interleave(block[0] // finer[0], 1)
    spread = spread.repeat_interleave(block[1] // finer[1], 2)
    expected = tuple(-(-size // edge) for size, edge in zip(codes.shape[1:], finer, strict=True))
    if spread.shape[1:] != expected:
        raise ValueError(f"scales {tuple(spread.shape[1:])} do not cover {tuple(codes.shape[1:])}")
    return spread.clone()


def _nvfp4(group: str, layer: LayerConfig, weights: Nvfp4Weights) -> Iterator[tuple[str, Experts]]:
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle

    backend = getattr(oracle.NvFp4MoeBackend, BACKENDS.get(group, group))
    module = _module(group, layer)
    module.moe_config = config = _config(layer)
    w13, w2 = weights.w13.clone(), weights.w2.clone()
    s13, s2 = weights.w13_scale.clone(), weights.w2_scale.clone()
    # vLLM takes one global scale for gate and up.
    g13, g2 = weights.w13_global_scale[:, 0].clone(), weights.w2_global_scale[:, 0].clone()
    if group == "HUMMING":
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
            yield _label(group, cls), _call(layer, kernel, w13, w2)


# --- vLLM's objects -------------------------------------------------------------------------------


def _label(group: str, cls: type) -> str:
    if group == "HUMMING":
        return "humming-" + ("indexed" if "Indexed" in cls.__name__ else "grouped")
    return BACKENDS.get(group, group).lower().replace("_", "-")


def _call(layer: LayerConfig, kernel: Any, w13: torch.Tensor, w2: torch.Tensor) -> Experts:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    def call(
        x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        out: torch.Tensor = kernel.apply(
            hidden_states=x, w1=w13, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids,
            activation=MoEActivation.SILU, global_num_experts=layer.num_experts,
            expert_map=expert_map, apply_router_weight_on_input=False,
        )  # fmt: skip
        return out

    return call


def _config(layer: LayerConfig, expert_parallel: bool = False) -> Any:
    """vLLM's description of the layer.

    Args:
        expert_parallel: tell it the number of ranks; FlashInfer drops other ranks' experts by that
            and not by the expert map.
    """
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    parallel = config.FusedMoEParallelConfig.make_no_parallel()
    if expert_parallel and layer.expert_parallel:
        ranks = layer.num_experts // layer.num_local_experts
        parallel = replace(parallel, ep_size=ranks, use_ep=True)
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
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        max_num_tokens=16384,
    )


def _module(group: str, layer: LayerConfig) -> Any:
    """What the oracles read of a layer. Humming wants vLLM's own class."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    module: Any
    if group == "HUMMING":
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        class Module(RoutedExperts):  # type: ignore[misc]
            def __setattr__(self, key: str, value: Any) -> None:
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
