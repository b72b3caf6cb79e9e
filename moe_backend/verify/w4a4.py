"""The NVFP4 W4A4 pipeline in torch, around a model of how a grouped GEMM indexes its inputs.

Route, quantise, assemble scales, GEMM, activation, quantise, assemble, GEMM, sum. The GEMM model
reads what the hardware path reads and where it reads it: codes at token offsets, activation scales
at offsets padded to 128 rows, weight scales in 128x4 blocks of each expert, all of physical K. It
is how the assembly is checked where no Blackwell GPU is, and what the controls break.

Source of the indexing: CUTLASS CuTe DSL `torch_scaled_grouped_mm.py` (2Dx3D) and vLLM's
`cutlass_fp4_moe_mm` agree on it but for the convention of the offsets (`layout/offsets.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from moe_backend.activation import Activation
from moe_backend.formats import Nvfp4Weights, nvfp4
from moe_backend.formats.nvfp4_activations import ActivationScale, QuantizedActivations
from moe_backend.layout.blocked_scales import (
    BLOCK_ROWS,
    BlockedScales,
    offset,
    padded_columns,
)
from moe_backend.layout.offsets import EndOffsets
from moe_backend.layout.routing import plan_routing
from moe_backend.layout.scale_assembly import assemble_scales
from moe_backend.verify.naive import Nvfp4Quantiser, expert_matrices, naive_experts
from moe_backend.verify.problems import Case, Problem, build

NAN_BYTE = 0x7F


def grouped_gemm(
    packed: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: BlockedScales,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """Sums of `[slots, K] x [E, N, K]` without global scales, as the device kernel indexes them.

    Args:
        packed: `[slots, K/2]` uint8, slots grouped by expert.
        scales: flat buffer of activation scales; may hold anything where no slot is.
        weight: `[E, N, K/2]` uint8.
        weight_scales: `[E, N, K/16]` in 128x4 blocks.
        offsets: `[E]`, read as END offsets whatever it is.
    Returns:
        `[slots, N]` float32; rows of no expert are NaN, as memory that nothing wrote.
    """
    slots, columns = len(packed), weight_scales.columns
    n = weight.shape[1]
    physical = padded_columns(columns)
    out = torch.full((slots, n), torch.nan)
    column = torch.arange(physical)[None]

    def values(codes: torch.Tensor, block_scales: torch.Tensor) -> torch.Tensor:
        # K is padded with zero codes; a scale there still takes part, and 0 * NaN is NaN.
        padded = torch.nn.functional.pad(nvfp4.unpack(codes), (0, 16 * (physical - columns)))
        decoded = torch.tensor(_E2M1)[padded.long()]
        return decoded * block_scales.float().repeat_interleave(nvfp4.GROUP, -1)

    start = scale_row = 0
    for e, end in enumerate(offsets.tolist()):
        count = end - start
        if count > 0:
            row = torch.arange(scale_row, scale_row + count)[:, None]
            a = values(packed[start:end], _at(scales, offset(row, column, columns)))
            row = torch.arange(n)[:, None]
            w = values(weight[e], _at(weight_scales.data[e], offset(row, column, columns)))
            out[start:end] = a @ w.T
            scale_row += -(-count // BLOCK_ROWS) * BLOCK_ROWS
        start = end
    return out


_E2M1 = (*nvfp4.E2M1_VALUES, *(-v for v in nvfp4.E2M1_VALUES))


def _at(buffer: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Elements of a flat buffer; NaN beyond its end, where the device would read a neighbour."""
    byte = torch.nn.functional.pad(buffer.view(torch.uint8), (0, 1), value=NAN_BYTE)
    return byte[index.clamp(max=len(buffer))].view(buffer.dtype)


def _assemble(scales: torch.Tensor, offsets: EndOffsets) -> torch.Tensor:
    return assemble_scales(scales, offsets).data


def _end_offsets(offsets: EndOffsets) -> torch.Tensor:
    return offsets.tensor


def _factor(rows: QuantizedActivations, weight_global_scale: torch.Tensor) -> torch.Tensor:
    return rows.factor(weight_global_scale)


@dataclass(frozen=True)
class Steps:
    """The steps that a control replaces.

    Attributes:
        assemble: scales of the sorted slots and their offsets to the flat buffer.
        offsets: what is handed to the GEMM as its END offsets.
        factor: epilogue factor from the rows' global scale and the weight's.
        weight_scales: linear weight scales `[E, N, K/16]` to blocks.
    """

    assemble: Callable[[torch.Tensor, EndOffsets], torch.Tensor] = _assemble
    offsets: Callable[[EndOffsets], torch.Tensor] = _end_offsets
    factor: Callable[[QuantizedActivations, torch.Tensor], torch.Tensor] = _factor
    weight_scales: Callable[[torch.Tensor], BlockedScales] = field(default=BlockedScales.of)


def w4a4_experts(
    problem: Problem,
    scales: tuple[ActivationScale, ActivationScale],
    steps: Steps | None = None,
) -> torch.Tensor:
    """The experts with NVFP4 activations, `[T, H]` float32.

    Args:
        problem: in format nvfp4.
        scales: global scales of the inputs of w13 and of w2.
    """
    steps = steps or Steps()
    w = problem.weights
    assert isinstance(w, Nvfp4Weights)
    top_k = problem.topk_ids.shape[1]
    plan = plan_routing(problem.topk_ids, w.num_experts, problem.expert_map)
    offsets = EndOffsets(plan.expert_offsets)
    kept = int(plan.expert_offsets[-1])
    expert = torch.searchsorted(plan.expert_offsets.long(), torch.arange(kept), right=True)
    token = plan.slots // top_k

    def gemm(
        rows: torch.Tensor, scale: ActivationScale, weight: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, QuantizedActivations]:
        quantised = scale.quantize(rows)
        sums = grouped_gemm(
            quantised.packed,
            steps.assemble(quantised.scale, offsets),
            weight,
            steps.weight_scales(blocks),
            steps.offsets(offsets),
        )
        return sums[:kept], quantised

    sums, rows = gemm(problem.x[token].float(), scales[0], w.w13, w.w13_scale)
    gate, up = sums.chunk(2, dim=1)
    factor = steps.factor(rows, w.w13_global_scale[expert])
    hidden = problem.case.activation(gate * factor[:, :1], up * factor[:, 1:])
    full = torch.zeros(len(token), hidden.shape[1])
    full[:kept] = hidden
    sums, rows = gemm(full, scales[1], w.w2, w.w2_scale)
    result = sums * steps.factor(rows, w.w2_global_scale[expert])
    weight = problem.topk_weights.float().flatten()[plan.slots[:kept], None]
    return torch.zeros(problem.x.shape).index_add_(0, token[:kept], result * weight)


# --- Problems with a known answer -----------------------------------------------------------------

# K / 16 is 11 and 10: padding columns on both sides. More experts than slots: some are empty.
CASE = Case(
    "nvfp4",
    Activation.from_name("silu"),
    tokens=24,
    num_experts=32,
    hidden_size=176,
    intermediate_size=160,
)


def w4a4_cases() -> tuple[Case, ...]:
    """The case of the controls, and what breaks kernels around it."""
    silu, step = (Activation.from_name(name) for name in ("silu", "swiglustep"))
    return (
        CASE,
        replace(CASE, activation=step, hidden_size=128, intermediate_size=64),
        replace(CASE, layout="ep"),
        replace(CASE, activation=silu, layout="dropped", tokens=200, num_experts=4),
        replace(CASE, tokens=1),
    )


@lru_cache(maxsize=8)
def quantised_problem(case: Case = CASE) -> Problem:
    """`build(case)` with tokens of very different size, calibrated, and the W4A4 answer.

    Its weights hold the MAX of the experts' input scales, and its reference is float64 with
    activations quantised by the definitions (`naive.Nvfp4Quantiser`).
    """
    problem = build(case)
    loud = torch.exp2(torch.arange(case.tokens) % 9)[:, None]
    problem = calibrated(replace(problem, x=(problem.x * loud).bfloat16()))
    scales = activation_scales(problem)
    quantisers = [Nvfp4Quantiser(s.static.item()) for s in scales if s.static is not None]
    reference = naive_experts(
        problem.x,
        problem.weights,
        problem.topk_weights,
        problem.topk_ids,
        case.activation,
        problem.expert_map,
        activation_quant=lambda row, which: quantisers[which - 1](row),
    )
    return replace(problem, reference=reference)


def calibrated(problem: Problem) -> Problem:
    """The problem with the MAX of its experts' input scales in its weights."""
    w13, w2 = calibrate(problem)
    assert isinstance(problem.weights, Nvfp4Weights)
    weights = replace(
        problem.weights, w13_input_scale=w13.amax()[None], w2_input_scale=w2.amax()[None]
    )
    return replace(problem, weights=weights)


def activation_scales(problem: Problem) -> tuple[ActivationScale, ActivationScale]:
    """Global scales of the inputs of w13 and w2, as the checkpoint's contract has them."""
    w = problem.weights
    assert isinstance(w, Nvfp4Weights)
    return (
        ActivationScale.from_checkpoint(w.w13_input_scale),
        ActivationScale.from_checkpoint(w.w2_input_scale),
    )


def calibrate(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """`[E]` input scales of w13 and of w2: what modelopt would store for each expert.

    An expert without tokens gets the smallest of the others'.
    """
    w = problem.weights
    amax = torch.zeros(2, w.num_experts)
    ids = problem.topk_ids
    if problem.expert_map is not None:
        ids = torch.where(ids >= 0, problem.expert_map[ids.clamp(min=0).long()], -1)
    for e in range(w.num_experts):
        x = problem.x[(ids == e).any(1)].double()
        if len(x):
            gate, up, _ = expert_matrices(w, e)
            hidden = problem.case.activation(x @ gate.T, x @ up.T)
            amax[0, e], amax[1, e] = x.abs().amax(), hidden.abs().amax()
    smallest = torch.where(amax > 0, amax, torch.inf).amin(1, keepdim=True)
    scale = torch.where(amax > 0, amax, smallest) / (nvfp4.E2M1_MAX * nvfp4.E4M3_MAX)
    return scale[0], scale[1]
