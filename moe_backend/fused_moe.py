"""The experts of one layer: pick a kernel, prepare the weights once, apply per step.

Engine-neutral: an engine hands in canonical weights and a `LayerConfig`, and calls the result with
hidden states and routing. Under torch.compile the call is one opaque op whose arguments are all
the tensors that it reads, so a compiled graph always sees the layer's present weights.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from moe_backend.formats import Bf16Weights, Weights
from moe_backend.formats.fp8_block import by
from moe_backend.kernels.registry import Kernel, LayerConfig, Selection, kernel_named, select
from moe_backend.kernels.warmup import Report, warm_up


class FusedMoE:
    """The prepared experts of one layer on one rank."""

    def __init__(
        self,
        layer: LayerConfig,
        weights: Weights,
        *,
        kernel: str | None = None,
        where: str = "",
        origin: str = "",
    ) -> None:
        """Validate, select and prepare.

        Args:
            layer: static facts of the layer.
            weights: canonical weights; the tensors may be kept, not copied.
            kernel: name of the kernel to use; None lets the registry choose.
            where: the layer's name, a prefix for error messages.
            origin: how the weights came to this format, for the log (`nvfp4_paths.Prepared`).

        Raises:
            ValueError: a tensor is malformed, or no kernel runs this layer.
        """
        weights.validate(where)
        _check_sizes(layer, weights, where)
        self.layer = layer
        self.origin = origin
        with _on(weights.w13.device):
            try:
                self.selection: Selection = select(layer, kernel)
            except ValueError as error:
                raise ValueError(f"{where.rstrip('.') or 'layer'}: {error}") from None
            self.tensors = self.selection.kernel.prepare(weights)
        self.plan = json.dumps(
            {"kernel": self.selection.kernel.name, "layer": layer.to_dict()}, sort_keys=True
        )

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
        *,
        tensors: list[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Weighted sum of the experts' outputs.

        Args:
            x: `[T, H]` hidden states.
            topk_weights: `[T, top_k]` float32, renormalised and scaled.
            topk_ids: `[T, top_k]` int32 global ids, -1 allowed.
            expert_map: `[num_experts]` int32 global id to local slot or -1; None without EP.
            tensors: the prepared weights, where an engine keeps them (`hand_over`).
        Returns:
            `[T, H]` in `x.dtype`.

        Raises:
            ValueError: sizes or dtype are not those of the layer's configuration.
        """
        return torch.ops.moe_backend.fused_experts(
            x,
            topk_weights,
            topk_ids,
            expert_map,
            self.tensors if tensors is None else tensors,
            self.plan,
        )

    def warm_up(
        self, max_tokens: int, *, tensors: list[torch.Tensor | None] | None = None
    ) -> Report | None:
        """Compile what calls with 1 to `max_tokens` tokens need (`kernels.warmup.warm_up`)."""
        given = self.tensors if tensors is None else tensors
        w13 = given[0]
        assert w13 is not None
        with _on(w13.device):
            return warm_up(self.selection.kernel, self.layer, given, max_tokens)

    def hand_over(self) -> list[torch.Tensor | None]:
        """Give the prepared weights to an engine that keeps them as its layer's parameters.

        From then on each call names them: reload and expert rebalancing change what they are.
        """
        tensors, self.tensors = self.tensors, []
        return tensors

    def describe(self) -> str:
        """Format, layout, kernel and the reason, for the log; the same for equal layers."""
        layer = self.layer
        blocks = dict.fromkeys(by(b) for b in (layer.w13_block, layer.w2_block) if b is not None)
        block = f" {' and '.join(blocks)}" if blocks else ""
        kernel = self.selection.kernel
        groups = [kernel.activation_groups(layer, 2**n) for n in range(21)]
        activations = kernel.activations if None in groups else ""
        if quantised := [g for g in groups if g is not None]:
            hidden = dict.fromkeys(f"1x{columns}" for _, columns in quantised)  # as tokens grow
            activations += " with few tokens, else " if activations else ""
            activations += f"fp8 1x{quantised[0][0]}, hidden {' to '.join(hidden)}"
        experts = f"{layer.num_local_experts}/{layer.num_experts} experts"
        return (
            f"format={layer.format}{block} layout={experts}, top-{layer.top_k}, "
            f"hidden {layer.hidden_size}, intermediate {layer.intermediate_size} "
            f"activation={layer.activation} kernel={self.selection.kernel.name} "
            f"activations={activations} ({self.selection.reason})"
            + (f" {self.origin}" if self.origin else "")
        )


def _check_sizes(layer: LayerConfig, weights: Weights, where: str) -> None:
    """The tensors must have the sizes that the engine's configuration promises."""
    for label, found, expected in (
        ("experts", weights.num_experts, layer.num_local_experts),
        ("hidden size", weights.hidden_size, layer.hidden_size),
        ("intermediate size", weights.intermediate_size, layer.intermediate_size),
    ):
        if found != expected:
            raise ValueError(
                f"{where}w13_weight has {label} {found}, the model's configuration says "
                f"{expected}. Check that config.json belongs to this checkpoint."
            )
    # Device code reads bits as what the layer's dtype says.
    if weights.name == Bf16Weights.name and weights.w13.dtype != layer.torch_dtype:
        raise ValueError(
            f"{where}w13_weight is {weights.w13.dtype}, activations are {layer.torch_dtype}: both "
            "must be the same. Convert the weights, or serve with their dtype (vLLM: --dtype)."
        )


def _check_call(
    layer: LayerConfig, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> None:
    """A call must be what the layer was prepared for; no look at the numbers."""
    slots = (len(x), layer.top_k)
    for name, found, expected in (
        ("x", (x.dtype, *x.shape), (layer.torch_dtype, len(x), layer.hidden_size)),
        ("topk_weights", (*topk_weights.shape,), slots),
        ("topk_ids", (*topk_ids.shape,), slots),
    ):
        if found != expected:
            raise ValueError(
                f"{name} is {_words(found)}, the layer was prepared for {_words(expected)}"
            )


def _words(of: tuple[object, ...]) -> str:
    return " x ".join(str(part) for part in of)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """The device of the tensors as the current one: launches go there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=1024)
def _decode_plan(plan: str) -> tuple[Kernel, LayerConfig]:
    data = json.loads(plan)
    return kernel_named(data["kernel"]), LayerConfig.from_dict(data["layer"])


@torch.library.custom_op("moe_backend::fused_experts", mutates_args=())
def _fused_experts_op(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    tensors: list[torch.Tensor | None],
    plan: str,
) -> torch.Tensor:
    kernel, layer = _decode_plan(plan)
    _check_call(layer, x, topk_weights, topk_ids)
    with _on(x.device):
        return kernel.apply(layer, tensors, x, topk_weights, topk_ids, expert_map)


@_fused_experts_op.register_fake
def _(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    tensors: list[torch.Tensor | None],
    plan: str,
) -> torch.Tensor:
    return x.new_empty(x.shape)  # contiguous, as what the kernels return
