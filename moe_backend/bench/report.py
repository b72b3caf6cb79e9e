"""Rows of results: as JSON, as lines, as a Markdown table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# Ways of filling L2 before a call, which `measure` has, in a report's words.
CACHED = {"written": "L2 written", "read": "L2 read", "layers": "among layers"}


@dataclass
class Row:
    """One layer, routing and token count.

    Attributes:
        floor_us: the least time it can take.
        ours_us: of this package; `wrong`, or None where it could not run (`notes["ours"]`).
        rivals: of each other backend, likewise.
        rel_l2: relative L2 error of our output.
        kernel: of ours, with what it chose for this many tokens.
        notes: by backend, why it could not run, or what it chose.
        device, versions, date, rates: of the run; rates are those that the floor assumes.
        cache: how L2 was filled before each call, one of CACHED.
    """

    case: str
    tokens: int
    routing: str
    floor_us: float
    ours_us: float | str | None = None
    rivals: dict[str, float | str | None] = field(default_factory=dict)
    rel_l2: float | None = None
    kernel: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    date: str = ""
    cache: str = "written"

    @property
    def best_rival(self) -> tuple[str, float] | None:
        """Name and microseconds of the fastest right one."""
        timed = {name: us for name, us in self.rivals.items() if isinstance(us, float)}
        return min(timed.items(), key=lambda item: item[1]) if timed else None

    @property
    def faster_by(self) -> float | None:
        """The best rival's time over ours."""
        best = self.best_rival
        return best[1] / self.ours_us if best and isinstance(self.ours_us, float) else None

    @property
    def method(self) -> str:
        """Of a kernel that has several, ours: `Flow` of `hopper: Flow(tokens=8, ...)`."""
        return self.kernel.partition(": ")[2].partition("(")[0]

    @property
    def over_floor(self) -> float | None:
        return self.ours_us / self.floor_us if isinstance(self.ours_us, float) else None


def write_json(rows: Iterable[Row], file: Path) -> None:
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_json(file: Path) -> list[Row]:
    """Rows that `write_json` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    known = {f.name for f in fields(Row)}
    try:
        data = json.loads(file.read_text())
        if not isinstance(data, list):
            raise ValueError("a list of rows expected")
        return [_row({k: v for k, v in row.items() if k in known}) for row in data]
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: not a file of `moe-backend bench --json`: {error}") from None


def _row(data: dict[str, Any]) -> Row:
    row = Row(**data)
    if row.cache not in CACHED:
        raise ValueError(f"cache {row.cache!r} found, accepted: {', '.join(CACHED)}")
    row.ours_us = _number(row.ours_us)
    row.rivals = {name: _number(us) for name, us in row.rivals.items()}
    return row


def _number(us: float | str | None) -> float | str | None:
    return float(us) if isinstance(us, int) else us


def geometric_mean(rows: Iterable[Row]) -> float | None:
    """Of `faster_by`, over the rows that have one; None without any."""
    ratios = [row.faster_by for row in rows]
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def summary(rows: list[Row]) -> list[str]:
    """What the rows come to, one fact a line."""
    out = []
    compared = [row for row in rows if row.faster_by is not None]
    caches = dict.fromkeys(row.cache for row in compared)
    for cache in caches:
        of_it = [row for row in compared if row.cache == cache]
        ahead = sum(row.faster_by >= 1 for row in of_it if row.faster_by is not None)
        where = f"{CACHED[cache]}: " if len(caches) > 1 else ""
        out.append(
            f"{where}{geometric_mean(of_it):.2f} times the best rival's speed (geometric mean of "
            f"{len(of_it)} rows); not slower in {ahead} of them"
        )
    by = {row.cache for row in rows}

    def place(row: Row) -> str:
        held = f", {CACHED[row.cache]}" if len(by) > 1 else ""
        return f"{row.case} {row.routing} at {row.tokens} tokens{held}"

    wrong = [place(row) for row in rows if row.ours_us == "wrong"]
    failed = [place(row) for row in rows if row.ours_us is None]
    out += [f"ours is WRONG: {where}" for where in wrong]
    out += [f"ours could not run: {where}" for where in failed]
    return out


def line(row: Row) -> str:
    """A row as one line of text."""
    held = "" if row.cache == "written" else f" ({CACHED[row.cache]})"
    text = f"{row.case:22} {row.routing:7} {row.tokens:6}{held} floor {row.floor_us:7.1f}"
    if isinstance(row.ours_us, float):
        text += f"  ours {row.ours_us:7.1f} ({row.over_floor:.2f}x floor)"
    else:
        text += f"  ours {row.ours_us or 'failed: ' + row.notes.get('ours', '')}"
    if (best := row.best_rival) is not None:
        text += f"  best rival {best[1]:7.1f} {best[0]}"
        if row.faster_by is not None:
            text += f" ({row.faster_by:.2f}x ours)"
    wrong = [name for name, us in row.rivals.items() if us == "wrong"]
    return text + (f"  wrong: {', '.join(wrong)}" if wrong else "")


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table, with where and when they were measured."""
    lines = [table(rows)]
    runs = dict.fromkeys(
        f"{row.device}, {row.date}: " + ", ".join(f"{k} {v}" for k, v in row.versions.items())
        for row in rows
    )
    held = " or ".join(dict.fromkeys(CACHED[row.cache] for row in rows))
    lines += ["", f"Microseconds a layer in CUDA graph replay, {held} (`bench --cache`)."]
    lines += [*runs, *summary(rows)]
    return "\n".join(lines) + "\n"


def table(rows: list[Row]) -> str:
    """A line of a Markdown table for each row, in microseconds."""
    routed, cached = (len({getattr(r, name) for r in rows}) > 1 for name in ("routing", "cache"))
    named = any(row.method for row in rows)
    head = ["layer", *(["routing"] if routed else []), *(["cache"] if cached else [])]
    head += ["tokens", "floor", "ours", *(["method"] if named else []), "× floor"]
    head += ["best rival", "ours is faster by"]
    found = []
    for row in rows:
        best, over, by = row.best_rival, row.over_floor, row.faster_by
        cells = [row.case, *([row.routing] if routed else []), *([row.cache] if cached else [])]
        cells += [str(row.tokens), f"{row.floor_us:.1f}"]
        cells += [_cell(row.ours_us), *([row.method] if named else [])]
        cells += ["–" if over is None else f"{over:.2f}"]
        cells += [f"{best[1]:.1f} {best[0]}" if best else "–", "–" if by is None else f"{by:.2f}"]
        found.append(cells)
    return under(head, found)


def under(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table of these cells."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def _cell(us: float | str | None) -> str:
    return f"{us:.1f}" if isinstance(us, float) else us or "failed"
