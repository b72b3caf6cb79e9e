"""The tiny model on several GPUs through vLLM, once for each way of doing its collectives.

    python benchmarks/gpu_parallel.py OUT.jsonl --tp 2 [--budget 560] [--only fp8-block off]

First the stand-alone probe, then one server after another, the most telling first, each with CUDA
graphs and with MOE_BACKEND_ALL_REDUCE set to something else. All must give the greedy tokens of
the first server of their format, and the path that is under test must have reduced something. One
JSON row per run goes to OUT; calling it again with the same file goes on where it stopped, and
`--budget` ends the call before a run that would not finish in time. `--list` shows what there is.
Exit code 0: all that was asked for has run, and is right or not there on this machine. 1: something
is wrong. 3: some is left.

Paths that vLLM leaves out on such a machine, and what makes them run here:

* `symm_mem`: vLLM 0.33 wants NVLink multicast, although its two-shot kernel needs none. Multicast
  stays off (on a shared host a fault of it is not confined to one process), and the worker has vLLM
  take the two-shot kernel all the same.
* `pynccl`: vLLM 0.33 wants NCCL 2.29.7 or later (`ncclCommSuspend`), torch 2.11 brings 2.28.9. Give
  a newer library with `--nccl /path/to/libnccl.so.2`.
* `quick` and `aiter` exist on ROCm only, `flashinfer` where that package is installed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
TINY = EXAMPLES / "tiny_step" / "checkpoint"
VARIABLE = "MOE_BACKEND_ALL_REDUCE"
FIRST_START_S = 150.0  # of a run, until one has been timed
LINES = ("collectives of", "all-reduce backends", "kernel=", "a path hangs", "graph capturing")


@dataclass(frozen=True)
class Run:
    """One server, tensor parallel unless `data_parallel`, which is with its experts spread.

    `reduces`: the path of which the run is the test, if it is of one. `faulty`: vLLM's own kernels
    give the wrong sign on rank 1, and the start has to find out.
    """

    format: str
    setting: str = "unset"
    expert_parallel: bool = False
    data_parallel: bool = False
    reduces: str = ""
    faulty: bool = False

    @property
    def name(self) -> str:
        layout = " dp ep" if self.data_parallel else " ep" if self.expert_parallel else ""
        return f"{self.format}{layout} {self.setting}{' faulty' if self.faulty else ''}"


RUNS = (
    Run("fp8-block", reduces="custom"),
    Run("fp8-block", "off", reduces="torch"),
    Run("fp8-block", "pynccl", reduces="pynccl"),
    Run("fp8-block", "symm_mem", reduces="symm_mem"),
    Run("fp8-block", "-custom"),
    Run("fp8-block", expert_parallel=True, reduces="custom"),
    Run("fp8-block", "auto", faulty=True),
    Run("fp8-block", data_parallel=True),
    Run("fp8-block", "probe", reduces="custom"),
    Run("nvfp4-ct", reduces="custom"),
    Run("bf16", reduces="custom"),
    Run("fp8-block", "custom", reduces="custom"),
    Run("fp8-block", "off", expert_parallel=True, reduces="torch"),
    Run("nvfp4-ct", "off", reduces="torch"),
    Run("nvfp4-ct", expert_parallel=True, reduces="custom"),
    Run("bf16", "off", reduces="torch"),
    Run("nvfp4-modelopt", reduces="custom"),
    Run("fp8-block", "flashinfer", reduces="flashinfer"),
    Run("fp8-block", "on", reduces="custom"),
    Run("fp8-block", "-pynccl", reduces="custom"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", help="JSON lines; read, then appended to")
    parser.add_argument("--tp", type=int, default=2, help="GPUs")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--budget", type=float, default=560, metavar="S", help="of this call")
    parser.add_argument(
        "--only", nargs="*", metavar="WORD", help="runs whose name has all the words"
    )
    parser.add_argument("--again", action="store_true", help="repeat the runs that were wrong")
    parser.add_argument("--no-probe", action="store_true", help="without the stand-alone probe")
    parser.add_argument("--nccl", type=Path, metavar="LIB", help="another libnccl.so.2")
    parser.add_argument(
        "--no-compile", action="store_true", help="CUDA graphs without torch.compile"
    )
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the converted models here")
    parser.add_argument("--list", action="store_true", help="show the runs, and which OUT has")
    args = parser.parse_args()
    if args.out is None:
        parser.error("OUT is missing")
    return Session(args).go()


class Session:
    """One call: what is wanted, what is there, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.ends = time.monotonic() + args.budget
        self.rows: list[dict[str, Any]] = []
        if args.out.exists():
            self.rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        words = args.only or []
        self.runs = [run for run in RUNS if all(word in run.name.split() for word in words)]

    def go(self) -> int:
        if self.args.list:
            for run in self.runs:
                row = self.row_of(run.name)
                word = "-" if row is None else "absent" if row.get("absent") else "wrong"
                print(f"{'ok' if row and row['ok'] else word:8}{run.name}")
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            models = self.args.models or Path(scratch)
            models.mkdir(parents=True, exist_ok=True)
            if not self.args.no_probe and self.is_due("probe"):
                self.add("probe", self.probe(Path(scratch)))
            for run in self.runs:
                if not self.is_due(run.name):
                    continue
                row = None
                if self.ends - time.monotonic() >= self.longest():
                    row = self.run(run, models, Path(scratch))
                if row is None:
                    print(f"{run.name}: no time left in this call", flush=True)
                    return 3
                self.add(run.name, row)
        mine = [self.row_of(run.name) for run in self.runs]
        return 0 if all(row and (row["ok"] or row.get("absent")) for row in mine) else 1

    def is_due(self, name: str) -> bool:
        row = self.row_of(name)
        return row is None or (self.args.again and not row["ok"])

    def row_of(self, name: str) -> dict[str, Any] | None:
        """The last row of that run with these settings, if it has run."""
        wanted = (name, self.args.tp, self.args.prompts, not self.args.no_compile)
        for row in reversed(self.rows):
            if (row["name"], row["tp"], row["prompts"], row["compiled"]) == wanted:
                return row
        return None

    def longest(self) -> float:
        """Seconds to keep free for the next run: those of the longest so far."""
        taken = [row["seconds"] for row in self.rows if row["name"] != "probe"]
        return max(taken) if taken else min(FIRST_START_S, 0.9 * self.args.budget)

    def left(self) -> float:
        """Seconds that a run may take."""
        return max(30.0, self.ends - time.monotonic())

    def add(self, name: str, row: dict[str, Any]) -> None:
        row = {
            "name": name,
            "tp": self.args.tp,
            "prompts": self.args.prompts,
            "compiled": not self.args.no_compile,
            **row,
            "date": datetime.date.today().isoformat(),
        }
        self.rows.append(row)
        with self.args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        shown = {k: v for k, v in row.items() if k not in ("tokens", "log", "probe", "versions")}
        print(json.dumps(shown), flush=True)

    def probe(self, scratch: Path) -> dict[str, Any]:
        """`python -m moe_backend.comm`."""
        out = scratch / "probe.json"
        command = [sys.executable, "-m", "moe_backend.comm", "--world-size", str(self.args.tp)]
        began = time.monotonic()
        code, said = call([*command, "--json", str(out)], environment(self.args.nccl), self.left())
        return {
            "ok": code == 0,
            "seconds": round(time.monotonic() - began, 1),
            "probe": json.loads(out.read_text()) if out.exists() else said[-2000:],
        }

    def run(self, run: Run, models: Path, scratch: Path) -> dict[str, Any] | None:
        """The row of one server; None if the time was up before it was done."""
        model = TINY if run.format == "bf16" else models / run.format
        if not model.exists():
            command = [sys.executable, "-m", "moe_backend.cli", "convert", str(TINY), str(model)]
            subprocess.run(
                [*command, "--to", run.format], check=True, env=environment(self.args.nccl)
            )
        answer = scratch / "answer.json"
        answer.unlink(missing_ok=True)
        job = {
            "model": str(model),
            "ranks": self.args.tp,
            "expert_parallel": run.expert_parallel,
            "data_parallel": run.data_parallel,
            "no_compile": self.args.no_compile,
            "prompts": self.args.prompts,
            "answer": str(answer),
        }
        env = environment(self.args.nccl)
        env["XDG_CACHE_HOME"] = str(scratch)  # no verdict of another run
        env["VLLM_CACHE_ROOT"] = os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache/vllm"))
        if run.setting != "unset":
            env[VARIABLE] = run.setting
        if run.reduces == "symm_mem" and env["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1":
            env["GPU_PARALLEL_TWO_SHOT"] = "1"
        if run.faulty:
            env["GPU_PARALLEL_FAULTY"] = "1"
        began = time.monotonic()
        command = [sys.executable, str(HERE / "gpu_parallel_serve.py"), json.dumps(job)]
        code, said = call(command, env, self.left())
        if code is None:
            return None
        row: dict[str, Any] = {"run": asdict(run), "ok": False, "log": telling(said)}
        if answer.exists():
            row.update(json.loads(answer.read_text()))
            row.update(self.judge(run, row))
        else:
            row["error"] = f"exit code {code}: {said[-3000:]}"
        return {**row, "seconds": round(time.monotonic() - began, 1)}

    def judge(self, run: Run, row: dict[str, Any]) -> dict[str, Any]:
        """Whether the tokens are those of the first run of the format, on the path under test."""
        first = next(
            (
                r
                for r in self.rows
                if r.get("run", {}).get("format") == run.format and "tokens" in r
            ),
            row,
        )
        pairs = list(zip(first["tokens"], row["tokens"], strict=False))
        differ = [number for number, (a, b) in enumerate(pairs) if a != b]
        used = not run.reduces or row["calls"].get(run.reduces, 0) > row["checked"]
        used = used or row["devices"] == ["cpu"]  # where this script is only tried out
        if run.faulty:
            used = any(" off (gave a wrong result" in line for line in row["log"])
        return {
            "ok": not differ and used and row["right"] >= 0.97,
            "differ": differ,
            "under_test": used,
            "absent": any("which is not enabled here" in line for line in row["log"]),
        }


def environment(nccl: Path | None = None) -> dict[str, str]:
    """For everything that is started: no multicast, our package, another NCCL library if given.

    Raises:
        SystemExit: vLLM would not find the plugin.
    """
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "moe_backend" not in plugins.names:
        sys.exit(
            "error: moe-backend is not installed in this environment, so vLLM does not find its "
            "plugin (a folder on PYTHONPATH does not do); run: pip install --no-deps -e ."
        )
    env = {
        # Multicast off unless the caller has set these otherwise.
        "NCCL_NVLS_ENABLE": "0",
        "NVSHMEM_DISABLE_NVLS": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONPATH": os.pathsep.join(
            (str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", ""))
        ),
    }
    env.pop(VARIABLE, None)
    if nccl:
        # Preloaded, so that torch and vLLM use the same one.
        env["LD_PRELOAD"] = env["VLLM_NCCL_SO_PATH"] = str(nccl.resolve(strict=True))
    return env


def call(command: list[str], env: dict[str, str], limit_s: float) -> tuple[int | None, str]:
    """Exit code, None when time was up, and output. Nothing that it started outlives it."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
    return process.returncode, said


def telling(said: str) -> list[str]:
    """The lines of a log that say what ran, without process, time and place, each once."""
    lines = [line for line in said.splitlines() if any(word in line for word in LINES)]
    lines = [line for line in lines if "LLM engine" not in line]  # all settings, folders among them
    return list(dict.fromkeys(re.sub(r"^(\(.*?\) )?[A-Z]+ .*?\] ", "", line) for line in lines))


if __name__ == "__main__":
    sys.exit(main())
