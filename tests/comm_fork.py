"""A server process with torch and vLLM loaded, from which the ranks of the tests are forked.

A rank is then ready in a tenth of a second; importing vLLM takes each process several.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest


def context() -> ForkServerContext:
    """The context whose processes come from that server; starts it if need be."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["comm_preload"])
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.13 the server does not look in this process's sys.path.
        patch.setenv("PYTHONPATH", python_path())
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    return forks


@functools.cache
def wait_until_ready() -> None:
    """Loading takes the server seconds, which tests of time limits must not count."""
    process = context().Process(target=int)
    process.start()
    process.join()


def python_path() -> str:
    """PYTHONPATH with this folder in front."""
    with contextlib.suppress(KeyError):
        return f"{Path(__file__).parent}{os.pathsep}{os.environ['PYTHONPATH']}"
    return str(Path(__file__).parent)
