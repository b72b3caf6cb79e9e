"""Scripts in processes forked from one that has imported vLLM, which takes each process seconds.

    result = warm_vllm.run("-c", CODE, "argument", MOE_BACKEND_NVFP4="packed")

As `python -c CODE argument` with such variables, but for what is read when vLLM is imported.
With `fork_ranks` its ranks are forks too; vLLM itself starts new interpreters on a CPU.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# A fork has none of OpenMP's threads, so there must be none to lack.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}


def run(
    *command: str, timeout: float = 280, fork_ranks: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """`command` is a script or `-c` and code, and arguments."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        job = {
            "command": command,
            "fork_ranks": fork_ranks,
            "env": {**os.environ, **ENVIRONMENT, **env},
            "files": [*map(str, files)],
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        try:
            if not select.select([server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(command, timeout, *(f.read_bytes() for f in files))
            code = int(server.stdout.readline())
        except BaseException:  # pytest's own limit among them
            _server.cache_clear()
            _stop(server)
            raise
        return subprocess.CompletedProcess(command, code, *(f.read_text() for f in files))


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    """And the process of a script that has not ended."""
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    server.wait()


def serve() -> dict[str, Any]:
    """Fork for each job; returns in the forks alone, with their job."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports may print
    # What starting an engine imports.
    import vllm.entrypoints.llm
    import vllm.model_executor.models.step3p5
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            return job
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=replies, flush=True)
    sys.exit()


def main() -> None:
    job = serve()
    for number, path in zip((0, 1, 2), [os.devnull, *job["files"]], strict=True):
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags if number else os.O_RDONLY), number)
    os.environ.clear()
    os.environ.update(job["env"])
    if job["fork_ranks"]:
        from vllm.v1.executor import multiproc_executor

        multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    script, *arguments = job["command"]
    if script == "-c":
        code, *arguments = arguments
        sys.argv, sys.path[0] = ["-c", *arguments], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
