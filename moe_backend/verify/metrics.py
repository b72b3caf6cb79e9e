"""How far an output is from its reference.

Cosine similarity is not among the metrics: it ignores scale, and a 13 times too small scale of
NVFP4 activations keeps it at 0.996.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Difference:
    """Metrics of an output against its reference.

    Attributes:
        finite: no NaN or infinity in the output.
        rel_l2: `|out - ref| / |ref|`; 0 when both are zero.
        norm_ratio: `|out| / |ref|`.
        equal: every element is the same number.
    """

    finite: bool
    rel_l2: float
    norm_ratio: float
    equal: bool

    def within(self, rel_l2: float, norm: float = 1e-2) -> bool:
        """Finite, relative error at most `rel_l2`, norm within `norm` of the reference's."""
        return self.finite and self.rel_l2 <= rel_l2 and abs(self.norm_ratio - 1) <= norm


def difference(out: torch.Tensor, reference: torch.Tensor) -> Difference:
    """Compare two tensors of one shape in float64.

    Raises:
        ValueError: the shapes differ.
    """
    if out.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(out.shape)} and {tuple(reference.shape)}")
    o, r = out.detach().cpu().double(), reference.detach().cpu().double()
    error, norm = (o - r).norm().item(), r.norm().item()
    if norm == 0:
        zero = bool((o == 0).all())
        return Difference(bool(o.isfinite().all()), 0.0 if zero else float("inf"), 1.0, zero)
    return Difference(
        finite=bool(o.isfinite().all()),
        rel_l2=error / norm,
        norm_ratio=o.norm().item() / norm,
        equal=bool((o == r).all()),
    )
