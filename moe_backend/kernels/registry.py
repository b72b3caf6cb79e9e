"""Which kernel runs a layer, and why.

A kernel is an object with a name, a test (`refusal`), a one-time preparation of the weights and a
call. They are listed in order of preference; the first that does not refuse a layer runs it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from moe_backend import envs
from moe_backend.activation import Activation, ActivationKind
from moe_backend.formats import Weights
from moe_backend.formats.fp8_block import Block


@dataclass(frozen=True)
class LayerConfig:
    """What a kernel must know of a layer, engine-neutral and hashable.

    Attributes:
        format: name of the weight format, `bf16`, `fp8_block` or `nvfp4`.
        num_experts: experts of the model; num_local_experts: those held by this rank.
        top_k: experts per token.
        hidden_size, intermediate_size: of this rank's shard, in elements.
        activation: the gated activation with its constants.
        dtype: of the activations, such as `bfloat16`.
        device: torch device type, `cpu` or `cuda`.
        expert_parallel: whether an expert_map comes with each call.
        apply_router_weight_on_input: routing weights multiply the input (top-1 models).
        w13_block, w2_block: `(n, k)` that one scale covers in fp8_block, None elsewhere. They
            differ in tensor-parallel shards off the checkpoint's grid (32x128 and 128x32).
    """

    format: str
    num_experts: int
    num_local_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    dtype: str
    device: str
    expert_parallel: bool = False
    apply_router_weight_on_input: bool = False
    w13_block: Block | None = None
    w2_block: Block | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerConfig:
        activation = data["activation"]
        blocks = {name: data[name] and tuple(data[name]) for name in ("w13_block", "w2_block")}
        return cls(
            **{
                **data,
                "activation": Activation(
                    ActivationKind(activation["kind"]),
                    activation["limit"],
                    activation["alpha"],
                    activation["beta"],
                ),
                **blocks,
            }
        )


def in_rows(weights: Weights) -> list[torch.Tensor | None]:
    """The tensors with their rows one after another, as device code takes them to lie."""
    return [None if tensor is None else tensor.contiguous() for tensor in weights.tensors()]


class Kernel(Protocol):
    """One way to compute the experts.

    Attributes:
        name: what logs and flags call it.
        graph_safe: whether a call may be captured in a CUDA graph.
        activations: how it treats them where `activation_groups` is None, for the log.
    """

    name: str
    graph_safe: bool
    activations: str

    def refusal(self, layer: LayerConfig) -> str | None:
        """Why this kernel cannot run the layer, or None if it can."""

    def preference(self, layer: LayerConfig) -> str:
        """Why it is the right one where it does not refuse; a clause for the log."""

    def activation_groups(self, layer: LayerConfig, tokens: int) -> tuple[int, int] | None:
        """Columns that share an fp8 scale in the input of w13 and of w2; None: not quantised."""

    def warmup_tokens(self, layer: LayerConfig, max_tokens: int) -> list[int]:
        """Ascending token counts, whose calls between them compile all that any call with 1 to
        `max_tokens` tokens compiles at its first use; empty if nothing does. They may compile the
        same: `warm_up` leaves those out.
        """

    def prepare(self, weights: Weights) -> list[torch.Tensor | None]:
        """Turn canonical weights into the tensors that `apply` reads; once per load."""

    def apply(
        self,
        layer: LayerConfig,
        tensors: list[torch.Tensor | None],
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[T, H]` output of the experts, weighted and summed over top_k, in `x.dtype`."""


@dataclass(frozen=True)
class Selection:
    """A kernel, why it, and why not those before it: `not NAME: ...` each."""

    kernel: Kernel
    preference: str
    refusals: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """All of these, ready for the log."""
        return "; ".join((self.preference, *self.refusals))


def kernels() -> list[Kernel]:
    """All kernels, the preferred first."""
    from moe_backend.kernels.hopper.kernel import HopperKernel
    from moe_backend.kernels.nvfp4_native import Nvfp4NativeKernel
    from moe_backend.kernels.reference import ReferenceKernel
    from moe_backend.kernels.triton.kernel import TritonKernel
    from moe_backend.kernels.vllm_cpu import VllmCpuKernel

    # The reference refuses nothing: what follows it runs only when asked for by name.
    return [
        HopperKernel(),
        TritonKernel(),
        VllmCpuKernel(),
        ReferenceKernel(),
        Nvfp4NativeKernel(),
    ]


def kernel_named(name: str) -> Kernel:
    """Look a kernel up by name.

    Raises:
        ValueError: no kernel has that name.
    """
    for kernel in kernels():
        if kernel.name == name:
            return kernel
    accepted = ", ".join(k.name for k in kernels())
    raise ValueError(f"kernel {name!r} is unknown; accepted: {accepted}")


def select(layer: LayerConfig, requested: str | None = None) -> Selection:
    """The kernel for a layer: `requested`, else `MOE_BACKEND_KERNEL`, else the first that fits.

    Raises:
        ValueError: the requested kernel, or every kernel, refuses the layer; the message gives
            each refusal.
    """
    source = "requested"
    if requested is None and (requested := envs.KERNEL.get()) is not None:
        source = f"{envs.KERNEL.name} is set"
    if requested is not None:
        try:
            kernel = kernel_named(requested)
        except ValueError as error:
            raise ValueError(f"{error} ({source})") from None
        if (refusal := kernel.refusal(layer)) is not None:
            raise ValueError(f"kernel {requested!r} ({source}) cannot run this layer: {refusal}")
        return Selection(kernel, source)
    refusals: list[str] = []
    for kernel in kernels():
        refusal = kernel.refusal(layer)
        if refusal is None:
            return Selection(kernel, kernel.preference(layer), tuple(refusals))
        refusals.append(f"not {kernel.name}: {refusal}")
    raise ValueError(f"no kernel can run this layer ({'; '.join(refusals)}): {layer}")
