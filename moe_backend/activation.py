"""Gated activations of the experts: one definition each, in fp32.

Every kernel and every test of this package takes its activation from here. `gate` and `up` are
the two halves of `x @ w13.T`; the result multiplies `w2`.

Sources: SwigluStep and its limit 7.0: vLLM `model_executor/layers/activation.py` and
`model_executor/models/step3p5.py`. Clamped SiLU with limit 10: vLLM `models/deepseek_v4`.
SwigluOAI (gate and up as halves, not interleaved) with alpha 1.702, beta 1, limit 7: vLLM
`models/minimax_m3`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch


class ActivationKind(StrEnum):
    """The gated activations that every kernel of this package must know."""

    SILU = "silu"
    SWIGLUSTEP = "swiglustep"
    CLAMPED_SILU = "clamped_silu"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"


SWIGLUSTEP_LIMIT = 7.0
SWIGLUOAI_LIMIT = 7.0
SWIGLUOAI_ALPHA = 1.702
SWIGLUOAI_BETA = 1.0


@dataclass(frozen=True)
class Activation:
    """An activation with its constants; hashable, so that it can select a kernel.

    Attributes:
        kind: which formula.
        limit: the clamp, in units of the pre-activation; None only for `silu`.
        alpha, beta: constants of `swigluoai_uninterleave`; unused elsewhere.
    """

    kind: ActivationKind
    limit: float | None = None
    alpha: float = SWIGLUOAI_ALPHA
    beta: float = SWIGLUOAI_BETA

    def __post_init__(self) -> None:
        # A checkpoint's config may have whole numbers, which kernels would not take for floats.
        for name in ("limit", "alpha", "beta"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))
        if self.kind is ActivationKind.SILU:
            if self.limit is not None:
                raise ValueError(
                    f"activation silu takes no limit, got {self.limit}; use clamped_silu"
                )
        elif self.limit is None or not self.limit > 0:
            raise ValueError(f"activation {self.kind} needs a positive limit, got {self.limit}")

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        limit: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> Activation:
        """Build from an engine's activation name and the constants that the layer carries.

        A `silu` layer with a limit is DeepSeek-V4's clamped SiLU. Constants that the layer does
        not give take the values of the model family that introduced the activation.

        Raises:
            ValueError: the name is not one of `ActivationKind`, or the limit is not positive.
        """
        try:
            kind = ActivationKind(name)
        except ValueError:
            accepted = ", ".join(ActivationKind)
            raise ValueError(
                f"activation {name!r} is not supported by moe_backend; accepted: {accepted}. "
                "Serve this model with another --moe-backend."
            ) from None
        if kind is ActivationKind.SILU and limit is not None:
            kind = ActivationKind.CLAMPED_SILU
        if kind is ActivationKind.SWIGLUSTEP and limit is None:
            limit = SWIGLUSTEP_LIMIT
        if kind is ActivationKind.SWIGLUOAI_UNINTERLEAVE:
            return cls(
                kind,
                SWIGLUOAI_LIMIT if limit is None else limit,
                SWIGLUOAI_ALPHA if alpha is None else alpha,
                SWIGLUOAI_BETA if beta is None else beta,
            )
        return cls(kind, limit)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply to two tensors of one shape and any float dtype; the result is float32."""
        g, u = gate.float(), up.float()
        if self.kind is ActivationKind.SILU:
            return torch.nn.functional.silu(g) * u
        assert self.limit is not None
        if self.kind is ActivationKind.SWIGLUSTEP:
            return torch.nn.functional.silu(g).clamp(max=self.limit) * u.clamp(
                -self.limit, self.limit
            )
        g, u = g.clamp(max=self.limit), u.clamp(-self.limit, self.limit)
        if self.kind is ActivationKind.CLAMPED_SILU:
            return torch.nn.functional.silu(g) * u
        return g * torch.sigmoid(self.alpha * g) * (u + self.beta)

    def __str__(self) -> str:
        if self.kind is ActivationKind.SILU:
            return "silu"
        if self.kind is ActivationKind.SWIGLUOAI_UNINTERLEAVE:
            return f"{self.kind}(limit={self.limit}, alpha={self.alpha}, beta={self.beta})"
        return f"{self.kind}(limit={self.limit})"
