"""The host side of the Hopper kernels. Safe to capture in a CUDA graph.

FP8 weights meet FP8 activations (W8A8, per token and 128 columns, as the checkpoints are meant, and
hidden columns in groups of the method's own), with few tokens bf16 ones, as NVFP4 and bf16 weights
do always.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import by
from moe_backend.kernels.cuda import build
from moe_backend.kernels.hopper import few, flow, once, pairs, route, tiled
from moe_backend.kernels.hopper.choose import choose, ranges, tuned_rows
from moe_backend.kernels.hopper.codes import rearranged, rearranged_scales
from moe_backend.kernels.hopper.tiles import Choice, Few, Flow, Once, Pairs, Tiles
from moe_backend.kernels.registry import LayerConfig, in_rows
from moe_backend.kernels.triton.kernel import in_slices, slice_tokens
from moe_backend.kernels.variants import candidates

# Outputs before the sum over top-k: 2**29 in bf16 are a GiB, 16384 tokens of Step-3.5. What is
# beyond is computed in slices, which read the weights once each.
PARTIAL_ELEMENTS = 2**29
MAX_EXPERTS = 1024  # one program holds the schedule of all local experts in registers
RUN: dict[type, Callable[..., torch.Tensor]] = {
    Tiles: tiled.run, Few: few.run, Once: once.run, Flow: flow.run, Pairs: pairs.run,
}  # fmt: skip


class HopperKernel:
    """The methods of this folder behind the registry; `choose` says which one runs a call."""

    name = "hopper"
    graph_safe = True
    activations = "not quantised"

    def refusal(self, layer: LayerConfig) -> str | None:
        if layer.device != "cuda":
            return "it runs on NVIDIA GPUs only"
        if torch.version.hip or torch.cuda.get_device_capability()[0] != 9:
            return "it needs an NVIDIA Hopper GPU (compute capability 9.0)"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return shape_refusal(layer)

    def preference(self, layer: LayerConfig) -> str:
        rows = tuned_rows(layer)
        tuned = f", {rows} tuned rows" if rows else ""
        *some, (last, _) = ranges(layer)
        by_tokens = ", ".join(
            [*(f"{name} to {most:,} token{'s' if most > 1 else ''}" for name, most in some), last]
        )
        lacks = build.missing()
        without = f", without its CUDA C++ methods: {lacks}" if lacks else ""
        return f"fastest on Hopper of the kernels here; {by_tokens}{tuned}{without}"

    def activation_groups(self, layer: LayerConfig, tokens: int) -> tuple[int, int] | None:
        slice_of_call = min(tokens, slice_tokens(layer, PARTIAL_ELEMENTS))
        return choose(layer, slice_of_call).activation_groups(layer)

    def warmup_tokens(self, layer: LayerConfig, max_tokens: int) -> list[int]:
        most = min(max_tokens, slice_tokens(layer, PARTIAL_ELEMENTS))
        return candidates(
            layer, most, lambda tokens: (choose(layer, tokens), route.many(layer, tokens))
        )

    def prepare(self, weights: Weights) -> list[torch.Tensor | None]:
        once.make_room(weights.w13.device)
        tensors = in_rows(weights)
        if isinstance(weights, Nvfp4Weights):
            tensors[0], tensors[3] = rearranged(weights.w13), rearranged(weights.w2)
            tensors[1] = rearranged_scales(weights.w13_scale, gate_up=True)
            tensors[4] = rearranged_scales(weights.w2_scale, gate_up=False)
        return tensors

    def apply(
        self,
        layer: LayerConfig,
        tensors: list[torch.Tensor | None],
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        return in_slices(
            run, PARTIAL_ELEMENTS, layer, tensors, x, topk_weights, topk_ids, expert_map
        )


def shape_refusal(layer: LayerConfig) -> str | None:
    """What the tiles cannot take; rows must be multiples of 16 bytes for the memory accelerator."""
    if layer.dtype != "bfloat16":
        return f"it takes bf16 activations, not {layer.dtype}"
    if layer.num_local_experts > MAX_EXPERTS:
        return f"it takes up to {MAX_EXPERTS} local experts, not {layer.num_local_experts}"
    if layer.apply_router_weight_on_input and layer.top_k != 1:
        return "routing weights on the input need top_k 1"
    multiple = {Bf16Weights.name: 8, Fp8BlockWeights.name: 16, Nvfp4Weights.name: 32}[layer.format]
    for label, size in (("hidden", layer.hidden_size), ("intermediate", layer.intermediate_size)):
        if size % multiple:
            return f"the {label} size must be a multiple of {multiple}, not {size}"
    for block in (layer.w13_block, layer.w2_block):
        if block is not None and (block[1] < 32 or block[1].bit_count() != 1):
            return f"a block's columns must be a power of two from 32, not {by(block)}"
    return None


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    choice: Choice | None = None,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`.

    Args:
        tensors: of `HopperKernel.prepare`.
        choice: another method or other tiles than the table's.
    Raises:
        TypeError: NVFP4 weights in the checkpoint's order.
    """
    choice = choice or choose(layer, len(x))
    if layer.format == Nvfp4Weights.name:
        codes, scales = tensors[:2]
        if codes is None or codes.dtype != torch.int32 or scales is None or scales.ndim != 4:
            raise TypeError("NVFP4 weights in the checkpoint's order: `prepare` them first")
    # Kernels in CUDA C++ read whole numbers of these sizes.
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.int()
    if expert_map is not None:
        expert_map = expert_map.to(torch.int32).contiguous()
    return RUN[type(choice)](layer, tensors, x, topk_weights, topk_ids, expert_map, choice)
