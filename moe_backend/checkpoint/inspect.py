"""What a checkpoint's experts are, and what their NVFP4 scales will do to an engine.

Three properties of NVFP4 scales decide whether a backend computes the model or something near it:
whether gate and up share a global scale (an engine that keeps one of the two is wrong by their
ratio), how far the experts' activation scales lie apart (one is used for all; the largest is safe,
a mean saturates), and whether the tensors are MXFP4 in disguise (then FP8 holds them exactly).
Reads headers and small scales, and the block scales of a few experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_backend.checkpoint.dialects import Dialect, read_quantisation
from moe_backend.checkpoint.layout import DOWN, GATE, UP, ExpertModule, MoeLayer, find_moe_layers
from moe_backend.checkpoint.reader import Checkpoint
from moe_backend.formats.nvfp4 import E2M1_MAX, E4M3_MAX, is_mxfp4_cast
from moe_backend.formats.nvfp4_activations import ActivationScale

# Scales that differ by less are one scale that two tools rounded differently.
SAME = 1e-5
FULL_RANGE = E2M1_MAX * E4M3_MAX  # 2688, the largest activation over the global scale


@dataclass(frozen=True)
class Spread:
    """Positive numbers, summarised."""

    count: int
    smallest: float
    median: float
    largest: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Spread:
        return cls(
            values.numel(),
            values.min().item(),
            values.double().quantile(0.5).item(),
            values.max().item(),
        )


@dataclass
class InputScales:
    """Activation scales of w13 or of w2, in decode direction.

    Attributes:
        scales: over all experts of all layers; None without any.
        layer_spread: largest over smallest within a layer, the worst layer's.
        mean_loss: largest over mean within a layer, the worst layer's: how many times a mean over
            the experts is too small for the loudest of them.
        worst_layer: where.
        reach: the largest activation that does not saturate, of the layer where it is smallest,
            with the headroom that `ActivationScale` adds.
        missing: experts' projections without one; bad: not finite or not positive.
    """

    scales: Spread | None = None
    layer_spread: float = 1.0
    mean_loss: float = 1.0
    worst_layer: str = ""
    reach: float = math.inf
    missing: int = 0
    bad: int = 0


@dataclass
class Report:
    """What `inspect` found.

    Attributes:
        formats: expert projections by dialect.
        layers: MoE layers; experts: of the first of them.
        pairs: gate and up of one expert, NVFP4 only; mismatched: with different global scales.
        mismatch: the ratio of the two, the larger over the smaller, over the mismatched ones.
        inputs: activation scales by projection (`w13`, `w2`), where the checkpoint has them.
        weight_only: the checkpoint quantises no activations.
        sampled: matrices whose block scales were read; mxfp4_casts: those that are MXFP4.
        saturated: share of block scales at 448 in them.
        warnings: what somebody should know before serving; empty if nothing.
    """

    formats: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    experts: int = 0
    pairs: int = 0
    mismatched: int = 0
    mismatch: Spread | None = None
    inputs: dict[str, InputScales] = field(default_factory=dict)
    weight_only: bool = False
    sampled: int = 0
    mxfp4_casts: int = 0
    saturated: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def inspect(path: str | Path, experts: int = 1) -> Report:
    """Read the checkpoint in directory `path`.

    Args:
        experts: of each layer, so many experts' block scales are read (they are a tenth of the
            checkpoint).

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    checkpoint = Checkpoint.open(path)
    layers = find_moe_layers(checkpoint.tensors)
    quantisation = read_quantisation(checkpoint)
    report = Report(layers=len(layers))
    formats: Counter[str] = Counter()
    ratios: list[torch.Tensor] = []
    scales: dict[str, list[torch.Tensor]] = {}
    blocks_at_top = blocks = 0
    for layer in layers:
        found = _LayerScales(checkpoint, layer)
        report.experts = report.experts or found.experts
        for module in layer.modules:
            dialect = quantisation.dialect_of(layer.block, module.name.rpartition(".")[2])
            formats[dialect.name] += found.experts if layer.stacked else 1
            if not dialect.name.startswith("nvfp4"):
                continue
            report.weight_only = not dialect.has_input_scale
            found.read(module, dialect)
            if (module.expert or 0) < experts:
                for scale, global_scale in found.block_scales(module, dialect, experts):
                    report.sampled += 1
                    report.mxfp4_casts += is_mxfp4_cast(scale, global_scale)
                    blocks_at_top += int((scale.float() == E4M3_MAX).sum())
                    blocks += scale.numel()
        ratios.append(found.gate_up_ratios())
        found.add_inputs(report.inputs, scales)
    report.formats = dict(formats)
    report.saturated = blocks_at_top / max(blocks, 1)
    for name, values in scales.items():
        if values:
            report.inputs[name].scales = Spread.of(torch.cat(values))
    pairs = torch.cat(ratios) if ratios else torch.empty(0)
    report.pairs = pairs.numel()
    differing = pairs[pairs > 1 + SAME]
    report.mismatched = differing.numel()
    report.mismatch = Spread.of(differing) if differing.numel() else None
    report.warnings = list(_warnings(report))
    return report


class _LayerScales:
    """Global and activation scales of one layer, by projection and expert, in decode direction."""

    def __init__(self, checkpoint: Checkpoint, layer: MoeLayer) -> None:
        self.checkpoint = checkpoint
        self.layer = layer
        self.experts = self._count()
        self.weight: dict[str, dict[int, float]] = {GATE: {}, UP: {}, DOWN: {}}
        self.input: dict[str, dict[int, float]] = {GATE: {}, UP: {}, DOWN: {}}
        self.missing: Counter[str] = Counter()

    def _count(self) -> int:
        module = self.layer.modules[0]
        if not self.layer.stacked:
            return len(self.layer.experts(module.projection))
        name = module.tensors.get("weight") or module.tensors.get("weight_packed")
        shape = self.checkpoint.tensors[name].shape if name else ()
        return shape[0] if shape else 1

    def read(self, module: ExpertModule, dialect: Dialect) -> None:
        """Both scales of a module, of one expert or of all."""
        modelopt = dialect.name == "nvfp4-modelopt"
        experts = [module.expert] if module.expert is not None else list(range(self.experts))
        for kind, into in (
            ("weight_scale_2" if modelopt else "weight_global_scale", self.weight),
            ("input_scale" if modelopt else "input_global_scale", self.input),
        ):
            if kind not in module.tensors:
                if into is self.input and dialect.has_input_scale:
                    self.missing[module.projection] += len(experts)
                continue
            values = self.checkpoint.load(module.tensors[kind]).float().flatten()
            values = values if modelopt else 1 / values
            values = values.expand(len(experts)) if values.numel() == 1 else values
            into[module.projection].update(zip(experts, values.tolist(), strict=True))

    def block_scales(
        self, module: ExpertModule, dialect: Dialect, experts: int
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Block scales and global scale of up to `experts` experts of a module."""
        name = module.tensors.get("weight_scale")
        if name is None:
            return
        scales = self.weight[module.projection]
        if module.expert is not None:
            chosen = [(module.expert, self.checkpoint.load(name))]
        else:
            count = min(experts, self.experts)
            chosen = [(e, self.checkpoint.load_part(name, e)) for e in range(count)]
        for e, scale in chosen:
            if e in scales:
                yield scale, torch.tensor(scales[e])

    def gate_up_ratios(self) -> torch.Tensor:
        """The larger global scale over the smaller, of each expert that has both."""
        gate, up = self.weight[GATE], self.weight[UP]
        both = [(gate[e], up[e]) for e in gate if e in up]
        return torch.tensor([max(g / u, u / g) for g, u in both if g > 0 and u > 0])

    def add_inputs(
        self, inputs: dict[str, InputScales], scales: dict[str, list[torch.Tensor]]
    ) -> None:
        """Fold this layer's activation scales into the report's."""
        for name, projections in (("w13", (GATE, UP)), ("w2", (DOWN,))):
            found = [v for p in projections for v in self.input[p].values()]
            missing = sum(self.missing[p] for p in projections)
            if not found and not missing:
                continue
            summary = inputs.setdefault(name, InputScales())
            summary.missing += missing
            values = torch.tensor(found)
            good = values[values.isfinite() & (values > 0)]
            summary.bad += len(values) - len(good)
            if not len(good):
                continue
            scales.setdefault(name, []).append(good)
            static = ActivationScale.from_checkpoint(good).static
            assert static is not None
            summary.reach = min(summary.reach, FULL_RANGE * static.item())
            loss = (good.max() / good.mean()).item()
            if loss >= summary.mean_loss:
                summary.mean_loss, summary.worst_layer = loss, self.layer.block
            summary.layer_spread = max(summary.layer_spread, (good.max() / good.min()).item())


def _warnings(report: Report) -> Iterable[str]:
    if report.mismatch is not None:
        yield (
            f"gate and up have different global scales in {report.mismatched} of {report.pairs} "
            f"experts, by up to {report.mismatch.largest:.3g} times: a backend that keeps one of "
            "the two computes them wrong by that factor. This one keeps both."
        )
    for name, found in report.inputs.items():
        if found.missing or found.bad:
            yield (
                f"{name}: {found.missing} activation scales are missing and {found.bad} are not "
                "finite and positive. Loading is refused: calibrate again, or declare the "
                "checkpoint weight-only (W4A16)."
            )
        if found.mean_loss > 2:
            yield (
                f"{name}: activation scales of one layer differ by up to {found.layer_spread:.3g} "
                f"times ({found.worst_layer}). Their maximum serves all experts; a mean would be "
                f"{found.mean_loss:.3g} times too small for the loudest and saturate its blocks."
            )
    if report.saturated > 0.01:
        yield (
            f"{report.saturated:.1%} of the weights' block scales are at E4M3's maximum, 448: the "
            "global scale was chosen too small, and the largest weights are cut off."
        )
