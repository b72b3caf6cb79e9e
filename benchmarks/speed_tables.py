"""The tables of README.md and docs/speed.md that say how fast the layers are, from measured rows.

    python benchmarks/speed_tables.py           # writes them anew from benchmarks/results
    python benchmarks/speed_tables.py --check   # exit code 1 if a table differs from its rows

A table lies between `<!-- NAME -->` and `<!-- end of NAME -->`. To measure again, run the commands
in benchmarks/results/README.md, name their files in UNIFORM, ZIPF and READ, and drop the rows that
they replace.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

from moe_backend.bench import report
from moe_backend.bench.report import CACHED, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Of one layer all rows are in one of these files, or, by the two clocks, in two.
UNIFORM = [
    RESULTS / f"{name}.json"
    for name in (
        "h200x2-2026-11-30-bench",
        "h200x2-2026-11-30-bench-later",
        "h200-2026-12-01-bench",
        "h200-2026-12-01-bench-layers",
        "h200-2026-12-01-bench-two-clocks",
    )
]
ZIPF, READ = (RESULTS / f"h200x2-2026-11-30-bench-{name}.json" for name in ("zipf", "read"))
# Layers as people call them, in the order of the tables.
LAYERS = {
    "step-3.5-ep8": "Step-3.5 FP8, EP8",
    "step-3.5-tp8-even": "Step-3.5 FP8, TP8",
    "step-3.5-tp8-padded": "Step-3.5 FP8, TP8, padded",
    "step-3.5-tp4-even": "Step-3.5 FP8, TP4",
    "step-3.5-tp4-padded": "Step-3.5 FP8, TP4, padded",
    "step-3.5-tp1": "Step-3.5 FP8, one rank",
    "deepseek-v4-flash-ep8": "DeepSeek-V4-Flash NVFP4, EP8",
    "deepseek-v4-flash-ep8-folded": "DeepSeek-V4-Flash folded into FP8, EP8",
    "deepseek-v4-flash-tp1": "DeepSeek-V4-Flash NVFP4, one rank",
    "minimax-m3-ep4": "MiniMax-M3 bf16, EP4",
    "minimax-m3": "MiniMax-M3 bf16, one rank",
    "gpt-oss-like": "gpt-oss-like bf16, one rank",
    "deepseek-v3-ep8": "DeepSeek-V3 FP8, EP8",
    "glm-class-ep8": "GLM-class FP8, EP8",
    "qwen3-235b-ep8": "Qwen3-235B FP8, EP8",
    "qwen3-235b-nvfp4-tp8": "Qwen3-235B NVFP4, TP8",
    "qwen3-235b-nvfp4-tp4": "Qwen3-235B NVFP4, TP4",
}
# Those that backends take as they are, of which the README tells.
USUAL = [name for name in LAYERS if not name.endswith(("-padded", "-folded"))]
STEP = ("step-3.5-ep8", "step-3.5-tp8-even", "step-3.5-tp4-even")


def overview(rows: list[Row]) -> str:
    """Layers by token counts: how many times as fast as the best rival, time, time over floor."""
    counts = sorted({row.tokens for row in rows})
    at = {(row.case, row.tokens): row for row in rows}
    head = ["layer", "1 token", *map(str, counts[1:])]
    names = [name for name in LAYERS if any(row.case == name for row in rows)]
    return report.under(
        head, [[LAYERS[name], *(_cell(at.get((name, n))) for n in counts)] for name in names]
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    assert isinstance(row.ours_us, float)
    assert row.faster_by is not None
    return f"**{row.faster_by:.2f}**, {row.ours_us:.0f} µs, {row.over_floor:.2f}"


def sharing(rows: list[Row]) -> str:
    """How these layers are split, in the order of STEP: `EP8, TP8 and TP4`."""
    cases = {row.case for row in rows}
    *first, last = [LAYERS[name].rpartition(" ")[2] for name in STEP if name in cases]
    return f"{', '.join(first)} and {last}" if first else last


def means(rows: list[Row]) -> str:
    """What the rows come to, in a sentence."""
    step = [row for row in rows if row.case in STEP]
    packed = [row for row in rows if row.case == "deepseek-v4-flash-ep8"]
    all_of, of_step, of_packed = (report.geometric_mean(part) for part in (rows, step, packed))
    slower = [
        f"{LAYERS[row.case]} at {row.tokens} ({row.faster_by:.3f}, beside {best[0]})"
        for row in rows
        if (by := row.faster_by) is not None and by < 1 and (best := row.best_rival) is not None
    ]
    return (
        f"In the geometric mean of these {len(rows)} cells {all_of:.2f} times as fast as the best "
        f"rival, {of_step:.2f} times in Step-3.5's at {sharing(step)}, {of_packed:.2f} times in "
        f"DeepSeek-V4-Flash's at EP8; slower in {len(slower)}"
        f"{': ' if slower else ''}{' and '.join(slower)}."
    )


def in_order(rows: list[Row]) -> list[Row]:
    """The rows by layer, with the names that people use."""
    return [replace(r, case=LAYERS[name]) for name in LAYERS for r in rows if r.case == name]


def once(measured: list[Row], cache: str) -> list[Row]:
    """The rows by one clock; raises ValueError if there are two of a cell."""
    rows = [row for row in measured if row.cache == cache]
    cells = [(row.case, row.tokens) for row in rows]
    twice = sorted(
        {f"{case} at {tokens}" for case, tokens in cells if cells.count((case, tokens)) > 1}
    )
    if twice:
        raise ValueError(
            f"{CACHED[cache]}, measured twice: {', '.join(twice)}; drop the older rows"
        )
    return rows


def blocks() -> dict[Path, dict[str, str]]:
    """What stands between the markers of each file."""
    measured = [row for file in UNIFORM for row in report.read_json(file)]
    uniform, among = (once(measured, cache) for cache in ("written", "layers"))
    zipf, read = report.read_json(ZIPF), report.read_json(READ)
    told, told_among = ([row for row in some if row.case in USUAL] for some in (uniform, among))
    return {
        ROOT / "README.md": {
            "speed": f"{overview(told)}\n\n{means(told)}",
            "among": f"{overview(told_among)}\n\n{means(told_among)}",
        },
        ROOT / "docs" / "speed.md": {
            "rows": report.table(in_order(uniform)),
            "skewed": overview(zipf),
            "read": overview(read),
            "among": report.table(in_order(among)),
        },
    }


def replaced(text: str, name: str, block: str, file: Path) -> str:
    """The text with another block; raises ValueError unless it has the markers once."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
    text, times = pattern.subn(lambda _: f"{begin}\n{block}\n\n{end}", text)
    if times != 1:
        raise ValueError(f"{file}: {times} blocks between the markers of `{name}`, one expected")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    stale = []
    for file, parts in blocks().items():
        before = after = file.read_text(encoding="utf-8")
        for name, block in parts.items():
            after = replaced(after, name, block, file)
        if after != before:
            stale.append(file.name)
            if not args.check:
                file.write_text(after, encoding="utf-8")
    if stale and args.check:
        names = ", ".join(stale)
        print(f"{names}: not what the rows say; run {Path(__file__).name}", file=sys.stderr)
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
