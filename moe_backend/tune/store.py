"""A run's rows into a table that other runs write as well.

A table is small and is written whole. So it is read again before each write, and whoever does that
holds a lock, a file beside it: two runs lose none of each other's rows. Rows that this version
cannot use stay as they are: another version may.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_backend.kernels.hopper import table
from moe_backend.kernels.hopper.table import Key, Table


def add(file: Path, mine: Table) -> int:
    """Add rows to a file, in place of those for as many tokens; returns how many it has then.

    Raises:
        ValueError: the file is no table for this GPU.
        OSError: it cannot be read or written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        refuse_foreign(file, mine.gpu)
        if not file.exists():
            table.write(file, mine)
            return sum(map(len, mine.rows.values()))
        data = json.loads(file.read_text(encoding="utf-8"))
        data["layers"] = _merged(data["layers"], mine)
        table.write(file, _Raw(mine.gpu, data=data))
    return sum(len(_rows(entry)) for entry in data["layers"])


def refuse_foreign(file: Path, gpu: str) -> None:
    """Raises ValueError if `file` exists and is not a table for this GPU."""
    if file.exists() and not table.is_table(file, gpu):
        raise ValueError(
            f"{file} exists and is not a version {table.VERSION} table for {gpu}; it would be "
            "written over. Give another --out, or move it away."
        )


@dataclass
class _Raw(Table):
    """A table as it is in its file, whatever its rows are."""

    data: dict[str, Any] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        return self.data


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time; the lock's file stays, as deleting it would let two in."""
    with (file.parent / f".{file.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: better than no row
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _merged(layers: list[Any], mine: Table) -> list[Any]:
    """A file's layers with my rows among them."""
    left = dict(mine.rows)
    out = []
    for entry in reversed(layers):  # of two with one key, the last one counts
        key = _key(entry)
        if key is not None and key in mine.rows:
            own = left.pop(key, {})
            kept = [row for row in _rows(entry) if _tokens(row) not in mine.rows[key]]
            rows = [*kept, *(row.to_data() for row in own.values())]
            entry = {**entry, "rows": sorted(rows, key=_tokens)}
        out.append(entry)
    added = Table(mine.gpu, left).to_data()["layers"]
    return [*reversed(out), *added]


def _key(entry: Any) -> Key | None:
    """Of a layer that rows can be added to; None for what `table.read` leaves out whole."""
    try:
        if isinstance(entry, dict) and isinstance(entry.get("rows"), list):
            return Key.from_data(entry.get("layer"))
    except ValueError:
        pass
    return None


def _rows(entry: Any) -> list[Any]:
    rows = entry.get("rows") if isinstance(entry, dict) else None
    return rows if isinstance(rows, list) else []


def _tokens(row: Any) -> int:
    """0 for a row without a count: it stays, before the others."""
    tokens = row.get("tokens") if isinstance(row, dict) else None
    return tokens if type(tokens) is int else 0
