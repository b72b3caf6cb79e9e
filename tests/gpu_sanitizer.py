"""The Hopper and Triton kernels under NVIDIA's compute-sanitizer: `python tests/gpu_sanitizer.py`.

Each tool runs a small set of calls (every format and method, tiny shapes), and then a control: a
kernel that is wrong on purpose, which the tool must flag. Exits with 0 if the set is clean and the
controls are caught, with 1 if not, with 2 if there is no compute-sanitizer or no GPU.

torch's caching allocator is switched off (PYTORCH_NO_CUDA_MEMORY_CACHING), since in its large
blocks an access past the end of a tensor lands in a neighbour and is not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck")
CONTROLS = {"memcheck": "out-of-bounds", "racecheck": None, "initcheck": "uninitialised"}
FAULT = 86  # the exit code that we ask compute-sanitizer for when it finds something
COUNTS = (1, 7, 40, 600)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=TOOLS, action="append", help="memcheck unless given")
    parser.add_argument("--seconds", type=float, default=240, help="bound on each run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    parser.add_argument("--inner", choices=("set", *filter(None, CONTROLS.values())))
    args = parser.parse_args()
    if args.inner:
        return run_set() if args.inner == "set" else run_control(args.inner)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "compute-sanitizer was not found on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin. "
            "It comes with the CUDA toolkit (package cuda-sanitizer).",
            file=sys.stderr,
        )
        return 2
    found = []
    run([sys.executable, __file__, "--inner", "set"], args.seconds)  # compiles outside of the tool
    for tool in args.tool or ("memcheck",):
        found.append(examine(sanitizer, tool, "set", args.seconds))
        if (control := CONTROLS[tool]) is not None:
            found.append(examine(sanitizer, tool, control, args.seconds))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(f["as_expected"] for f in found) else 1


def find_sanitizer() -> str | None:
    folders = [os.environ.get("PATH", "")]
    folders += [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"),) if home]
    folders.append("/usr/local/cuda/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def examine(sanitizer: str, tool: str, what: str, seconds: float) -> dict[str, object]:
    """One run of a tool, and whether it found what it should: nothing, or the control's fault."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FAULT)]
    # cuda-bindings asks the driver for names that older drivers do not know; whatever the package
    # itself asks raises if the driver refuses.
    command += ["--report-api-errors", "no"]
    command += ["--print-limit", "5", "--launch-timeout", "120", "--target-processes", "all"]
    start = time.monotonic()
    code, output = run([*command, sys.executable, __file__, "--inner", what], seconds)
    summary = re.findall(r"=+ (ERROR SUMMARY.*|RACECHECK SUMMARY.*|Error: .*|Warning: .*)", output)
    expected = 0 if what == "set" else FAULT
    result = {
        "tool": tool,
        "what": what,
        "exit": code,
        "as_expected": code == expected,
        "says": summary[-3:],
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(result))
    if code != expected:
        print(output[:4000], "[...]", output[-1000:], sep="\n")
    return result


def run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and output."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            timeout=seconds,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return None, output.decode() if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def run_set() -> int:
    """Each format and method once with tiny shapes; wrong results are faults as well."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from gpu_problems import routed, small, wrong

    from moe_backend.fused_moe import FusedMoE
    from moe_backend.kernels.cuda.launch import Memory
    from moe_backend.kernels.hopper import flow, pairs, tiles
    from moe_backend.kernels.hopper import kernel as hopper
    from moe_backend.kernels.registry import kernel_named
    from moe_backend.verify.problems import ACTIVATIONS, Case

    faults, calls = [], 0
    kept: list[list[torch.Tensor]] = []

    def carve(device, *sizes):
        """Each array an allocation of its own, as in one the end of an array is not seen."""
        kept.append([torch.empty(size, dtype=torch.uint8, device=device) for size in sizes])
        return None, [Memory(array.data_ptr()) for array in kept[-1]]

    flow.carve = pairs.carve = carve
    for kernel in ("hopper", "triton"):
        for name in ("fp8_block", "nvfp4", "bf16"):
            case = Case(name, ACTIVATIONS[1], layout="ep", intermediate_size=160, hidden_size=256)
            if name == "fp8_block":
                case = replace(case, w13_block=(32, 128), w2_block=(128, 32))
            if name == "nvfp4":  # its method for many tokens takes multiples of 64
                case = replace(case, intermediate_size=256)
            problem = small(case)
            if kernel_named(kernel).refusal(problem.layer) is not None:
                continue
            fused = FusedMoE(problem.layer, problem.weights, kernel=kernel)
            for tokens in COUNTS if kernel == "hopper" else COUNTS[1:3]:
                calls += 1
                if (fault := wrong(fused, routed(problem, tokens))) is not None:
                    faults.append(fault)
            if kernel == "hopper":
                # Other methods run this layer where CUDA C++ cannot be compiled, or wider ones.
                tensors = kernel_named(kernel).prepare(problem.weights)
                for tokens in COUNTS:
                    p = routed(problem, tokens)
                    given = p.x, p.topk_weights, p.topk_ids, p.expert_map
                    for choice in (tiles.tiles(p.layer, tokens), tiles.pairs(p.layer)):
                        calls += 1
                        hopper.run(p.layer, tensors, *given, choice)
    torch.cuda.synchronize()
    print(f"{calls} calls, {len(faults)} wrong", *faults, sep="\n")
    return 1 if faults or not calls else 0


def run_control(which: str) -> int:
    """A Triton kernel with the fault."""
    import torch
    import triton
    from gpu_faults import copy_kernel

    source = torch.zeros(1024, dtype=torch.int32, device="cuda")
    if which == "uninitialised":
        source = torch.empty(1024, dtype=torch.int32, device="cuda")
    out = torch.zeros_like(source)
    # 64 elements past the end of an allocation that ends there.
    copy_kernel[(1,)](source, out, 1024 + (64 if which == "out-of-bounds" else 0), BLOCK=2048)
    torch.cuda.synchronize()
    print(f"ran with Triton {triton.__version__}", int(out[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
