"""`vllm serve` for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

STOP_S = 60


class NotUp(RuntimeError):
    """The server ended, or did not answer in time."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serving(
    model: str,
    options: list[str],
    port: int,
    limit_s: float,
    log: Path | None = None,
    env: dict[str, str] | None = None,
    own_session: bool = True,
) -> Iterator[float]:
    """Start a server on this machine; gives the seconds until it answered.

    Args:
        limit_s: seconds that it may take until it answers.
        log: gets its output; None leaves it with this process's.
        env: its environment; None leaves this process's.
        own_session: what the server started is ended with it. False where somebody ends this
            process together with its group, in which the server then stays.
    Raises:
        NotUp: it ended, or did not answer within `limit_s`.
    """
    # The `vllm` command is not on every PATH.
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(log.open("w")) if log else None
        began = time.monotonic()
        server = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT if sink else None,
            env=env,
            start_new_session=own_session,
        )
        try:
            wait_until_up(port, server, began + limit_s)
            yield time.monotonic() - began
        finally:
            stop(server, own_session)


def wait_until_up(port: int, server: subprocess.Popen[bytes], until: float) -> None:
    while time.monotonic() < until:
        if server.poll() is not None:
            raise NotUp(f"the server ended with exit code {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise NotUp("the server did not answer in time")


def stop(server: subprocess.Popen[bytes], group: bool) -> None:
    """End the server, and with `group` whatever else is left in its process group."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_S)
    if group:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    server.kill()
    server.wait()
