"""Find the fastest right choice for one layer shape and token count.

First the default, everything one step away from it and the other methods; then what the better ones
make together, and, where another method won, everything one step away from that. A choice is timed
only after its output was found right, and replaces the default only if it is faster by more than
noise in a second measurement, in turns with the default.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from moe_backend.kernels.hopper import methods
from moe_backend.kernels.hopper.methods import Choice
from moe_backend.kernels.hopper.table import Row
from moe_backend.kernels.registry import LayerConfig

FASTER = 0.98  # of the default's time: medians of one choice differ by up to a percent
TURNS = 3
FINALISTS = 3


class Lost(RuntimeError):
    """The GPU takes no more work from this process."""


@dataclass(frozen=True)
class Checked:
    """What became of one choice's output.

    Attributes:
        rel_l2: relative L2 error against the reference.
        fault: why the choice must not be used, or None.
    """

    rel_l2: float
    fault: str | None = None


class Runner(Protocol):
    """One layer with the inputs of one token count."""

    def compile(self, choices: list[Choice]) -> None:
        """Compile what the choices need, many at a time; errors are left for `check`."""

    def check(self, choice: Choice) -> Checked:
        """Run the choice repeatedly and compare; whatever goes wrong is raised or a fault."""

    def time(self, choice: Choice) -> float:
        """Microseconds of a choice that was found right."""


@dataclass
class Outcome:
    """What was found for one token count.

    Attributes:
        row: for the table; None if the default itself is not right.
        tried: choices that were run; rejected: reasons by choice.
    """

    row: Row | None = None
    tried: int = 0
    rejected: dict[Choice, str] = field(default_factory=dict)


def tune(
    runner: Runner,
    layer: LayerConfig,
    tokens: int,
    versions: dict[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Measure the choices for one token count.

    Args:
        versions: for the row.
        progress: told how many choices were tried and how many are to be.

    Raises:
        Lost: the GPU failed; what was tried last is in the message.
    """
    outcome = Outcome()
    times: dict[Choice, float] = {}
    errors: dict[Choice, float] = {}
    total = 0

    def measure(choices: list[Choice]) -> None:
        nonlocal total
        new = [c for c in choices if c not in times and c not in outcome.rejected]
        total += len(new)
        progress(outcome.tried, total)
        runner.compile(new)
        for choice in new:
            try:
                checked = runner.check(choice)
                if checked.fault is None:
                    times[choice] = runner.time(choice)
                    errors[choice] = checked.rel_l2
                else:
                    outcome.rejected[choice] = checked.fault
            except Lost as error:
                raise Lost(f"{error}, in {methods.describe(choice)}, {tokens} tokens") from error
            except Exception as error:  # whatever a compiler or driver raises
                text = " ".join(str(error).split()) or "no message"
                outcome.rejected[choice] = f"{type(error).__name__}: {text}"[:300]
            outcome.tried += 1
            progress(outcome.tried, total)

    first = methods.candidates(layer, tokens)
    default = first[0]
    measure(first)
    if default not in times:
        return outcome
    better = _better(times, default)
    more = methods.combined(layer, tokens, default, better)
    if better and type(better[0]) is not type(default):
        more += methods.neighbours(layer, tokens, better[0])
    measure(more)
    winner, us, default_us = None, times[default], times[default]
    for choice in _better(times, default)[:FINALISTS]:
        again = [(runner.time(default), runner.time(choice)) for _ in range(TURNS)]
        default_again, choice_again = (median(turn) for turn in zip(*again, strict=True))
        if choice_again <= FASTER * default_again and (winner is None or choice_again < us):
            winner, us, default_us = choice, choice_again, default_again
    outcome.row = Row(
        tokens=tokens,
        choice=winner,
        us=round(us, 2),
        default_us=round(default_us, 2),
        rel_l2=round(errors[default if winner is None else winner], 6),
        versions=versions,
        date=datetime.date.today().isoformat(),
    )
    return outcome


def _better(times: dict[Choice, float], default: Choice) -> list[Choice]:
    """The choices that seem faster than the default by more than noise, the fastest first."""
    limit = FASTER * times[default]
    return sorted((c for c in times if times[c] <= limit), key=times.__getitem__)
