"""Which method runs a call, with which numbers: a tuned row's where there is one, else the default.

Asked in every call, so answers are kept: by the identity of the layer, as hashing its fields
would take longer than the rest, and by token count.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import groupby

import torch

from moe_backend.kernels.hopper import methods, table, tiles
from moe_backend.kernels.hopper.methods import Choice
from moe_backend.kernels.registry import LayerConfig

# A layer has at most one answer for every token count that an engine comes with.
MAX_LAYERS, MAX_COUNTS = 1024, 65536
# The layer is kept beside its answers: while it lives, no other object has its identity.
_answers: dict[int, tuple[LayerConfig, dict[int, Choice]]] = {}


def choose(layer: LayerConfig, tokens: int) -> Choice:
    """The choice for a call with so many tokens."""
    entry = _answers.get(id(layer))
    if entry is None:
        if len(_answers) >= MAX_LAYERS:
            _answers.clear()
        entry = _answers[id(layer)] = (layer, {})
    choice = entry[1].get(tokens)
    if choice is None:
        if len(entry[1]) >= MAX_COUNTS:
            entry[1].clear()
        choice = entry[1][tokens] = _choose(layer, tokens)
    return choice


@lru_cache
def ranges(layer: LayerConfig, most: int = 16384) -> tuple[tuple[str, int], ...]:
    """The methods that run calls with 1 to `most` tokens, each with the last such count."""
    names = groupby(range(1, most + 1), lambda n: methods.name_of(choose(layer, n)))
    return tuple((name, max(counts)) for name, counts in names)


def tuned_rows(layer: LayerConfig) -> int:
    """How many rows of the tables in use are this layer's."""
    return len(_rows(layer))


def forget() -> None:
    """Read the tables again at the next call."""
    _answers.clear()
    ranges.cache_clear()
    _tables.cache_clear()
    gpu_name.cache_clear()


@cache
def gpu_name() -> str | None:
    """As torch calls the present GPU; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _choose(layer: LayerConfig, tokens: int) -> Choice:
    row = table.nearest(_rows(layer), tokens)
    # A method may be sound where the row was measured and not with so many tokens.
    if row is not None and row.choice is not None and methods.sound(layer, tokens, row.choice):
        return row.choice
    return tiles.choose(layer, tokens)


def _rows(layer: LayerConfig) -> list[table.Row]:
    gpu = gpu_name()
    if gpu is None or layer.device != "cuda":
        return []
    rows = _tables(gpu).rows.get(table.Key.of(layer), {})
    return list(rows.values())


@cache
def _tables(gpu: str) -> table.Table:
    merged = table.Table(gpu)
    for file in table.files(gpu):
        merged.update(table.read(file, gpu))
    return merged
