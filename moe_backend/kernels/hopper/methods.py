"""The methods that can run a call: how each choice is stored, checked and varied.

A choice is a frozen dataclass of ints, bools and such dataclasses, and its method's name stands
before its numbers in JSON: `{"method": "tiles", "gate_up": {"m": 16, ...}, "down": {...}}`. A new
method is one entry of `METHODS`, and one of `kernel.RUN`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import combinations
from typing import Any, get_type_hints

from moe_backend.formats import Fp8BlockWeights, Nvfp4Weights
from moe_backend.kernels.cuda import build
from moe_backend.kernels.hopper import flow, once, pairs, tiles
from moe_backend.kernels.hopper.tiled import check_tiles
from moe_backend.kernels.hopper.tiles import (
    ONCE_BLOCKS,
    SHARED_BYTES,
    Few,
    Flow,
    Once,
    Pairs,
    Tile,
    Tiles,
)
from moe_backend.kernels.registry import LayerConfig

Choice = Any  # one of the `METHODS`' types
Number = int | bool


@dataclass(frozen=True)
class Method:
    """One way to run a call.

    Attributes:
        kind: type of its choices.
        check: raises ValueError with the reason if a choice would be wrong or could not run.
        ladders: the values that each number of a choice may take, ascending, by its path
            (`gate_up.m`); tuning moves one step up or down.
        others: more choices worth trying beside one, which a step of one number does not reach.
        settle: the choice with the numbers that others fix set right, so that one step of one
            number is not unsound for a reason that has one remedy.
        here: whether this installation takes the choice: some need a compiler of CUDA C++; asked
            apart from `check`, as a table is good for more than one installation.
    """

    kind: type
    check: Callable[[LayerConfig, int, Choice], None]
    ladders: dict[str, tuple[Number, ...]]
    settle: Callable[[LayerConfig, Choice], Choice]
    others: Callable[[LayerConfig, Choice], list[Choice]] = lambda layer, choice: []
    here: Callable[[Choice], bool] = lambda choice: True


def name_of(choice: Choice) -> str:
    """The method's name in `METHODS`."""
    return next(name for name, method in METHODS.items() if type(choice) is method.kind)


def to_data(choice: Choice) -> dict[str, Any]:
    """Plain data, for JSON."""
    return {"method": name_of(choice), **asdict(choice)}


def from_data(data: Any) -> Choice:
    """The inverse of `to_data`.

    Raises:
        ValueError: an unknown method, or a number that is missing, unknown or of another type.
    """
    if not isinstance(data, dict) or data.get("method") not in METHODS:
        found = data.get("method") if isinstance(data, dict) else data
        raise ValueError(f"method {found!r} is unknown; accepted: {', '.join(METHODS)}")
    numbers = {key: value for key, value in data.items() if key != "method"}
    return _build(METHODS[data["method"]].kind, numbers, "choice")


def check(layer: LayerConfig, tokens: int, choice: Choice) -> None:
    """Raises ValueError with the reason if `choice` must not run a call with so many tokens."""
    METHODS[name_of(choice)].check(layer, tokens, choice)


def sound(layer: LayerConfig, tokens: int, choice: Choice) -> bool:
    """Whether `choice` may run such a call in this installation."""
    try:
        check(layer, tokens, choice)
    except ValueError:
        return False
    return METHODS[name_of(choice)].here(choice)


def candidates(layer: LayerConfig, tokens: int) -> list[Choice]:
    """What is worth measuring for a call with so many tokens: up to 30 sound choices.

    The default comes first, then everything one step of one number away from it, then the other
    methods with the numbers of their nearest default. `combined` goes on from what was measured.
    """
    default = tiles.choose(layer, tokens)
    found = [default, *neighbours(layer, tokens, default), *_other_methods(layer, tokens, default)]
    return _sound_and_different(layer, tokens, found, found[:1])


def neighbours(layer: LayerConfig, tokens: int, choice: Choice) -> list[Choice]:
    """Sound choices one step of one number away, and the method's `others`."""
    method = METHODS[name_of(choice)]
    found = []
    for path, ladder in method.ladders.items():
        here = _leaves(choice)[path]
        for near in _next_to(here, ladder):
            found.append(method.settle(layer, _with(choice, path, near)))
    found += method.others(layer, choice)
    return _sound_and_different(layer, tokens, found, [])


def combined(layer: LayerConfig, tokens: int, base: Choice, better: list[Choice]) -> list[Choice]:
    """Choices with the changes of several of `better`, which each improve on `base`.

    Args:
        better: the fastest first; pairs of the first four of `base`'s method, and all four.
    """
    own = [choice for choice in better if type(choice) is type(base)][:4]
    found = []
    groups = [*combinations(own, 2), *([tuple(own)] if len(own) > 2 else [])]
    for group in groups:
        changes: dict[str, Number] = {}
        for choice in reversed(group):  # where two changed one number, the fastest has its way
            old = _leaves(base)
            changes |= {path: v for path, v in _leaves(choice).items() if v != old[path]}
        merged = base
        for path, value in changes.items():
            merged = _with(merged, path, value)
        found.append(METHODS[name_of(base)].settle(layer, merged))
    return _sound_and_different(layer, tokens, found, [])


def describe(choice: Choice, base: Choice | None = None) -> str:
    """The choice for a report: its method and numbers, or those that differ from `base`."""
    leaves = _leaves(choice)
    if base is not None and type(base) is type(choice):
        old = _leaves(base)
        changed = [f"{path}={value}" for path, value in leaves.items() if value != old[path]]
        return " ".join(changed) or "default"
    return " ".join([name_of(choice), *(f"{path}={value}" for path, value in leaves.items())])


def _other_methods(layer: LayerConfig, tokens: int, default: Choice) -> list[Choice]:
    """Of each other method, the default of the nearest token count that has one, up to 16 times."""
    nearest: dict[type, Choice] = {type(default): default}
    for factor in (2, 4, 8, 16):
        for other in (max(1, tokens // factor), tokens * factor):
            choice = tiles.choose(layer, other)
            nearest.setdefault(type(choice), choice)
    if layer.format == Nvfp4Weights.name and not isinstance(default, Flow):
        nearest[Flow] = tiles.flow_nvfp4(layer, tokens)
    if not isinstance(default, Pairs):
        nearest.setdefault(Pairs, tiles.pairs(layer))
    blocks = next((blocks for blocks in ONCE_BLOCKS if tokens <= 8 * blocks), None)
    if blocks and not isinstance(default, Once):
        nearest[Once] = Once(blocks)  # beyond eight tokens it never is the default
    nearest.setdefault(Tiles, tiles.tiles(layer, tokens))
    return list(nearest.values())[1:]


def _sound_and_different(
    layer: LayerConfig, tokens: int, found: list[Choice], unchecked: list[Choice]
) -> list[Choice]:
    different = dict.fromkeys(found)
    return [c for c in different if c in unchecked or sound(layer, tokens, c)]


def _next_to(here: Number, ladder: tuple[Number, ...]) -> list[Number]:
    below = [value for value in ladder if value < here]
    above = [value for value in ladder if value > here]
    return [*below[-1:], *above[:1]]


def _leaves(choice: Choice, prefix: str = "") -> dict[str, Number]:
    """Every number of a choice by its path."""
    found: dict[str, Number] = {}
    for f in fields(choice):
        value = getattr(choice, f.name)
        if is_dataclass(value):
            found |= _leaves(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = value
    return found


def _with(choice: Choice, path: str, value: Number) -> Choice:
    name, _, rest = path.partition(".")
    return replace(choice, **{name: _with(getattr(choice, name), rest, value) if rest else value})


def _build(kind: type, data: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(data, dict) or not data.keys() <= hints.keys():
        extra = sorted(data.keys() - hints.keys()) if isinstance(data, dict) else repr(data)
        raise ValueError(f"{where}: {', '.join(hints)} expected, {extra} found")
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        if name not in data:
            raise ValueError(f"{where}.{name} is missing")
        value = data[name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            value = _build(hint, value, f"{where}.{name}")
        elif type(value) is not hint:
            raise ValueError(f"{where}.{name}: {hint.__name__} expected, {value!r} found")
        values[name] = value
    return kind(**values)


def _check_slots(layer: LayerConfig, tokens: int, most: int) -> None:
    """For methods whose programs each look through all slots."""
    slots = tokens * layer.top_k
    if slots > most:
        raise ValueError(f"{tokens} tokens have {slots} slots, at most {most} accepted")


# --- Tiles ----------------------------------------------------------------------------------------


def _check_tiles(layer: LayerConfig, tokens: int, choice: Tiles) -> None:
    for label, tile in (("gate_up", choice.gate_up), ("down", choice.down)):
        limits = {"m": (16, 256), "n": (32, 256), "k": (32, 256), "warps": (4, 8)}
        for name, (low, high) in limits.items():
            value = getattr(tile, name)
            if not low <= value <= high or value.bit_count() != 1:
                raise ValueError(
                    f"{label}.{name}: a power of two from {low} to {high} expected, {value} found"
                )
        for name, high in (("stages", 8), ("per_sm", 8)):
            if not 1 <= getattr(tile, name) <= high:
                raise ValueError(
                    f"{label}.{name}: 1 to {high} expected, {getattr(tile, name)} found"
                )
        if layer.format == Nvfp4Weights.name and tile.k != 256:
            raise ValueError(f"{label}.k: NVFP4 takes steps of 256, {tile.k} found")
        if (used := _shared(layer, tile, label == "gate_up")) > SHARED_BYTES:
            raise ValueError(f"{label}: {used} bytes of shared memory, {SHARED_BYTES} there are")
        if (registers := _accumulators(layer, tile, label == "gate_up")) > 128:
            raise ValueError(f"{label}: {registers} registers of sums in a thread, 128 accepted")
    if choice.down.split:
        raise ValueError("down.split: only the first GEMM has gate and up rows")
    check_tiles(layer, choice.gate_up, choice.down)


def _shared(layer: LayerConfig, tile: Tile, first: bool) -> int:
    """Bytes of the operands of all stages; what else a program needs is small."""
    weight, operand = {Fp8BlockWeights.name: (1.0, 1), Nvfp4Weights.name: (0.5, 2)}.get(
        layer.format, (2.0, 2)
    )
    rows = 2 * tile.n if first else tile.n
    return int(tile.stages * tile.k * (rows * weight + tile.m * operand))


def _accumulators(layer: LayerConfig, tile: Tile, first: bool) -> int:
    """Registers of a thread that hold sums; FP8 has those of a step beside those of all."""
    rows = 2 * tile.n if first else tile.n
    return rows * tile.m // (32 * tile.warps) * (2 if layer.format == Fp8BlockWeights.name else 1)


def _settle_tiles(layer: LayerConfig, choice: Tiles) -> Tiles:
    """A step of the second GEMM lies within one scale of the hidden columns (`check_tiles`)."""
    if layer.format == Fp8BlockWeights.name and choice.gate_up.n % choice.down.k:
        return replace(choice, down=replace(choice.down, k=choice.gate_up.n))
    return choice


_LAUNCH = {"warps": (4, 8), "stages": (2, 3, 4, 5, 6), "per_sm": (1, 2, 3, 4)}
_TILES = Method(
    kind=Tiles,
    check=_check_tiles,
    ladders={
        "gate_up.m": (16, 32, 64, 128),
        "gate_up.n": (32, 64, 128),
        "gate_up.k": (64, 128),
        "gate_up.split": (False, True),
        **{f"gate_up.{name}": ladder for name, ladder in _LAUNCH.items()},
        "down.m": (16, 32, 64, 128),
        "down.n": (64, 128, 256),
        "down.k": (32, 64, 128),
        **{f"down.{name}": ladder for name, ladder in _LAUNCH.items()},
    },
    settle=_settle_tiles,
)


# --- Few tokens -----------------------------------------------------------------------------------

MOST_FEW_SLOTS = 256  # each program of the first launch looks through all of them


def _check_few(layer: LayerConfig, tokens: int, choice: Few) -> None:
    _check_slots(layer, tokens, MOST_FEW_SLOTS)
    for label, part in (("gate_up", choice.gate_up), ("down", choice.down)):
        for name, low, high in (("lanes", 4, 32), ("warps", 1, 8)):
            value = getattr(part, name)
            if not low <= value <= high or value.bit_count() != 1:
                raise ValueError(
                    f"{label}.{name}: a power of two from {low} to {high} expected, {value} found"
                )
        if not 1 <= part.unroll <= 8:
            raise ValueError(f"{label}.unroll: 1 to 8 expected, {part.unroll} found")
    for name, high in (("per_sm", 32), ("repeat", 16)):
        if not 1 <= getattr(choice, name) <= high:
            raise ValueError(f"{name}: 1 to {high} expected, {getattr(choice, name)} found")


_PART = {"lanes": (4, 8, 16, 32), "unroll": (1, 2, 3, 4, 5, 6, 8), "warps": (1, 2, 4)}
_FEW = Method(
    kind=Few,
    check=_check_few,
    ladders={
        **{f"gate_up.{name}": ladder for name, ladder in _PART.items()},
        **{f"down.{name}": ladder for name, ladder in _PART.items()},
        "per_sm": (8, 12, 16, 24),
        "repeat": (1, 2, 4, 8),
    },
    settle=lambda layer, choice: choice,
)


# --- Once, Flow and Pairs: CUDA C++ ---------------------------------------------------------------

_ONCE = Method(
    kind=Once,
    check=once.check,
    ladders={"blocks": ONCE_BLOCKS},
    settle=lambda layer, choice: choice,
    here=lambda choice: build.missing() is None,
)


def _check_flow(layer: LayerConfig, tokens: int, choice: Flow) -> None:
    flow.check(layer, choice)
    _check_slots(layer, tokens, tiles.FLOW_MOST_SLOTS)


def _settle_flow(layer: LayerConfig, choice: Flow) -> Flow:
    """Wider tiles have fewer stages."""
    return replace(
        choice,
        stages=min(
            choice.stages, tiles.flow(layer, choice.tokens, choice.groups, choice.blocks).stages
        ),
    )


def _other_flows(layer: LayerConfig, choice: Flow) -> list[Flow]:
    """NVFP4's items of two or four parts, which are more than one step of one number apart."""
    if layer.format != Nvfp4Weights.name:
        return []
    return [tiles.flow(layer, choice.tokens, *shape) for shape in ((2, 1), (2, 2), (4, 1))]


_FLOW = Method(
    kind=Flow,
    check=_check_flow,
    ladders={
        "tokens": (8, 16, 32, 64, 96, 128),
        "groups": (2, 3, 4),
        "blocks": (1, 2, 3),
        "stages": (2, 3, 4, 5, 6, 7, 8),
    },
    settle=_settle_flow,
    others=_other_flows,
    here=lambda choice: build.missing() is None,
)

_PAIRS = Method(
    kind=Pairs,
    check=lambda layer, tokens, choice: pairs.check(layer, choice),
    ladders={"stages": (2, 3, 4)},
    settle=lambda layer, choice: choice,
    here=lambda choice: build.missing() is None,
)

METHODS: dict[str, Method] = {
    "tiles": _TILES, "few": _FEW, "once": _ONCE, "flow": _FLOW, "pairs": _PAIRS,
}  # fmt: skip
