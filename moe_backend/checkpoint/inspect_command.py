"""`moe-backend inspect CHECKPOINT`: arguments and printout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_backend.checkpoint.inspect import Report, inspect


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_inspect` reads to `parser`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory of the checkpoint")
    parser.add_argument(
        "--experts",
        type=int,
        default=1,
        metavar="N",
        help="read the block scales of so many experts of each layer (default 1)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")


def run_inspect(args: argparse.Namespace) -> int:
    """Print the report; the exit code is 0 whatever was found."""
    report = inspect(args.checkpoint, args.experts)
    for line in lines(report):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    return 0


def lines(report: Report) -> list[str]:
    """The report as text, one fact a line."""
    if not report.layers:
        return ["no routed experts"]
    kinds = ", ".join(f"{n} projections in {name}" for name, n in sorted(report.formats.items()))
    out = [f"experts          {report.layers} MoE layers of {report.experts} experts: {kinds}"]
    if report.pairs:
        text = f"{report.pairs} experts, all share one global scale"
        if report.mismatch is not None:
            m = report.mismatch
            text = (
                f"{report.mismatched} of {report.pairs} experts have different global scales: "
                f"ratio {m.median:.3g} (median), {m.largest:.3g} (largest)"
            )
        out.append(f"gate and up      {text}")
    if report.weight_only:
        out.append("activations      not quantised (weight-only)")
    for name, found in report.inputs.items():
        if found.scales is not None:
            s = found.scales
            out.append(
                f"{name + ' input':<16} scale {s.smallest:.3g} to {s.largest:.3g}, median "
                f"{s.median:.3g}; within a layer up to {found.layer_spread:.3g} times apart"
            )
            out.append(
                f"{'':<16} a W4A4 kernel saturates beyond activations of {found.reach:.4g}, "
                "headroom included"
            )
    if report.sampled:
        out.append(
            f"block scales     {report.sampled} matrices read: {report.saturated:.2%} at 448, "
            f"{report.mxfp4_casts} are MXFP4 in disguise"
            + (" (folding to FP8 loses nothing)" if report.mxfp4_casts == report.sampled else "")
        )
    return [*out, *(f"warning: {w}" for w in report.warnings)]
