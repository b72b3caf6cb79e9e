"""Must-fail controls: variants that are wrong on purpose, each of which the checks must flag.

Every one was a bug in some released kernel, layout or loader. A check that passes a control is
itself broken. Those of NVFP4 activations are in `w4a4_controls.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_backend.activation import Activation
from moe_backend.formats import Fp8BlockWeights, Nvfp4Weights, fp8_block
from moe_backend.kernels.reference import fused_experts
from moe_backend.layout.routing import RoutingPlan, plan_routing
from moe_backend.verify.problems import Case, Problem, build

SILU = Activation.from_name("silu")
STEP = Activation.from_name("swiglustep")


def _run(p: Problem, **changes: object) -> torch.Tensor:
    """The reference kernel in fp32 with some of its inputs replaced."""
    given = {
        "x": p.x.float(),
        "weights": p.weights,
        "topk_weights": p.topk_weights,
        "topk_ids": p.topk_ids,
        "activation": p.case.activation,
        "expert_map": p.expert_map,
        **changes,
    }
    return fused_experts(**given)  # type: ignore[arg-type]


def _sound(p: Problem) -> torch.Tensor:
    return _run(p, x=p.x, compute_dtype=torch.bfloat16)


@dataclass(frozen=True)
class Control:
    """A broken variant.

    Attributes:
        name: what is wrong with it.
        case: the problem that it is given.
        run: returns the wrong output `[T, H]`.
        make: the case's tensors and the right answer.
        sound: the same without the fault.
    """

    name: str
    case: Case
    run: Callable[[Problem], torch.Tensor]
    make: Callable[[Case], Problem] = build
    sound: Callable[[Problem], torch.Tensor] = _sound

    def outcome(self, device: str = "cpu") -> tuple[torch.Tensor, Problem]:
        """The wrong output, computed on a device, and the problem whose check must flag it."""
        problem = self.make(self.case).to(device)
        with torch.device(device):  # what a control allocates
            return self.run(problem), problem


def _raw_codes(p: Problem) -> torch.Tensor:
    """Activations taken as fp8 codes without their scales, as a vendor's test did."""
    codes, _ = fp8_block.quantize_per_group(p.x)
    return _run(p, x=codes.float())


def _fp8(p: Problem) -> Fp8BlockWeights:
    assert isinstance(p.weights, Fp8BlockWeights)
    return p.weights


def _nvfp4(p: Problem) -> Nvfp4Weights:
    assert isinstance(p.weights, Nvfp4Weights)
    return p.weights


def _scale_slot_unwritten(p: Problem) -> torch.Tensor:
    scale = _fp8(p).w13_scale.clone()
    scale[int(p.topk_ids.max()), 0, 0] = 1.0
    return _run(p, weights=replace(_fp8(p), w13_scale=scale))


def _gate_scale_for_up(p: Problem) -> torch.Tensor:
    w = _nvfp4(p)
    return _run(p, weights=replace(w, w13_global_scale=w.w13_global_scale[:, :1].expand(-1, 2)))


def _scale_folded_into_e4m3(p: Problem) -> torch.Tensor:
    """Block scale times a (rescaled) global scale, rounded to e4m3 again."""
    w = _nvfp4(p)
    i = w.intermediate_size
    fold = (w.w13_global_scale / w.w13_global_scale.amax()).repeat_interleave(i, 1)[..., None]
    folded = (w.w13_scale.float() * fold).to(torch.float8_e4m3fn)
    top = w.w13_global_scale.amax().expand_as(w.w13_global_scale).contiguous()
    return _run(p, weights=replace(w, w13_scale=folded, w13_global_scale=top))


def _leading_zero(p: Problem) -> torch.Tensor:
    """START offsets handed to code that reads END offsets: every expert gets its neighbour's."""
    plan = plan_routing(p.topk_ids, p.weights.num_experts, p.expert_map)
    zero = plan.expert_offsets.new_zeros(1)
    return _run(p, plan=RoutingPlan(plan.slots, torch.cat((zero, plan.expert_offsets[:-1]))))


def _map_as_mask(p: Problem) -> torch.Tensor:
    """A 0/1 mask where an expert map is expected: local experts all become slot 1."""
    assert p.expert_map is not None
    return _run(p, expert_map=(p.expert_map >= 0).int())


def _expert_dropped(p: Problem) -> torch.Tensor:
    assert p.expert_map is not None
    expert_map = p.expert_map.clone()
    expert_map[expert_map == 0] = -1
    return _run(p, expert_map=expert_map)


def _block_scales_of_whole_blocks(p: Problem) -> torch.Tensor:
    """Even tensor-parallel halves of the weights with scale rows split by whole blocks.

    The layout of aiter pull request 3548: rank 1 of 2 owns rows 192 to 383 of 384, which lie in
    blocks 1 and 2, and is given scale block 2 and a zero.
    """
    w = _fp8(p)
    i, n = w.intermediate_size, w.w13_scale.shape[1] // 2
    half, kept = i // 2, -(-n // 2)
    total = torch.zeros(p.x.shape)
    for rank in range(2):
        rows = slice(rank * half, (rank + 1) * half)
        scales = slice(rank * kept, min((rank + 1) * kept, n))

        def shard(t: torch.Tensor, dim: int, part: slice, pad: int) -> torch.Tensor:
            piece = t.narrow(dim, part.start, part.stop - part.start)
            short = pad - piece.shape[dim]
            filler = torch.zeros_like(piece.narrow(dim, 0, 1)).repeat_interleave(max(short, 0), dim)
            return torch.cat((piece, filler), dim)

        gate_up = w.w13.view(w.num_experts, 2, i, -1)[:, :, rows].flatten(1, 2)
        s13 = shard(w.w13_scale.view(w.num_experts, 2, n, -1), 2, scales, kept).flatten(1, 2)
        s2 = shard(w.w2_scale, 2, scales, kept)
        part = Fp8BlockWeights(
            gate_up, s13, w.w2[:, :, rows].contiguous(), s2, w.w13_block, w.w2_block
        )
        total += _run(p, weights=part)
    return total


def _offset_wraps(p: Problem) -> torch.Tensor:
    """Expert addresses computed with too few bits: the upper half reads the lower half's weights.

    Models aiter pull request 3812 (a 32-bit byte offset past 4 GiB) at a small size.
    """
    w = p.weights
    lower = torch.arange(w.num_experts) % (w.num_experts // 2)
    return _run(p, weights=replace(w, w13=w.w13[lower], w2=w.w2[lower]))


def _shuffled_twice(p: Problem) -> torch.Tensor:
    """Weights permuted for a kernel's tiles once too often."""
    rows = torch.arange(p.weights.hidden_size).view(-1, 16, 4).transpose(1, 2).flatten()
    return _run(p, weights=replace(p.weights, w2=p.weights.w2[:, rows]))


def controls() -> list[Control]:
    """Every control that runs on any machine."""
    from moe_backend.verify.w4a4_controls import w4a4_controls

    fp8 = Case("fp8_block", STEP, tokens=16, intermediate_size=384)
    fp4 = Case("nvfp4", STEP, tokens=16)
    bf16 = Case("bf16", STEP, tokens=16)
    ep = replace(bf16, layout="ep")
    return [
        Control("activation built from raw fp8 codes", fp8, _raw_codes),
        Control("scale slot left at its initial value", fp8, _scale_slot_unwritten),
        Control("even weights with whole-block scales", fp8, _block_scales_of_whole_blocks),
        Control("gate scale used for up", fp4, _gate_scale_for_up),
        Control("block scale folded with the global scale into e4m3", fp4, _scale_folded_into_e4m3),
        Control("clamp dropped", bf16, lambda p: _run(p, activation=SILU)),
        Control(
            "swiglustep taken for swigluoai",
            bf16,
            lambda p: _run(p, activation=Activation.from_name("swigluoai_uninterleave")),
        ),
        Control("expert dropped under EP", ep, _expert_dropped),
        Control("expert mask taken for an expert map", ep, _map_as_mask),
        Control("leading zero in expert offsets", bf16, _leading_zero),
        Control("32-bit offset wrap", bf16, _offset_wraps),
        Control("weights shuffled twice", bf16, _shuffled_twice),
        *w4a4_controls(),
    ]
