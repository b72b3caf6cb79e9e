"""Which paths to use: what the user asked for, what was found, and the decision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from moe_backend.comm.checks import Outcome
from moe_backend.comm.paths import PATHS
from moe_backend.envs import ALL_REDUCE

VARIABLE = ALL_REDUCE.name

BAD: frozenset[str] = frozenset({"nan", "wrong", "error", "crash", "hang"})


@dataclass(frozen=True)
class ProbeResult:
    """What one path did: its outcome, the first finding, and seconds taken."""

    path: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    cases: int = 0

    @property
    def bad(self) -> bool:
        return self.outcome in BAD


@dataclass(frozen=True)
class Override:
    """What the user asked for.

    Attributes:
        mode: `auto` tries what there is reason to try; `probe` tries every path in child
            processes, whatever is known; `on` trusts every path; `off` leaves torch alone.
        only: if not empty, these paths and the plain ones under them, no others.
        without: not these.
    """

    mode: Literal["auto", "probe", "on", "off"] = "auto"
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def parse_override(text: str | None) -> Override:
    """The value of MOE_BACKEND_ALL_REDUCE.

    `auto`, `probe`, `on`, `off`, or names of paths separated by commas: `custom` keeps that path
    and the plain ones under it, `-custom` leaves it out.

    Raises:
        ValueError: an unknown name, or both kinds of names.
    """
    words = [word.strip() for word in (text or "auto").split(",") if word.strip()]
    if len(words) == 1 and words[0] in ("auto", "probe", "on", "off"):
        return Override(mode=words[0])  # type: ignore[arg-type]
    only = tuple(word for word in words if not word.startswith("-"))
    without = tuple(word[1:] for word in words if word.startswith("-"))
    unknown = [name for name in (*only, *without) if name not in PATHS]
    if unknown or (only and without) or "torch" in without or not words:
        raise ValueError(
            f"{VARIABLE}={text!r}: accepted are auto, probe, on, off, one or more of "
            f"{', '.join(PATHS)} to use those alone, or the same with a minus sign before each to "
            "leave them out (torch cannot be left out: everything else falls back on it)"
        )
    return Override(only=only, without=without)


class NoUsablePathError(RuntimeError):
    """What remains cannot serve: torch.distributed itself failed, or a path that was asked for."""


@dataclass(frozen=True)
class Decision:
    """Which of the candidate paths are off, each with its reason."""

    candidates: tuple[str, ...]
    off: Mapping[str, str]

    @property
    def on(self) -> tuple[str, ...]:
        return tuple(name for name in self.candidates if name not in self.off)

    def instead_of(self, path: str) -> str:
        """What serves in place of a path that is off."""
        name = PATHS[path].instead
        while name and (name in self.off or name not in self.candidates):
            name = PATHS[name].instead
        return name or "torch"

    def describe(self) -> str:
        """One line for the log: what is off, why, and what serves instead."""
        if not self.off:
            return "all paths on: " + ", ".join(self.on)
        parts = [
            f"{name} off ({self.off[name]}), {self.instead_of(name)} instead"
            for name in self.candidates
            if name in self.off
        ]
        return "; ".join(parts)


def decide(
    candidates: Iterable[str], results: Mapping[str, ProbeResult], override: Override
) -> Decision:
    """Which candidates to leave out.

    Raises:
        NoUsablePathError: torch.distributed failed, or a path that the user named did.
    """
    names = tuple(name for name in PATHS if name in set(candidates))
    if override.mode == "on":
        return Decision(names, {})
    off: dict[str, str] = {}
    wanted = _with_plain(override.only)
    for name in names:
        result = results.get(name)
        if override.mode == "off" and name != "torch":
            off[name] = f"{VARIABLE}=off"
        elif wanted and name not in wanted:
            off[name] = f"{VARIABLE}={','.join(override.only)}"
        elif name in override.without:
            off[name] = f"{VARIABLE} leaves it out"
        elif result is not None and result.bad:
            off[name] = fault(result)
            if name in override.only or name == "torch":
                raise NoUsablePathError(refusal(result, asked=name in override.only))
    return Decision(names, off)


def fault(result: ProbeResult) -> str:
    """A finding in words."""
    words = {
        "hang": "did not finish",
        "crash": "ended its process",
        "error": "failed",
        "nan": "gave NaN",
        "wrong": "gave a wrong result",
    }
    said = words.get(result.outcome, result.outcome)
    return f"{said}: {result.detail}" if result.detail else said


def refusal(result: ProbeResult, asked: bool) -> str:
    """Why the server cannot start, and the ways out."""
    if asked:
        return (
            f"{VARIABLE} asks for {result.path}, which {fault(result)}. Set {VARIABLE}=auto to "
            f"use what works here; {VARIABLE}=probe tries it again."
        )
    return (
        f"the collectives of {PATHS[result.path].what} do not work here: {result.path} "
        f"{fault(result)}. Nothing is left to fall back on. Where peer writes are lost, "
        f"NCCL_P2P_DISABLE=1 helps; {VARIABLE}=probe tries again, {VARIABLE}=on starts without "
        "the check."
    )


def _with_plain(only: tuple[str, ...]) -> set[str]:
    """The named paths and what stands in for them."""
    wanted = set(only)
    if wanted:
        wanted.add("torch")
        if wanted - {"torch", "shm", "torch_symm_mem"}:
            wanted.add("pynccl")
    return wanted
