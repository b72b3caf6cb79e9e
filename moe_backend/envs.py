"""Every environment variable that this package reads, in one table."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One variable: its name, what it does, and what happens when it is unset."""

    name: str
    meaning: str
    unset: str

    def get(self) -> str | None:
        """The value, or None when unset or empty."""
        return os.environ.get(self.name) or None


KERNEL = Variable(
    "MOE_BACKEND_KERNEL",
    "use this kernel in every layer; a layer that it cannot run is refused",
    "the first, in a fixed order of preference, that does not refuse the layer",
)

NVFP4 = Variable(
    "MOE_BACKEND_NVFP4",
    "how NVFP4 experts are kept: packed (4 bits, as in the checkpoint), folded (converted to FP8 "
    "128x128 while loading), unpacked (converted to the activations' dtype), or auto",
    "auto: on a GPU folded where its memory fits and steps bring many tokens per expert, on a CPU "
    "unpacked where a quarter of the free memory is enough, else packed",
)

ALL_REDUCE = Variable(
    "MOE_BACKEND_ALL_REDUCE",
    "which collective paths vLLM may use: auto, probe, on, off, or names of paths "
    "(`custom`, or `-custom` to leave it out)",
    "auto: what was built is tried with known sums when a group starts",
)

WARMUP = Variable(
    "MOE_BACKEND_WARMUP",
    "seconds that compiling the kernels of one kind of layer may take when it is loaded; "
    "0: each is compiled at its first use",
    "120",
)

TUNED = Variable(
    "MOE_BACKEND_TUNED",
    "folder of the user's tuned tables, one JSON file for each GPU model, whose rows win over the "
    "package's; off: neither is used",
    "$XDG_CONFIG_HOME/moe-backend/tuned, else ~/.config/moe-backend/tuned; then the package's own",
)

VARIABLES = (KERNEL, NVFP4, ALL_REDUCE, WARMUP, TUNED)
