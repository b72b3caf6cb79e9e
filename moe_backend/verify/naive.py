"""The experts once more, one token and one expert at a time in float64.

Written to share nothing with the kernels but the activation: codes are decoded from their bits by
the formats' definitions, routing is a Python loop. Slow; for small problems only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_backend.activation import Activation
from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights


def e4m3fn_value(byte: int) -> float:
    """OCP E4M3: bias 7, no infinity, NaN at 0x7F and 0xFF."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e4m3fnuz_value(byte: int) -> float:
    """E4M3 FNUZ (gfx942): bias 8, one NaN at 0x80, no negative zero."""
    if byte == 0x80:
        return float("nan")
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-10
    return sign * (8 + mantissa) * 2.0 ** (exponent - 11)


def e2m1_value(code: int) -> float:
    """E2M1: sign, two exponent bits with bias 1, one mantissa bit."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2))


def _table(value: object, size: int) -> torch.Tensor:
    return torch.tensor([value(i) for i in range(size)], dtype=torch.float64)  # type: ignore[operator]


def _fp8(codes: torch.Tensor) -> torch.Tensor:
    fnuz = codes.dtype == torch.float8_e4m3fnuz
    return _table(e4m3fnuz_value if fnuz else e4m3fn_value, 256)[codes.view(torch.uint8).long()]


def _blocks(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    n, k = codes.shape
    row = torch.arange(n) // block[0]
    column = torch.arange(k) // block[1]
    return _fp8(codes) * scale.double()[row][:, column]


def _nvfp4(packed: torch.Tensor, scale: torch.Tensor, global_scale: float) -> torch.Tensor:
    table = _table(e2m1_value, 16)
    values = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=torch.float64)
    values[:, 0::2] = table[(packed & 15).long()]
    values[:, 1::2] = table[(packed >> 4).long()]
    return values * _fp8(scale)[:, torch.arange(values.shape[1]) // 16] * global_scale


def expert_matrices(weights: Weights, e: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(gate [I, H], up [I, H], down [H, I])` of expert `e` in float64."""
    i = weights.intermediate_size
    if isinstance(weights, Bf16Weights):
        w13, w2 = weights.w13[e].double(), weights.w2[e].double()
        return w13[:i], w13[i:], w2
    if isinstance(weights, Fp8BlockWeights):
        rows = weights.w13_scale.shape[1] // 2
        return (
            _blocks(weights.w13[e, :i], weights.w13_scale[e, :rows], weights.w13_block),
            _blocks(weights.w13[e, i:], weights.w13_scale[e, rows:], weights.w13_block),
            _blocks(weights.w2[e], weights.w2_scale[e], weights.w2_block),
        )
    assert isinstance(weights, Nvfp4Weights)
    gate_scale, up_scale = weights.w13_global_scale[e].tolist()
    return (
        _nvfp4(weights.w13[e, :i], weights.w13_scale[e, :i], gate_scale),
        _nvfp4(weights.w13[e, i:], weights.w13_scale[e, i:], up_scale),
        _nvfp4(weights.w2[e], weights.w2_scale[e], weights.w2_global_scale[e].item()),
    )


@dataclass(frozen=True)
class Nvfp4Quantiser:
    """Quantises a row to NVFP4 and back, by search in the tables of both formats.

    Divisions are in fp32, as in every implementation: bf16 activations meet ties often, and a tie
    that fp32 rounds to is one in float64 only almost.

    Attributes:
        global_scale: decode direction.
    """

    global_scale: float

    def __call__(self, row: torch.Tensor) -> torch.Tensor:
        blocks = row.float().view(-1, 16)
        amax = blocks.abs().amax(1, keepdim=True)
        scale = _nearest(amax / 6 / self.global_scale, _table(e4m3fn_value, 127)).float()
        scale = torch.where(scale == 0, 2.0**-9, scale)  # never flushed to zero
        scale = torch.where(amax > 0, scale, 1.0)
        magnitude = _nearest(blocks.abs() / (scale * self.global_scale), _table(e2m1_value, 8))
        return (magnitude * blocks.sign() * scale.double() * self.global_scale).view(-1)


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entry of an ascending table nearest to each value; at a tie, the one of even index."""
    distance = (values[..., None] - table).abs()
    tied = distance == distance.amin(-1, keepdim=True)
    index = torch.arange(len(table)).expand_as(tied)
    preferred = torch.where(tied, index % 2 * len(table) + index, 2 * len(table))
    return table[preferred.argmin(-1)]


def naive_experts(
    x: torch.Tensor,
    weights: Weights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    expert_map: torch.Tensor | None = None,
    activation_quant: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Float64 `[T, H]`; arguments as in `kernels.reference.fused_experts`, on the CPU.

    Args:
        activation_quant: replaces a row before w13 (second argument 1) and before w2 (2).
    """
    out = torch.zeros(x.shape, dtype=torch.float64)
    matrices: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for t in range(x.shape[0]):
        for k in range(topk_ids.shape[1]):
            e = int(topk_ids[t, k])
            if e >= 0 and expert_map is not None:
                e = int(expert_map[e])
            if e < 0:
                continue
            if e not in matrices:
                matrices[e] = expert_matrices(weights, e)
            gate, up, down = matrices[e]
            xt = x[t].double()
            if activation_quant is not None:
                xt = activation_quant(xt, 1)
            hidden = activation(gate @ xt, up @ xt).double()
            if activation_quant is not None:
                hidden = activation_quant(hidden, 2)
            out[t] += topk_weights[t, k].double() * (down @ hidden)
    return out
