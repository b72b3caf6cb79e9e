"""Where this package keeps things of its user, if anywhere: a container may have no home folder."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path | None:
    """The user's home folder; None without HOME and without an entry in the list of users."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_root() -> Path | None:
    """`$XDG_CACHE_HOME/moe-backend`, else `~/.cache/moe-backend`; None without a home folder.

    With a hyphen: not to be taken for the package.
    """
    given, own = os.environ.get("XDG_CACHE_HOME"), home()
    if given:
        return Path(given) / "moe-backend"
    return None if own is None else own / ".cache" / "moe-backend"
