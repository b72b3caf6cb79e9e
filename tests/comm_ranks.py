"""Run a function on several ranks of real vLLM groups over gloo, each rank a process."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comm_fork
import pytest

MARK = "--- scenario"
Scenario = tuple[tuple[Any, ...], dict[str, str]]  # arguments, environment


@dataclass(frozen=True)
class Ended:
    """How one rank ended: its exit code, what the function returned, and what it printed."""

    exit_code: int | None
    value: Any
    output: str


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    folder: Path,
    *args: Any,
    env: dict[str, str] | None = None,
    timeout_s: float = 60,
) -> list[Ended]:
    """Call `function(rank, ranks, *args)` on every rank inside an initialised world group."""
    context = comm_fork.context()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"XDG_CACHE_HOME": str(folder / "cache"), **(env or {})}
    processes = []
    for rank in range(ranks):
        job = (function, rank, ranks, port, folder, settings, args)
        processes.append(context.Process(target=_main, args=job, daemon=True))
        processes[-1].start()
    ended = []
    for rank, process in enumerate(processes):
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
        value = folder / f"value.{port}.{rank}"
        ended.append(
            Ended(
                process.exitcode,
                pickle.loads(value.read_bytes()) if value.exists() else None,
                (folder / f"output.{port}.{rank}").read_text(errors="replace"),
            )
        )
    for file in Path("/dev/shm").glob(f"{_ident(port)}-*"):  # of ranks that died
        file.unlink(missing_ok=True)
    return ended


def _ident(port: int) -> str:
    """How vLLM is to call this run's shared memory."""
    return f"moe-backend-test-{port}"


def run_scenarios(
    function: Callable[..., Any], ranks: int, folder: Path, scenarios: list[Scenario]
) -> list[list[Ended]]:
    """`run_ranks` for each scenario, in the same processes: one list of ranks per scenario."""
    ended = run_ranks(_one_after_another, ranks, folder, function, scenarios)
    if any(one.exit_code for one in ended):
        raise AssertionError("\n".join(one.output for one in ended))
    outputs = [one.output.split(MARK)[1:] for one in ended]
    return [
        [Ended(0, ended[r].value[number], outputs[r][number]) for r in range(ranks)]
        for number in range(len(scenarios))
    ]


def _one_after_another(
    rank: int, ranks: int, function: Callable[..., Any], scenarios: list[Scenario]
) -> list[Any]:
    from vllm.distributed import parallel_state

    from moe_backend.engines import vllm_comm_start

    values = []
    for number, (args, env) in enumerate(scenarios):
        print(MARK, flush=True)
        vllm_comm_start._found_bad.clear()
        vllm_comm_start._tried.clear()
        cache = Path(os.environ["XDG_CACHE_HOME"]).with_name(f"cache{number}")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"XDG_CACHE_HOME": str(cache), **env}.items():
                patch.setenv(name, value)
            values.append(function(rank, ranks, *args))
        parallel_state.destroy_model_parallel()
    return values


def _main(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    port: int,
    folder: Path,
    settings: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    output = os.open(folder / f"output.{port}.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.pop("MOE_BACKEND_ALL_REDUCE", None)
    os.environ.update(settings, VLLM_DIST_IDENT=_ident(port))
    try:
        value = _in_world(function, rank, ranks, port, args)
        (folder / f"value.{port}.{rank}").write_bytes(pickle.dumps(value))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _in_world(
    function: Callable[..., Any], rank: int, ranks: int, port: int, args: tuple[Any, ...]
) -> Any:
    import logging

    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    from moe_backend.engines import vllm_comm, vllm_cpu

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("vllm").propagate = True
    torch.set_num_threads(1)
    current_platform.import_kernels()
    vllm_cpu.register()
    vllm_comm.register()
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo"
        )
        return function(rank, ranks, *args)
