"""The command `moe-backend`: doctor, verify, inspect, convert, bench, tune."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_backend import __version__

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; the exit code is 0 on success, 1 on a found fault, 2 on bad usage."""
    parser = argparse.ArgumentParser(prog="moe-backend", description=__doc__)
    parser.add_argument("--version", action="version", version=f"moe-backend {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_doctor(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_bench(commands)
    _add_tune(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"moe-backend {args.command}: {error}", file=sys.stderr)
        return 1


# --- doctor ---------------------------------------------------------------------------------------


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="what this machine has and which kernels it can run, without a model"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from moe_backend import doctor

    report = doctor.examine()
    console = Console()
    console.print(_table("Machine", ["what", "found"], report.facts.items()))
    layers = [(row.format, row.activation, row.kernel) for row in report.layers]
    console.print(_table("Kernel per layer", ["format", "activation", "kernel"], layers))
    reasons = [(why, ", ".join(of)) for why, of in doctor.reasons(report.layers).items()]
    console.print(_table("Reasons", ["why", "layers"], reasons))
    variables = [(v.name, v.value, v.meaning, v.unset) for v in report.variables]
    columns = ["variable", "value", "what it does", "when unset"]
    console.print(_table("Environment variables", columns, variables, whole=("variable",)))
    for problem in report.problems:
        console.print(Text.assemble(("problem:", "red"), " ", problem), soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return 1 if report.problems else 0


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], whole: Sequence[str] = ()
) -> Table:
    """All of every cell is shown, on as many lines as it takes.

    Args:
        whole: columns whose words are to be copied, so that they stay on one line.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in whole)
    for row in rows:
        table.add_row(*map(Text, row))  # brackets are no markup
    return table


# --- verify ---------------------------------------------------------------------------------------


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify", help="run every correctness case and every must-fail control of this machine"
    )
    parser.add_argument("--quick", action="store_true", help="a small part of the cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument(
        "--compile",
        action="append",
        default=[],
        metavar="ARCH",
        help="compile the kernels for this AMD target (gfx942, gfx950) and inspect the machine "
        "code, nothing else; may be repeated; needs no GPU",
    )
    parser.add_argument(
        "--emulate",
        action="append",
        default=[],
        metavar="ARCH",
        help="compile for this AMD target, execute the machine code on the CPU and compare; may be "
        "repeated; needs a clone of the repository and gcc",
    )
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    if args.compile or args.emulate:
        return _climb(args)
    from moe_backend.engines import vllm
    from moe_backend.kernels.registry import kernel_named
    from moe_backend.verify.run import run_cases, run_controls

    with contextlib.suppress(ImportError):  # without vLLM, fewer kernels are verified
        vllm.load_kernels()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    if args.kernel is not None:
        kernel_named(args.kernel)  # raises, naming the accepted ones
    results = []
    for result in run_cases(quick=args.quick, device=args.device, only=args.kernel):
        results.append(result)
        if not result.ok:
            print(f"WRONG   {result.kernel}: {result.name}: relative L2 {result.rel_l2:.3g}")
    # Without a kernel they would say that the check works, of nothing.
    caught = list(run_controls(args.device)) if results else []
    for control in caught:
        if not control.caught:
            print(f"UNCAUGHT {control.name}: relative L2 {control.rel_l2:.3g}")
    wrong = sum(not r.ok for r in results)
    uncaught = sum(not c.caught for c in caught)
    for kernel in sorted({r.kernel for r in results}):
        mine = [r for r in results if r.kernel == kernel]
        worst = max(r.rel_l2 for r in mine)
        print(f"{kernel}: {len(mine)} cases on {args.device}, worst relative L2 {worst:.2e}")
    if results:
        print(f"{len(results)} cases, {wrong} wrong; {len(caught)} controls, {uncaught} uncaught")
    if args.json:
        report = {
            "cases": [asdict(r) for r in results],
            "controls": [asdict(c) for c in caught],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if not results:
        print("no kernel ran: nothing was verified", file=sys.stderr)
        return 1
    return 1 if wrong or uncaught else 0


def _climb(args: argparse.Namespace) -> int:
    from moe_backend.verify import amd, amd_cases, amd_inspect

    def heard(result: amd.Compiled | amd.Emulated) -> None:
        if isinstance(result, amd.Compiled):
            for problem in result.problems:
                print(f"COMPILE  {result.arch} {result.kernel} ({result.case}): {problem}")
        elif not result.ok:
            print(f"EMULATE  {result.arch} {result.kernel} ({result.case}): {result.message}")
            for fault in result.faults:
                print(f"         {fault}")

    kernels = amd_cases.own_kernels(quick=args.quick, only=args.kernel)
    found = amd.climb(kernels, compile_for=args.compile, emulate_on=args.emulate, heard=heard)
    print(amd_inspect.table([(c.case, c.inspection) for c in found.compiled if c.inspection]))
    bad = sum(not c.ok for c in found.compiled)
    print(f"{len(found.compiled)} kernels compiled, {bad} with problems")
    if args.emulate:
        wrong = sum(not e.ok for e in found.emulated)
        worst = max((e.rel_l2 for e in found.emulated), default=0.0)
        print(f"{len(found.emulated)} cases emulated, {wrong} wrong, worst relative L2 {worst:.2e}")
    if args.json:
        report = {"cases": [], "controls": [], **found.as_json()}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if found.ok and found.compiled else 1


# --- inspect --------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    from moe_backend.checkpoint.inspect_command import add_inspect_arguments, run_inspect

    parser = commands.add_parser(
        "inspect", help="what a checkpoint's experts are, and what its NVFP4 scales will do"
    )
    add_inspect_arguments(parser)
    parser.set_defaults(run=run_inspect)


# --- convert --------------------------------------------------------------------------------------


def _add_convert(commands: Any) -> None:
    from moe_backend.checkpoint.command import add_convert_arguments, run_convert

    parser = commands.add_parser(
        "convert", help="turn a bf16 checkpoint's experts into FP8 block or NVFP4"
    )
    add_convert_arguments(parser)
    parser.set_defaults(run=run_convert)


# --- bench ----------------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    from moe_backend.bench.command import add_bench_arguments, run_bench

    parser = commands.add_parser(
        "bench", help="time the experts on this GPU beside the other backends of the installed vLLM"
    )
    add_bench_arguments(parser)
    parser.set_defaults(run=run_bench)


# --- tune -----------------------------------------------------------------------------------------


def _add_tune(commands: Any) -> None:
    from moe_backend.tune.command import add_tune_arguments, run_tune

    parser = commands.add_parser(
        "tune",
        help="measure which tiles are fastest for a model's experts on this GPU, and keep it",
    )
    add_tune_arguments(parser)
    parser.set_defaults(run=run_tune)


if __name__ == "__main__":
    raise SystemExit(main())
