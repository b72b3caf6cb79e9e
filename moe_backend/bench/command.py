"""`moe-backend bench`: arguments, progress and printout."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch

from moe_backend.bench import report
from moe_backend.bench.checkpoint import shape_of
from moe_backend.bench.floor import rates
from moe_backend.bench.inputs import ROUTINGS
from moe_backend.bench.measure import CACHES
from moe_backend.bench.plot import plot
from moe_backend.bench.run import Bench, free
from moe_backend.bench.shapes import SHAPES, USUAL, Shape
from moe_backend.engines import vllm_rivals


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_bench` reads to `parser`."""
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the shapes and rivals, or the one of --model, and stop",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        action="extend",
        choices=[*SHAPES, "all"],
        metavar="NAME",
        help="layers to measure, or `all`; default: those that this project is judged by; see "
        "--list",
    )
    parser.add_argument("--model", metavar="PATH", help="measure a checkpoint's experts instead")
    parser.add_argument(
        "--tp", type=int, metavar="N", help="ranks that split each expert of --model (default 1)"
    )
    parser.add_argument(
        "--ep", type=int, metavar="N", help="ranks that share --model's experts (default 1)"
    )
    parser.add_argument(
        "--tokens",
        type=_positive,
        nargs="+",
        metavar="N",
        help="token counts; default: the shape's own",
    )
    parser.add_argument("--routing", choices=(*ROUTINGS, "both"), default="uniform")
    parser.add_argument(
        "--rivals",
        nargs="*",
        choices=vllm_rivals.NAMES,
        metavar="NAME",
        help="only these backends of the installed vLLM; without a name: none",
    )
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=CACHES,
        default=["written"],
        help="what fills L2 before each replay: zeros just written, which go back to memory while "
        "the layer is timed (default, as triton.testing.do_bench), or data that was read, as "
        "between a model's layers; `layers`: the same with eight calls in one graph, so that a "
        "graph's launch does not count. Several: a row for each",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="start no further layer once so long has passed",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows, after each backend"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot time over floor (PNG)")
    parser.add_argument(
        "--read",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: report the rows of these --json files, together",
    )


def run_bench(args: argparse.Namespace) -> int:
    """Measure and report; 1 if ours was wrong or could not run somewhere, 0 otherwise.

    Raises:
        ValueError: nothing can be measured here, or the options do not fit together.
    """
    if args.list:
        return _list(args)
    _check_outputs(args)
    if args.read:
        rows = [row for file in args.read for row in report.read_json(file)]
        for row in rows:
            print(report.line(row))
        if args.json:
            report.write_json(rows, args.json)
    else:
        rows = _measure(args)
    if args.markdown:
        args.markdown.write_text(report.markdown(rows), encoding="utf-8")
    if args.plot and rows:
        plot(rows, args.plot)
    for fact in report.summary(rows):
        print(fact)
    return 0 if rows and all(isinstance(row.ours_us, float) for row in rows) else 1


def _measure(args: argparse.Namespace) -> list[report.Row]:
    shapes = _shapes(args)
    wanted = vllm_rivals.NAMES if args.rivals is None else tuple(args.rivals)
    if not torch.cuda.is_available():
        raise ValueError(
            "torch sees no GPU here, and this command times kernels on one. --list and --read FILE "
            "work without."
        )
    if not vllm_rivals.installed():
        if args.rivals:
            raise ValueError(
                f"--rivals {' '.join(args.rivals)}: vLLM is not installed in this environment, and "
                "the rivals are its backends. Install it, or leave --rivals out."
            )
        print("vLLM is not installed here: ours is timed alone", file=sys.stderr)
    routings = ROUTINGS if args.routing == "both" else (args.routing,)
    rows: list[report.Row] = []

    def keep(current: list[report.Row]) -> None:
        """After every backend of a layer, so that an interrupted run leaves what it has."""
        if args.json:
            report.write_json([*rows, *current], args.json)

    todo = [(shape, routing) for shape in shapes for routing in routings]
    start = time.monotonic()
    with vllm_rivals.context(), _progress() as progress:
        bench = Bench(rates(), wanted, progress, caches=args.cache)
        for i, (shape, routing) in enumerate(todo):
            began = time.monotonic()
            if args.budget is not None and began - start > args.budget:
                left = ", ".join(f"{s.name} {r}" for s, r in todo[i:])
                print(f"--budget {args.budget:g}: not measured: {left}", file=sys.stderr)
                break
            torch.cuda.reset_peak_memory_stats()
            found = bench.rows(shape, routing, keep)
            rows += found
            for row in found:
                print(report.line(row), flush=True)
            _tell(shape, routing, found, time.monotonic() - began)
            free()
    return rows


def _tell(shape: Shape, routing: str, rows: list[report.Row], seconds: float) -> None:
    """To stderr: what could not be measured, and what the layer cost."""
    missing: dict[str, list[int]] = {}
    for row in rows:
        for name in (n for n, us in row.rivals.items() if us is None):
            missing.setdefault(f"{name}: {row.notes.get(name, '')}", []).append(row.tokens)
    for text, tokens in missing.items():
        counts = " ".join(map(str, dict.fromkeys(tokens)))  # once, by however many clocks
        where = "" if len(tokens) == len(rows) else f" at {counts} tokens"
        print(f"  not measured{where}: {text}", file=sys.stderr)
    gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"  {shape.name} {routing}: {seconds:.0f} s, {gib:.1f} GiB", file=sys.stderr, flush=True)


def _check_outputs(args: argparse.Namespace) -> None:
    """Before minutes are spent on rows that could not be written."""
    for option in ("json", "markdown", "plot"):
        file: Path | None = getattr(args, option)
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"--{option} {file}: there is no directory {file.parent}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def _shapes(args: argparse.Namespace) -> list[Shape]:
    if args.model is None:
        for option, value in (("--tp", args.tp), ("--ep", args.ep)):
            if value is not None:
                raise ValueError(
                    f"{option} {value} belongs to --model; a named shape is one rank's already"
                )
        names = list(SHAPES) if "all" in (args.shape or ()) else args.shape or USUAL
        shapes = [SHAPES[name] for name in dict.fromkeys(names)]
    else:
        if args.shape:
            raise ValueError("--model and --shape were both given; one of them, please")
        tp, ep = (1 if n is None else n for n in (args.tp, args.ep))
        shapes = [shape_of(args.model, tp, ep)]
        print(f"{shapes[0].name}: {shapes[0].describe()}")
    return [shape.at(args.tokens) for shape in shapes] if args.tokens else shapes


def _list(args: argparse.Namespace) -> int:
    named = _shapes(args)
    if args.model is not None:
        return 0  # its line has been printed
    for shape in named if args.shape else SHAPES.values():
        usual = " *" if shape.name in USUAL else ""
        print(f"{shape.name + usual:25} {shape.describe()}")
    print("* measured where no --shape is named")
    print(f"rivals: {', '.join(vllm_rivals.NAMES)}")
    return 0


class _progress:
    """What is being measured now, on one line that a terminal overwrites; nothing in a file."""

    def __enter__(self) -> _progress:
        from rich.console import Console

        self.status = Console(stderr=True).status("starting")
        self.status.start()
        return self

    def __call__(self, text: str) -> None:
        self.status.update(text)

    def __exit__(self, *_: object) -> None:
        self.status.stop()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} found, at least 1 expected")
    return number
