"""`python -m moe_backend.comm --world-size 2`: probe this machine's collectives, without a server.

Exit code 0: every path that exists here works. 1: one does not. 2: the probe could not be run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path as FilePath

import torch

from moe_backend.comm import cache
from moe_backend.comm.machine import describe, device_identity
from moe_backend.comm.paths import PATHS
from moe_backend.comm.probe import ProbeError, host_store, probe
from moe_backend.comm.reports import reports_for


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_backend.comm", description=__doc__)
    parser.add_argument("--world-size", type=int, default=2, metavar="N", help="number of ranks")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="one CUDA or ROCm device per rank, or processes on the CPU",
    )
    parser.add_argument(
        "--path",
        action="append",
        choices=[p.name for p in PATHS.values() if p.opener],
        help="only this path; may be given more than once",
    )
    parser.add_argument("--limit", type=float, metavar="S", help="seconds that a path may take")
    parser.add_argument("--json", type=FilePath, metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--save", action="store_true", help="keep the verdicts, for servers on these devices"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and torch.cuda.device_count() < args.world_size:
        parser.error(f"--world-size {args.world_size}: {torch.cuda.device_count()} devices here")
    names = args.path or [path.name for path in PATHS.values() if path.opener]
    paths = [replace(PATHS[name], limit_s=args.limit or PATHS[name].limit_s) for name in names]
    ranks = range(args.world_size)
    devices = {rank: f"cuda:{rank}" if args.device == "cuda" else "cpu" for rank in ranks}
    machine = describe(
        torch.device(devices[0]),
        [device_identity(torch.device(device)) for device in devices.values()],
    )
    began = time.monotonic()
    try:
        results = probe(paths, devices, args.world_size, host_store())
    except ProbeError as error:
        print(f"the probe could not be run: {error}", file=sys.stderr)
        return 2
    took = time.monotonic() - began
    print(f"{args.world_size} ranks, {machine.arch}, torch {torch.__version__}: {took:.1f} s")
    for result in results.values():
        print(
            f"{result.path:16s} {result.outcome:12s} {result.cases:4d} cases "
            f"{result.seconds:7.2f} s  {result.detail}"
        )
    for report in reports_for(machine):
        print(
            f"reported: {report.path}: {report.symptom}, {report.condition}. "
            f"{report.source}; {report.status}"
        )
    if args.save and not cache.save(machine, results):
        where = cache.folder()
        why = "there is no home folder" if where is None else f"{where} cannot be written"
        print(f"{why}; nothing was kept", file=sys.stderr)
    if args.json:
        record = {
            "machine": asdict(machine),
            "seconds": round(took, 3),
            "results": [asdict(result) for result in results.values()],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(result.bad for result in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
