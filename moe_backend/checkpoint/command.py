"""`moe-backend convert SRC DST --to FORMAT`: arguments and summary."""

from __future__ import annotations

import argparse
import re

from moe_backend.checkpoint.convert import MAX_SHARD_BYTES, TARGETS, convert

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_convert` reads to `parser`."""
    parser.add_argument("src", metavar="SRC", help="directory of the bf16 checkpoint")
    parser.add_argument("dst", metavar="DST", help="directory to write; new or empty")
    parser.add_argument(
        "--to",
        required=True,
        choices=list(TARGETS),
        help="format of the routed experts; everything else is copied unchanged",
    )
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help="largest size of an output file, such as 5GB (the default)",
    )
    parser.add_argument(
        "--no-sync-gate-up",
        action="store_true",
        help="NVFP4: give gate and up global scales of their own; some engines keep only one",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run_convert(args: argparse.Namespace) -> int:
    """Convert and print a summary; always 0.

    Raises:
        CheckpointError: the checkpoint cannot be converted.
        OSError: a file cannot be read or written.
    """
    report = convert(
        args.src,
        args.dst,
        args.to,
        sync_gate_up=not args.no_sync_gate_up,
        max_shard_bytes=args.max_shard_size,
        progress=not args.no_progress,
    )
    smaller = report.bytes_before / max(report.bytes_after, 1)
    print(f"wrote       {args.dst} ({report.target})")
    print(
        f"size        {_size(report.bytes_before)} -> {_size(report.bytes_after)} ({smaller:.2f}x)"
    )
    print(f"converted   {report.converted} expert weights, {report.copied} other tensors copied")
    print(f"weight SNR  {report.snr_db:.1f} dB (mean)")
    print(f"time        {report.seconds:.1f} s")
    return 0


def parse_size(text: str) -> int:
    """Bytes of a size such as `500MB` or `5GB` (powers of ten)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _size(nbytes: int) -> str:
    for unit in ("TB", "GB", "MB", "KB"):
        if nbytes >= _UNITS[unit]:
            return f"{nbytes / _UNITS[unit]:.2f} {unit}"
    return f"{nbytes} bytes"
