"""The tiny trained model's answers through vLLM: each format, eager and captured, on 1 or 2 GPUs.

    python benchmarks/gpu_answers.py [--tp 1|2] [--json FILE] [--logs DIR]

Every run asks the same held-out prompts greedily, with our backend. With `--tp 1`: bf16, FP8 blocks
and NVFP4 (kept packed), these two also with wider experts, eager and with CUDA graphs. With
`--tp 2`: the same formats eager on one GPU, to compare with, and on two GPUs with CUDA graphs,
tensor parallel and with experts spread.
All runs share the GPUs and go on at once: the model is small, and starting vLLM takes most of the
time.

A run is right if at least 97 % of its answers are, if it gives the same tokens as the eager run of
its format for at least 97 % of the prompts, and if the log names the expected kernel and no other
(`hopper`, unless `--kernel` says otherwise). Not all: batches of other sizes and sums over ranks
add in another order, and a near-tie may fall the other way. The control drops the clamp of the
activation and asks for another kernel; it has to fail all three checks.

Exit code 0: every run is right, and the control is not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_parallel import HERE, TINY, call, environment, telling

if TYPE_CHECKING:
    import torch

ENOUGH = 0.97  # of the prompts
# These have hidden states of 256 columns instead of 128, and experts of 512 instead of 384, which
# compute the same: sizes that NVFP4's methods take, and `Pairs` with FP8.
WIDE = "-wide"
FORMATS = ("bf16", "fp8-block", f"fp8-block{WIDE}", "nvfp4-modelopt", f"nvfp4-modelopt{WIDE}")
APART_S = 1.5  # between starts, which look for free ports
# The size is given, so that vLLM does not measure free memory that others are just taking.
ENGINE = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
CONTROL_FAULTS = ["answers", "tokens", "kernel"]


@dataclass(frozen=True)
class Run:
    """One engine; `control`: without the clamp, and by another kernel."""

    format: str
    tp: int = 1
    expert_parallel: bool = False
    eager: bool = False
    control: bool = False

    @property
    def name(self) -> str:
        layout = f"TP{self.tp}{'+EP' if self.expert_parallel else ''}"
        way = "eager" if self.eager else "captured"
        return f"{self.format} {layout} {way}{' CONTROL' if self.control else ''}"


def runs(tp: int) -> list[Run]:
    """The run to compare with is the first of its format."""
    wanted = [Run(format, eager=True) for format in FORMATS]
    if tp == 1:
        wanted += [Run(format) for format in FORMATS]
    else:
        wanted += [Run(format, tp, spread) for spread in (False, True) for format in FORMATS]
    return [*wanted, Run("fp8-block", eager=True, control=True)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=1, help="GPUs")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--kernel", nargs="+", default=["hopper"], help="any of these has to run")
    parser.add_argument("--other", default="triton", help="the one that the control asks for")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="these runs alone")
    parser.add_argument("--at-once", type=int, default=16, help="engines")
    parser.add_argument("--limit", type=float, default=270, metavar="S", help="of each engine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--logs", type=Path, default=Path("answers-logs"), metavar="DIR")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in runs(args.tp) if all(word in run.name.split() for word in args.only)]
    if not chosen:
        parser.error(
            f"--only {args.only}: no such run; there are {[r.name for r in runs(args.tp)]}"
        )

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        scratch = Path(folder)
        models = make_models(scratch, pool)
        jobs = [(number, run, models, scratch, args) for number, run in enumerate(chosen)]
        rows = list(pool.map(lambda job: ask(*job), jobs))

    for row in rows:
        first = next(r for r in rows if r["format"] == row["format"])
        row["faults"] = faults(row, first, args.kernel)
        row["ok"] = row["faults"] == (CONTROL_FAULTS if row["control"] else [])
        row["date"] = datetime.date.today().isoformat()
        print(f"{'ok   ' if row['ok'] else 'WRONG'} {row['name']:32} {told(row)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} in {time.monotonic() - began:.0f} s")
    return 0 if all(row["ok"] for row in rows) else 1


def make_models(scratch: Path, pool: Executor) -> dict[str, Path]:
    """The folder of each format's model, and of the control's, `unclamped`."""
    models = dict(zip(FORMATS, pool.map(lambda f: convert(f, scratch), FORMATS), strict=True))
    models["unclamped"] = unclamp(models["fp8-block"], scratch / "unclamped")
    return models


def convert(format: str, scratch: Path) -> Path:
    if format == "bf16":
        return TINY
    source = widen(TINY, scratch / f"{format}-source", 512) if format.endswith(WIDE) else TINY
    command = [sys.executable, "-m", "moe_backend.cli", "convert", str(source)]
    command += [str(scratch / format), "--to", format.removesuffix(WIDE)]
    code, said = call(command, environment() | {"OMP_NUM_THREADS": "1"}, 200)
    if code:
        raise RuntimeError(f"converting to {format} failed:\n{said[-2000:]}")
    return scratch / format


def widen(model: Path, folder: Path, columns: int) -> Path:
    """The model with hidden states twice, and zeros behind its experts' hidden columns.

    What reads hidden states has half of each weight twice, so no answer changes: halves are exact,
    and the mean of the squares, which norms divide by, is the same.
    """
    from safetensors.torch import load_file, save_file
    from torch.nn.functional import pad

    config = json.loads((model / "config.json").read_text())
    more = columns - config["moe_intermediate_size"]
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith((".moe.gate_proj.weight", ".moe.up_proj.weight")):
            tensor = pad(tensor, (0, 0, 0, more))
        elif name.endswith(".moe.down_proj.weight"):
            tensor = pad(tensor, (0, more))
        tensors[name] = twice(name, tensor).contiguous()
    config |= {"moe_intermediate_size": columns, "hidden_size": 2 * config["hidden_size"]}
    changed = replaced(model, folder, ("config.json", "model.safetensors"))
    (changed / "config.json").write_text(json.dumps(config))
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    return changed


def twice(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A model's tensor where hidden states have their columns twice."""
    import torch

    what = name.split(".")[-2]
    if what in ("down_proj", "o_proj"):  # they make hidden states
        return torch.cat((tensor, tensor), -2)
    if what in ("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"):
        return torch.cat((tensor, tensor), -1)
    attention, experts = ("q_proj", "k_proj", "v_proj", "g_proj"), ("gate", "gate_proj", "up_proj")
    reads = what in (*attention, *experts, "lm_head")
    return torch.cat((tensor / 2, tensor / 2), -1) if reads else tensor


def replaced(model: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """A folder with the model's files but these."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name not in names:
            (folder / file.name).symlink_to(file)
    return folder


def unclamp(model: Path, folder: Path) -> Path:
    """The model with a config.json that says that no layer clamps."""
    replaced(model, folder, ("config.json",))
    config = json.loads((model / "config.json").read_text())
    config["swiglu_limits"] = [0.0] * len(config["swiglu_limits"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ask(
    number: int, run: Run, models: dict[str, Path], scratch: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Start one engine, ask all prompts; what it answered, or `error`."""
    time.sleep(number % args.at_once * APART_S)
    own = scratch / f"run{number}"
    own.mkdir()
    env = environment()
    env |= {"XDG_CACHE_HOME": str(own), "OMP_NUM_THREADS": "1"}
    env["MOE_BACKEND_NVFP4"] = "packed"  # whatever `auto` would do: FP8 experts have runs here
    env.pop("MOE_BACKEND_KERNEL", None)
    if run.control:
        env["MOE_BACKEND_KERNEL"] = args.other
    if run.tp == 1 and args.tp > 1:
        env["CUDA_VISIBLE_DEVICES"] = str(number % args.tp)
    job = {
        "model": str(models["unclamped" if run.control else run.format]),
        "ranks": run.tp,
        "expert_parallel": run.expert_parallel,
        "data_parallel": False,
        "no_compile": True,
        "eager": run.eager,
        "engine": ENGINE,
        "prompts": args.prompts,
        "answer": str(own / "answer.json"),
    }
    began = time.monotonic()
    command = [sys.executable, str(HERE / "gpu_parallel_serve.py"), json.dumps(job)]
    code, said = call(command, env, args.limit)
    (args.logs / f"{run.name.replace(' ', '-')}.log").write_text(said)
    row: dict[str, Any] = {"name": run.name, **asdict(run), "log": telling(said)}
    row["kernels"] = sorted(set(re.findall(r"\bkernel=(\w+)", "\n".join(row["log"]))))
    if (own / "answer.json").exists():
        row |= json.loads((own / "answer.json").read_text())
    else:
        row["error"] = f"{f'exit code {code}' if code else 'out of time'}: {said[-1500:]}"
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def faults(row: dict[str, Any], first: dict[str, Any], kernels: list[str]) -> list[str]:
    """Which of the checks a run fails; writes the share of prompts with the tokens of `first`."""
    if "error" in row:
        return ["error"]
    found = []
    if row["right"] < ENOUGH:
        found.append("answers")
    if "error" in first:
        found.append("nothing to compare with")
    else:
        pairs = zip(row["tokens"], first["tokens"], strict=True)
        row["alike"] = sum(a == b for a, b in pairs) / len(row["tokens"])
        if row["alike"] < ENOUGH:
            found.append("tokens")
    if not row["kernels"] or not set(row["kernels"]) <= set(kernels):
        found.append("kernel")
    return found


def told(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    alike = f"{row['alike']:.1%} tokens as the first" if "alike" in row else "not compared"
    fails = f"fails {', '.join(row['faults'])}" if row["faults"] else ""
    kernels = "+".join(row["kernels"]) or "no kernel named"
    return f"{row['right']:.1%} right, {alike}, {kernels}, {row['seconds']:.0f} s  {fails}"


if __name__ == "__main__":
    sys.exit(main())
