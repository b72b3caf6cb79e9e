"""Choices of the Hopper kernels timed beside each other, in one process.

    python benchmarks/choices.py SHAPE --tokens 64 256 [--choices default "flow 8 4 1"] [--json F]

A choice is `default` (what runs such a call here), `untuned` (the same without tuned tables),
`tiled` (the method without those in CUDA C++ and for few tokens), `few`, `once BLOCKS`,
`flow TOKENS GROUPS BLOCKS` with as many stages as fit, `pairs STAGES`, or JSON as in a tuned table.
Each is checked against plain torch and repeated bit for bit, as `moe-backend tune` does, with the
routing that is most typical of 64 draws; then the median time of CUDA graph replays counts, with L2
full of what was read. Exit code 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from moe_backend.bench.floor import floor_us, rates
from moe_backend.bench.shapes import SHAPES
from moe_backend.kernels.hopper import methods, tiles
from moe_backend.kernels.hopper.choose import choose
from moe_backend.kernels.registry import LayerConfig
from moe_backend.tune.gpu import GpuRunner


def main() -> int:
    assert __doc__ is not None
    about = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog=about[2])
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help="see `bench --list`")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--choices", nargs="+", default=["default"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a GPU")
    shape = SHAPES[args.shape].at(args.tokens)
    torch.manual_seed(0)
    weights = shape.weights("cuda")
    rows: list[dict[str, Any]] = []
    faults = 0
    for tokens in shape.tokens:
        runner = GpuRunner(shape, weights, tokens, os.cpu_count() or 1)
        floor = floor_us(shape, runner.given.topk_ids, rates())
        row: dict[str, Any] = {"shape": args.shape, "tokens": tokens, "floor_us": round(floor, 1)}
        row |= {"us": {}, "rel_l2": {}, "faults": {}}
        wanted = dict.fromkeys(choice_of(text, runner.layer, tokens) for text in args.choices)
        for choice in wanted:  # each once, though two texts may name it
            runner.compile([choice])
            found = runner.check(choice)
            if found.fault is None:
                row["us"][str(choice)] = round(runner.time(choice), 1)
                row["rel_l2"][str(choice)] = round(found.rel_l2, 5)
                us = row["us"][str(choice)]
                said = f"{us:8.1f} us, {us / floor:.2f} x floor"
            else:
                row["faults"][str(choice)] = said = found.fault
                faults += 1
            print(f"{args.shape} {tokens:6} {said}  {choice}", flush=True)
        rows.append(row)
        if args.json:
            args.json.write_text(json.dumps(report(rows), indent=1) + "\n")
    return 1 if faults else 0


def choice_of(text: str, layer: LayerConfig, tokens: int) -> methods.Choice:
    """The choice that a text names.

    Raises:
        ValueError: it names none, or one that must not run such a call.
    """
    name, *numbers = [text] if text.startswith("{") else text.split()
    if name.startswith("{"):
        choice = methods.from_data(json.loads(name))
    elif name in NAMED:
        choice = NAMED[name](layer, tokens, *map(int, numbers))
    else:
        raise ValueError(f"choice {text!r} is unknown; accepted: {', '.join(NAMED)} and JSON")
    methods.check(layer, tokens, choice)
    return choice


NAMED: dict[str, Any] = {
    "default": choose,
    "untuned": tiles.choose,
    "tiled": tiles.tiles,
    "few": tiles.few,
    "once": lambda layer, tokens, blocks: tiles.Once(blocks),
    "flow": lambda layer, tokens, *numbers: tiles.flow(layer, *numbers),
    "pairs": lambda layer, tokens, stages: tiles.Pairs(stages),
}


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.date.today().isoformat(),
        "routing": "typical",
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
