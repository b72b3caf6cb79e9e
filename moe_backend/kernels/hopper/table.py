"""Tuned tables: for a layer's shape and a token count, the choice that was measured fastest.

A table is a JSON file for each GPU model, such as `NVIDIA_H200.json`. Some come with the package
(`tuned/` beside this file); `moe-backend tune` writes the user's own, whose rows win. A row that
is malformed, or whose choice could compute something wrong, is left out with a warning: the
built-in default runs in its place.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_backend import envs
from moe_backend.activation import Activation
from moe_backend.formats.fp8_block import Block
from moe_backend.kernels.hopper import methods
from moe_backend.kernels.hopper.methods import Choice
from moe_backend.kernels.registry import LayerConfig

logger = logging.getLogger("moe_backend")

VERSION = 1
PACKAGED = Path(__file__).parent / "tuned"
OFF = "off"
DEFAULT = "default"  # in place of a choice: the built-in one was the fastest
REACH = 2.0  # a row says nothing of calls with more or fewer tokens by more than this factor


@dataclass(frozen=True)
class Key:
    """What the kernels' speed depends on, for one GPU; the activation is next to nothing of it."""

    format: str
    num_experts: int
    num_local_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    w13_block: Block | None
    w2_block: Block | None

    @classmethod
    def of(cls, layer: LayerConfig) -> Key:
        return cls(**{name: getattr(layer, name) for name in cls.__dataclass_fields__})

    @classmethod
    def from_data(cls, data: Any) -> Key:
        """Raises ValueError: not the fields of a key."""
        expected = cls.__dataclass_fields__.keys()
        if not isinstance(data, dict) or data.keys() != expected:
            raise ValueError(f"layer: {', '.join(expected)} expected, {data!r} found")
        blocks: dict[str, Block | None] = {}
        for name in ("w13_block", "w2_block"):
            value = data[name]
            if value is not None:
                if not (isinstance(value, list) and list(map(type, value)) == [int, int]):
                    raise ValueError(f"layer.{name}: two integers expected, {value!r} found")
                value = (value[0], value[1])
            blocks[name] = value
        for name in expected - blocks.keys():
            kind = str if name == "format" else int
            if type(data[name]) is not kind:
                raise ValueError(f"layer.{name}: {kind.__name__} expected, {data[name]!r} found")
        return cls(**{**data, **blocks})

    def layer(self) -> LayerConfig:
        """A layer with this key, for the checks that want one."""
        return LayerConfig(
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            activation=Activation.from_name("silu"),
            dtype="bfloat16",
            device="cuda",
            expert_parallel=self.num_local_experts != self.num_experts,
        )


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        tokens: of the call.
        choice: the fastest; None if that was the built-in default.
        us, default_us: microseconds of the fastest and of the built-in default.
        rel_l2: relative error of the fastest against the reference.
        versions: of `moe-backend`, `torch` and `triton`; date: ISO 8601.
    """

    tokens: int
    choice: Choice | None
    us: float
    default_us: float
    rel_l2: float
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def to_data(self) -> dict[str, Any]:
        choice = {"method": DEFAULT} if self.choice is None else methods.to_data(self.choice)
        return {**vars(self), "choice": choice}

    @classmethod
    def from_data(cls, data: Any, key: Key) -> Row:
        """Raises ValueError: malformed, or the choice is not sound for a layer with this key."""
        if not isinstance(data, dict):
            raise ValueError(f"a row expected, {data!r} found")
        if data.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(
                f"{', '.join(cls.__dataclass_fields__)} expected, {', '.join(data)} found"
            )
        if type(data["tokens"]) is not int or data["tokens"] < 1:
            raise ValueError(f"tokens: an integer from 1 expected, {data['tokens']!r} found")
        for name in ("us", "default_us", "rel_l2"):
            if type(data[name]) not in (int, float):
                raise ValueError(f"{name}: a number expected, {data[name]!r} found")
        choice = None
        if data["choice"] != {"method": DEFAULT}:
            choice = methods.from_data(data["choice"])
            methods.check(key.layer(), data["tokens"], choice)
        return cls(**{**data, "choice": choice})


@dataclass
class Table:
    """The rows of one file, by key and token count."""

    gpu: str
    rows: dict[Key, dict[int, Row]] = field(default_factory=dict)

    def put(self, key: Key, row: Row) -> None:
        self.rows.setdefault(key, {})[row.tokens] = row

    def update(self, other: Table) -> None:
        """Add another table's rows; they win over this one's."""
        for key, rows in other.rows.items():
            self.rows[key] = {**self.rows.get(key, {}), **rows}

    def to_data(self) -> dict[str, Any]:
        layers = [
            {"layer": vars(key), "rows": [rows[t].to_data() for t in sorted(rows)]}
            for key, rows in self.rows.items()
        ]
        return {"version": VERSION, "gpu": self.gpu, "layers": layers}


def file_name(gpu: str) -> str:
    """Of the table of a GPU with this name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", gpu) + ".json"


def user_folder() -> Path | None:
    """Where the user's tables are; None if tables are off.

    Raises:
        RuntimeError: there is no home folder.
    """
    given = envs.TUNED.get()
    if given == OFF:
        return None
    if given is not None:
        return Path(given)
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "moe-backend" / "tuned"


def files(gpu: str) -> list[Path]:
    """The tables that there are for a GPU, those that win last."""
    try:
        own = user_folder()
    except RuntimeError:
        own = PACKAGED
    if own is None:
        return []
    found = [folder / file_name(gpu) for folder in dict.fromkeys((PACKAGED, own))]
    return [file for file in found if file.is_file()]


def read(file: Path, gpu: str) -> Table:
    """A table without what is wrong in it, of which one warning each tells."""
    table = Table(gpu)
    try:
        layers = _layers(file, gpu)
    except (OSError, ValueError) as error:
        logger.warning("%s is not used: %s", file, error)
        return table
    for i, entry in enumerate(layers):
        try:
            key = Key.from_data(entry.get("layer") if isinstance(entry, dict) else entry)
            rows = _list(entry, "rows")
        except ValueError as error:
            logger.warning("%s: layer %d is not used: %s", file, i, error)
            continue
        for j, row in enumerate(rows):
            try:
                table.put(key, Row.from_data(row, key))
            except ValueError as error:
                logger.warning("%s: layer %d, row %d is not used: %s", file, i, j, error)
    return table


def is_table(file: Path, gpu: str) -> bool:
    """Whether `file` is a table for this GPU, whatever its rows are."""
    try:
        _layers(file, gpu)
    except (OSError, ValueError):
        return False
    return True


def write(file: Path, table: Table) -> None:
    """Replace the file, or leave it as it was; readers never see half of it.

    Raises:
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(table.to_data(), indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def nearest(rows: Iterable[Row], tokens: int) -> Row | None:
    """The row measured nearest to `tokens` by ratio, if that is at most `REACH`.

    Time goes with slots per expert, so what matters of two token counts is their ratio: between
    rows of 8 and 32 tokens the border is at 16. At the border the row with fewer tokens counts.
    """
    if tokens == 0:
        return None
    found = min(rows, key=lambda r: (abs(math.log(r.tokens / tokens)), r.tokens), default=None)
    if found is None or not tokens / REACH <= found.tokens <= tokens * REACH:
        return None
    return found


def _layers(file: Path, gpu: str) -> list[Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("version") != VERSION:
        version = data.get("version") if isinstance(data, dict) else None
        raise ValueError(f"version {VERSION} expected, {version!r} found")
    if data.get("gpu") != gpu:
        raise ValueError(f"a table for {gpu!r} expected, {data.get('gpu')!r} found")
    return _list(data, "layers")


def _list(data: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(data.get(name), list):
        raise ValueError(f"{name}: a list expected, {data.get(name)!r} found")
    found = data[name]
    assert isinstance(found, list)
    return found
