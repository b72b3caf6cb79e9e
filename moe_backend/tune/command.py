"""`moe-backend tune`: arguments, progress and printout."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_backend import __version__, envs
from moe_backend.bench.checkpoint import shape_of
from moe_backend.bench.shapes import SHAPES, Shape
from moe_backend.formats import FORMATS, Fp8BlockWeights
from moe_backend.formats.fp8_block import Block, by
from moe_backend.kernels.hopper import methods, table
from moe_backend.kernels.hopper import tiles as defaults
from moe_backend.kernels.hopper.kernel import PARTIAL_ELEMENTS, HopperKernel, shape_refusal
from moe_backend.kernels.triton.kernel import slice_tokens
from moe_backend.tune import store
from moe_backend.tune.loop import Lost, Outcome, Runner, tune

TOKENS = (1, 2, 4, 8, 16, 32, 128, 512, 2048, 8192)
MAX_JOBS = 8
SIZES = ("format", "experts", "local", "top_k", "hidden", "intermediate")

# A runner for each token count of one layer.
Runners = Callable[[Shape, int], Callable[[int], Runner]]


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_tune` reads to `parser`."""
    parser.add_argument(
        "--model", metavar="PATH", help="tune for a checkpoint's experts; this, --shape or sizes"
    )
    parser.add_argument(
        "--tp", type=_positive, metavar="N", help="ranks that split each expert of --model"
    )
    parser.add_argument(
        "--ep", type=_positive, metavar="N", help="ranks that share --model's experts"
    )
    parser.add_argument(
        "--enable-expert-parallel",
        action="store_true",
        help="as vLLM's flag: the --tp ranks share the experts of --model and split none",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=list(SHAPES),
        metavar="NAME",
        help="tune for layers that `moe-backend bench --list` names",
    )
    sizes = parser.add_argument_group("one rank's layer by its sizes")
    sizes.add_argument("--format", choices=list(FORMATS))
    sizes.add_argument("--experts", type=_positive, metavar="N", help="of the model")
    sizes.add_argument("--local", type=_positive, metavar="N", help="of this rank; default: all")
    sizes.add_argument("--top-k", type=_positive, metavar="N")
    sizes.add_argument("--hidden", type=_positive, metavar="N")
    sizes.add_argument("--intermediate", type=_positive, metavar="N", help="of this rank")
    for name in ("w13", "w2"):
        sizes.add_argument(
            f"--{name}-block",
            type=_block,
            metavar="NxK",
            help=f"rows and columns of {name} that one FP8 scale covers (default 128x128)",
        )
    parser.add_argument(
        "--tokens",
        type=_positive,
        nargs="+",
        metavar="N",
        help=f"tokens of a call (default: {' '.join(map(str, TOKENS))}); a row serves calls with "
        "half to twice as many",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the table (default: the user's for this GPU; {envs.TUNED.name} names its folder); "
        "rows that it has are kept, also those that another run adds meanwhile",
    )
    parser.add_argument("--again", action="store_true", help="measure rows that exist as well")
    parser.add_argument(
        "--jobs",
        type=_positive,
        default=min(MAX_JOBS, len(os.sched_getaffinity(0))),
        metavar="N",
        help="threads that compile (default: %(default)s)",
    )


@dataclass
class Done:
    """One row's outcome, for the summary."""

    shape: Shape
    tokens: int
    outcome: Outcome


def run_tune(args: argparse.Namespace) -> int:
    """Measure and write; 1 if a default was wrong or the GPU failed, 130 after Ctrl-C.

    Raises:
        ValueError: nothing can be tuned here, or the options do not fit together.
    """
    shapes = shapes_of(args)
    most = min(_most_tokens(shape) for shape in shapes)
    tokens = args.tokens or [t for t in TOKENS if t <= most]
    for shape in shapes:
        _check_tokens(shape, tokens)
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here, and this command times kernels on one.")
    for shape in shapes:
        if (refusal := HopperKernel().refusal(shape.layer())) is not None:
            raise ValueError(f"only the Hopper kernels are tuned, and {refusal}.")
    gpu = torch.cuda.get_device_name()
    file = args.out or _own_file(gpu)
    return tune_shapes(shapes, tokens, file, gpu, args.jobs, args.again, gpu_runners)


def tune_shapes(
    shapes: list[Shape],
    tokens: list[int],
    file: Path,
    gpu: str,
    jobs: int,
    again: bool,
    runners: Runners,
) -> int:
    """Fill the table `file`, row by row; the exit code is `run_tune`'s."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    store.refuse_foreign(file, gpu)
    known = table.read(file, gpu) if file.exists() else table.Table(gpu)
    found, in_file = table.Table(gpu), 0
    counts = sorted(set(tokens))
    todo = {}
    for shape in shapes:
        have = {} if again else known.rows.get(table.Key.of(shape.layer()), {})
        todo[shape] = [t for t in counts if t not in have]
    kept = len(shapes) * len(counts) - sum(map(len, todo.values()))
    if kept:
        console.print(f"{kept} rows are in {file} already; --again measures them again")
    done: list[Done] = []
    code = 0
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console) as bar:
            rows = bar.add_task("rows", total=sum(map(len, todo.values())))
            choices = bar.add_task("choices", total=None)
            for shape, missing in todo.items():
                if not missing:
                    continue
                bar.update(choices, description=f"{shape.name}: weights", completed=0, total=None)
                runner_for = runners(shape, jobs)
                for count in missing:
                    title = f"{shape.name}, {count} tokens"

                    def tell(tried: int, total: int, title: str = title) -> None:
                        bar.update(choices, description=title, completed=tried, total=total)

                    tell(0, 0)
                    runner = runner_for(count)
                    outcome = tune(runner, shape.layer(), count, versions(), tell)
                    del runner
                    if outcome.row is not None:
                        found.put(table.Key.of(shape.layer()), outcome.row)
                        in_file = store.add(file, found)
                    done.append(Done(shape, count, outcome))
                    bar.advance(rows)
                del runner_for
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        code = 130
    except Lost as error:
        console.print(f"stopped: {error}. The same command goes on with the row that was begun.")
        code = 1
    _summary(done)
    if any(d.outcome.row is not None for d in done):
        console.print(f"{file}: {in_file} rows", soft_wrap=True)
        if file.resolve() not in [f.resolve() for f in table.files(gpu)]:
            console.print(
                f"Engines read it named {table.file_name(gpu)}, in the folder that "
                f"{envs.TUNED.name} names.",
                soft_wrap=True,
            )
    return code or int(any(d.outcome.row is None for d in done))


def gpu_runners(shape: Shape, jobs: int) -> Callable[[int], Runner]:
    """On this machine's GPU, with random weights."""
    from moe_backend.tune.gpu import GpuRunner

    torch.manual_seed(0)
    weights = shape.weights()
    return lambda tokens: GpuRunner(shape, weights, tokens, jobs)


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """The layers that the options name.

    Raises:
        ValueError: they name none, or in more than one way.
    """
    sizes = [n for n in SIZES if getattr(args, n) is not None]
    ways = [bool(args.model), bool(args.shape), bool(sizes)]
    if sum(ways) != 1:
        raise ValueError(
            "give --model PATH, --shape NAME, or all sizes (--format, --experts, ...)"
            + (", and only one of these" if any(ways) else "")
        )
    if not args.model and (args.tp or args.ep or args.enable_expert_parallel):
        raise ValueError(
            "--tp, --ep and --enable-expert-parallel go with --model; sizes are one rank's already"
        )
    if args.shape:
        return [SHAPES[name] for name in dict.fromkeys(args.shape)]
    if args.model:
        tp, ep = args.tp or 1, args.ep or 1
        if args.enable_expert_parallel:
            tp, ep = 1, tp * ep
        return [shape_of(args.model, tp, ep)]
    missing = [f"--{n.replace('_', '-')}" for n in SIZES if n != "local" and n not in sizes]
    if missing:
        raise ValueError(f"with sizes, {', '.join(missing)} must be given too")
    blocks: tuple[Block | None, Block | None] = (args.w13_block, args.w2_block)
    if args.format == Fp8BlockWeights.name:
        blocks = (args.w13_block or (128, 128), args.w2_block or (128, 128))
    elif any(blocks):
        raise ValueError(f"--w13-block and --w2-block are of fp8_block, not of {args.format}")
    local = args.local or args.experts
    if local > args.experts or args.top_k > args.experts:
        raise ValueError(f"--local and --top-k: at most --experts, {args.experts}, expected")
    shown = "" if blocks[0] is None else f" {by(blocks[0])}"
    name = f"{args.format}{shown} {local}/{args.experts} H{args.hidden} I{args.intermediate}"
    return [
        Shape(
            name, args.format, args.experts, local, args.top_k, args.hidden, args.intermediate,
            *blocks,
        )
    ]  # fmt: skip


def versions() -> dict[str, str]:
    """What a row was measured with."""
    import triton

    return {"moe-backend": __version__, "torch": torch.__version__, "triton": triton.__version__}


def _most_tokens(shape: Shape) -> int:
    """Of one call; more run in slices."""
    if (refusal := shape_refusal(shape.layer())) is not None:
        raise ValueError(f"{shape.name}: the Hopper kernels do not run it: {refusal}.")
    return slice_tokens(shape.layer(), PARTIAL_ELEMENTS)


def _check_tokens(shape: Shape, tokens: list[int]) -> None:
    most = _most_tokens(shape)
    if max(tokens) > most:
        raise ValueError(
            f"{shape.name}: calls with more than {most} tokens run in slices of {most}; --tokens "
            f"{max(tokens)} found, at most {most} expected"
        )


def _own_file(gpu: str) -> Path:
    try:
        folder = table.user_folder()
    except RuntimeError:
        raise ValueError(
            f"there is no home folder for the table; give --out FILE, or a folder in "
            f"{envs.TUNED.name}"
        ) from None
    if folder is None:
        raise ValueError(
            f"{envs.TUNED.name} is {table.OFF}, so no table would be read; give --out FILE, or "
            "unset it"
        )
    return folder / table.file_name(gpu)


def _summary(done: list[Done]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)  # in a file, 80 cut the names
    shown = Table(
        "layer", "tokens", "default µs", "tuned µs", "ratio", "rel. L2", "tried", "change"
    )
    for d in done:
        row, layer = d.outcome.row, d.shape.layer()
        default = defaults.choose(layer, d.tokens)
        if row is None:
            reason = d.outcome.rejected.get(default, "not measured")
            cells = ["-", "-", "-", "-", str(d.outcome.tried), f"the default failed: {reason}"]
        else:
            change = "default" if row.choice is None else methods.describe(row.choice, default)
            cells = [
                f"{row.default_us:.1f}", f"{row.us:.1f}", f"{row.default_us / row.us:.2f}",
                f"{row.rel_l2:.2g}", str(d.outcome.tried), change,
            ]  # fmt: skip
        shown.add_row(d.shape.name, str(d.tokens), *cells)
    if done:
        console.print(shown)
    for d in done:
        default = defaults.choose(d.shape.layer(), d.tokens)
        for choice, reason in d.outcome.rejected.items():
            what = methods.describe(choice, default)
            console.print(
                f"rejected: {d.shape.name}, {d.tokens} tokens, {what}: {reason}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} found, at least 1 expected")
    return number


def _block(text: str) -> Block:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} found, rows x columns such as 32x128 expected")
    return int(parts[0]), int(parts[1])
