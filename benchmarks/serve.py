"""Tokens per second and latencies through `vllm serve`, our backend beside those of vLLM.

    python benchmarks/serve.py --json FILE [--backends blockscale triton deep_gemm]
        [--loads decode prefill single 16x512/64] [--layers 8] [--logs DIR]

The model is `random_step.py`'s: random weights in Step-3.5's layer shapes, fewer layers. One server
after another, each with the same settings and CUDA graphs for decoding (no torch.compile), gets the
same loads from vLLM's own load generator (`vllm bench serve`, dataset `random`): each load once to
warm up, then `--repeats` times; the repeat with the median throughput is reported. A load is
AT_ONCExINPUT/OUTPUT, in requests and tokens, with *REQUESTS behind it if there are more in all.

A backend that refuses the model or does not start in time is reported with the reason, and its log
kept. Sampling is random, so that the tokens, and with them the experts that are hit, stay spread.
The greedy answers to some prompts are compared too, for information: random weights make
near-ties, and a token that differs changes all that follow.

Exit code 0: `blockscale` was measured (if it was asked for) with every load. 1: it was not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vllm_server import free_port, serving

HERE = Path(__file__).resolve().parent
OURS = "blockscale"
CAPTURED = [1, 2, 4, 8, 16, 32, 64]
SEQUENCES = max(CAPTURED)
BATCHED_TOKENS = 8192
METRICS = {"ttft": "first token", "itl": "between tokens", "e2el": "whole request"}
# (Whole request - first token) / tokens: what `itl` says too, but where tokens arrive in bursts.
MORE_METRICS = (*METRICS, "tpot")
ASKED, ANSWERED = 16, 16  # greedy prompts, and tokens of each answer
ERROR = re.compile(r"^((?:[\w.]*(?:Error|Exception)|vllm serve: error): .+)", re.MULTILINE)
# vLLM's whole configuration, in its line "Initializing", has a `kernel=` too.
RAN = re.compile(
    r"^(?!Initializing).*kernel=.*|.*Using .*(?:MoE backend|[Ee]xperts).*", re.MULTILINE
)


@dataclass(frozen=True)
class Load:
    """`requests` in all, never more than `at_once` of them; lengths in tokens."""

    name: str
    at_once: int
    input: int
    output: int
    requests: int


LOADS = {
    load.name: load
    for load in (
        Load("decode", 64, 32, 256, 64),
        Load("prefill", 16, 2048, 8, 64),
        Load("single", 1, 32, 256, 2),
    )
}


def load_of(text: str) -> Load:
    """A named load, or one described as AT_ONCExINPUT/OUTPUT[*REQUESTS]."""
    if text in LOADS:
        return LOADS[text]
    found = re.fullmatch(r"(\d+)x(\d+)/(\d+)(?:\*(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(LOADS)} and not AT_ONCExINPUT/OUTPUT[*REQUESTS]"
        )
    at_once, given, wanted = (int(found[i]) for i in (1, 2, 3))
    return Load(text, at_once, given, wanted, int(found[4] or at_once))


def known_backends() -> list[str]:
    """The installed vLLM's own list, and ours."""
    from vllm.config.kernel import MoEBackend

    return list(dict.fromkeys((OURS, *get_args(MoEBackend))))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=[OURS, "triton", "deep_gemm"])
    parser.add_argument("--loads", nargs="+", type=load_of, default=list(LOADS.values()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8, help="one is dense; 4.5 GB each other")
    parser.add_argument("--format", choices=("fp8-block", "bf16"), default="fp8-block")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this script")
    parser.add_argument("--model", type=Path, help="keep the model here, or take it from here")
    parser.add_argument("-tp", "--tp", type=int, default=1, help="GPUs")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--start-limit", type=float, default=200, metavar="S", help="of a server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each server")
    parser.add_argument("--logs", type=Path, default=Path("serve-logs"), metavar="DIR")
    parser.add_argument("--list", action="store_true", help="print the names of the backends")
    args = parser.parse_args()
    known = known_backends()
    if args.list:
        print("\n".join(known))
        sys.exit()
    if unknown := [name for name in args.backends if name not in known]:
        parser.error(f"--backends: {unknown} not among those of this vLLM: {', '.join(known)}")
    if args.repeats < 1:
        parser.error("--repeats: at least 1")
    return args


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended
    os.environ.update(environment())  # the load generator, in this process, reads it too
    args.logs.mkdir(parents=True, exist_ok=True)
    about = {**machine(), "date": datetime.date.today().isoformat()}
    rows: list[dict[str, Any]] = []
    servers: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "model"
        if not model.exists():
            make_model(model, args)
        for backend in args.backends:
            print(f"{backend}: starting", flush=True)
            servers[backend], measured = measure(backend, model, args)
            said = servers[backend]
            for line in [*said["ran"], *([f"REFUSED: {said['why']}"] if said["why"] else [])]:
                print(f"{backend}: {line}", flush=True)
            rows += [{**row, **about} for row in measured]
            compare(servers)
            if args.json:
                setting = {key: getattr(args, key) for key in ("layers", "format", "small", "tp")}
                setting |= {"eager": args.eager, "repeats": args.repeats, **about}
                content = {"setting": setting, "rows": rows, "servers": servers}
                args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows, servers))
    done = {row["load"] for row in rows if row["backend"] == OURS}
    return 0 if OURS not in args.backends or len(done) == len(args.loads) else 1


def environment() -> dict[str, str]:
    """No network; our package and this folder importable; the caller's settings before these."""
    paths = (str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", ""))
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, where there is no GPU
        # DeepGEMM compiles what a load needs when that load warms up, not every shape at start.
        "VLLM_DEEP_GEMM_WARMUP": "skip",
        **os.environ,
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def machine() -> dict[str, Any]:
    from gpu_parallel_serve import versions
    from vllm.platforms import current_platform

    return {"device": current_platform.get_device_name(), "versions": dict(versions())}


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """In a process of its own, so that no GPU memory stays with this one."""
    command = [sys.executable, str(HERE / "random_step.py"), str(folder)]
    command += ["--layers", str(args.layers), "--format", args.format]
    subprocess.run(command + ["--small"] * args.small, check=True)


def measure(
    backend: str, model: Path, args: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One server: what ran in it, its greedy answers, or why not; and a row for each load."""
    log = args.logs / f"{backend}.log"
    port = args.port or free_port()
    options = ["--served-model-name", "random", "--moe-backend", backend]
    options += ["--tensor-parallel-size", str(args.tp), "--no-enable-prefix-caching"]
    longest = max(load.input + load.output for load in args.loads)
    options += ["--max-model-len", str(max(512, longest + 64))]
    options += ["--max-num-seqs", str(SEQUENCES), "--max-num-batched-tokens", str(BATCHED_TOKENS)]
    if args.eager:
        options += ["--enforce-eager"]
    else:
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        graphs["cudagraph_capture_sizes"] = CAPTURED
        options += ["--compilation-config", json.dumps(graphs)]
    server: dict[str, Any] = {"why": None, "answers": []}
    rows = []
    try:
        with serving(str(model), options, port, args.start_limit, log) as started:
            server["start_s"] = round(started, 1)
            server["answers"] = greedy(port)
            for load in args.loads:
                row = {"backend": backend, "load": load.name, **run(load, model, port, args)}
                rows.append(row)
                print(f"{backend}: {json.dumps(row)}", flush=True)
    except Exception as error:  # whatever it is, the next backend gets its turn
        server["why"] = reason(log, error)
    said = log.read_text(errors="replace") if log.exists() else ""
    server["ran"] = ran(plain(said))
    return server, rows


def greedy(port: int) -> list[list[int]]:
    """Token ids of the answers to prompts of random tokens."""
    # Any ids but the special ones; a multiplier that is prime to their number spreads them.
    prompts = [[3 + (17 * i + 101 * j) % 600 for j in range(24)] for i in range(ASKED)]
    body = {"model": "random", "prompt": prompts, "temperature": 0, "max_tokens": ANSWERED}
    body |= {"ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        choices = json.load(response)["choices"]
    choices.sort(key=lambda choice: choice["index"])
    return [choice["token_ids"] for choice in choices]


def run(load: Load, model: Path, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """Send a load once to warm up and then `--repeats` times; the row of the median one."""
    results = []
    for repeat in range(args.repeats + 1):
        with (args.logs / "client.log").open("a") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                result = send(load, model, port, repeat)
        if result["completed"] != load.requests:
            raise RuntimeError(f"{result['completed']} of {load.requests} requests completed")
        results.append(result)
    results = results[1:]
    speeds = [round(result["output_throughput"], 1) for result in results]
    median = results[speeds.index(statistics.median_low(speeds))]
    latencies = {
        f"{metric}_ms": {
            part: round(median[f"{part}_{metric}_ms"], 2) for part in ("median", "p99")
        }
        for metric in MORE_METRICS
    }
    return {
        "at_once": load.at_once,
        "input": load.input,
        "output": load.output,
        "requests": load.requests,
        "output_tokens_per_s": round(median["output_throughput"], 1),
        "total_tokens_per_s": round(median["total_token_throughput"], 1),
        **latencies,
        "repeats_output_tokens_per_s": speeds,
    }


def send(load: Load, model: Path, port: int, seed: int) -> dict[str, Any]:
    """`vllm bench serve`, in this process: its imports take longer than most loads."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    given = ["--backend", "openai", "--base-url", f"http://127.0.0.1:{port}"]
    given += ["--endpoint", "/v1/completions", "--model", str(model)]
    given += ["--served-model-name", "random", "--dataset-name", "random", "--seed", str(seed)]
    given += ["--random-input-len", str(load.input), "--random-output-len", str(load.output)]
    given += ["--num-prompts", str(load.requests), "--max-concurrency", str(load.at_once)]
    given += ["--ignore-eos", "--temperature", "1", "--disable-tqdm", "--ready-check-timeout-sec=0"]
    given += ["--percentile-metrics", ",".join(MORE_METRICS), "--metric-percentiles", "99"]
    return dict(serve.main(parser.parse_args(given)))


def plain(log: str) -> str:
    """A log without process, time and place in front of each line."""
    return "\n".join(re.sub(r"^(\(.*?\) )?[A-Z]+ .*?\] ", "", line) for line in log.splitlines())


def ran(log: str) -> list[str]:
    """What a log says of the kernels: a line for each kind of layer of ours, or vLLM's choice."""
    lines = [found[0].split(" out of potential")[0] for found in RAN.finditer(log)]
    ours = [line for line in lines if "kernel=" in line]
    return list(dict.fromkeys(ours or lines))


def reason(log: Path, error: Exception) -> str:
    """The first error in the server's log, or else what this process saw of it."""
    said = log.read_text(errors="replace") if log.exists() else ""
    for found in ERROR.finditer(plain(said)):
        if "Engine core initialization failed" not in found[1]:
            return f"{found[1][:400]} ({error}; {log})"
    return f"{error} ({log})"


def compare(servers: dict[str, dict[str, Any]]) -> None:
    """How the greedy answers of each other backend agree with ours, written to its entry."""
    ours = servers.get(OURS, {}).get("answers")
    for backend, server in servers.items():
        if backend == OURS or not ours or not server["answers"]:
            continue
        pairs = list(zip(ours, server["answers"], strict=True))
        alike = [same_start(a, b) for a, b in pairs]
        server["agreement_with_ours"] = {
            "first_token": sum(n > 0 for n in alike) / len(alike),
            "tokens_before_the_first_difference": statistics.mean(alike),
            "of": ANSWERED,
        }


def same_start(a: list[int], b: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return next(differ, len(a))


def table(rows: list[dict[str, Any]], servers: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line per load and backend; the last column is ours over the best other one."""
    lines = [
        f"| load | backend | output tokens/s | {' | '.join(METRICS.values())} | ours/best |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for load in dict.fromkeys(row["load"] for row in rows):
        those = [row for row in rows if row["load"] == load]
        others = [row["output_tokens_per_s"] for row in those if row["backend"] != OURS]
        for row in those:
            cells = [
                f"{row[f'{m}_ms']['median']:.1f} / {row[f'{m}_ms']['p99']:.1f}" for m in METRICS
            ]
            ratio = ""
            if row["backend"] == OURS and others:
                ratio = f"{row['output_tokens_per_s'] / max(others):.2f}"
            speed = f"{row['output_tokens_per_s']:.0f}"
            lines.append("| " + " | ".join([load, row["backend"], speed, *cells, ratio]) + " |")
    lines.append("\nLatencies in ms: median / 99th percentile.")
    for backend, server in servers.items():
        if agreement := server.get("agreement_with_ours"):
            lines.append(
                f"{backend}: {agreement['first_token']:.0%} of greedy first tokens as ours, "
                f"{agreement['tokens_before_the_first_difference']:.1f} of {ANSWERED} tokens "
                "before the first difference"
            )
        if server["why"]:
            lines.append(f"{backend}: not measured: {server['why']}")
    return "\n".join(lines)


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(code)
