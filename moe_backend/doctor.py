"""What `moe-backend doctor` finds, as data: the machine, the engine, the kernel of each layer."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_backend import __version__, envs, nvfp4_paths, plugin
from moe_backend.comm.policy import parse_override
from moe_backend.formats import FORMATS
from moe_backend.kernels.cuda import build
from moe_backend.kernels.hopper import table
from moe_backend.kernels.registry import LayerConfig, select
from moe_backend.kernels.warmup import allowed_seconds, cache_folder
from moe_backend.verify.problems import ACTIVATIONS


@dataclass(frozen=True)
class LayerRow:
    """Which kernel would run a layer of this format and activation."""

    format: str
    activation: str
    kernel: str
    reason: str
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class VariableRow:
    name: str
    value: str
    meaning: str
    unset: str


@dataclass(frozen=True)
class Report:
    facts: dict[str, str]
    layers: list[LayerRow]
    variables: list[VariableRow]
    problems: list[str]


def examine() -> Report:
    """Look at this machine; never raises for what it finds."""
    facts = {
        "moe-backend": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    problems: list[str] = []
    facts["accelerator"] = _accelerator()
    facts["Triton"] = _version("triton")
    facts["compiled kernels"] = cache_folder()
    facts["CUDA C++"] = _cuda_cpp()
    facts["tuned tables"] = _tables()
    facts["vLLM"], facts["--moe-backend blockscale"] = _engine(problems)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problems += _wrong_variables()
    return Report(facts, _layers(device, problems), _variables(), problems)


def _cuda_cpp() -> str:
    """Whether kernels in CUDA C++ can be compiled here, and where they are kept."""
    missing = build.missing()
    if missing:
        return f"not compiled: {missing}; other kernels run in their place"
    kept = build.folder()
    return f"can be compiled; {f'kept in {kept}' if kept else 'not kept: there is no home folder'}"


def _accelerator() -> str:
    """Name and architecture of the first GPU, such as `NVIDIA H200 (sm_90)`."""
    if not torch.cuda.is_available():
        return "none"
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return f"{properties.name} ({architecture})"


def _tables() -> str:
    """The tuned tables in use on the first GPU, and how many rows each has."""
    if not torch.cuda.is_available():
        return "none, as there is no GPU"
    gpu = torch.cuda.get_device_name(0)
    found = [(file, table.read(file, gpu)) for file in table.files(gpu)]
    rows = [f"{file} ({sum(map(len, made.rows.values()))} rows)" for file, made in found]
    return ", ".join(rows) or f"none for {gpu}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _engine(problems: list[str]) -> tuple[str, str]:
    """vLLM's version and whether our name is among its backends."""
    try:
        from moe_backend.engines import vllm

        version = vllm.installed_version()
    except ImportError as error:
        return "not installed", f"no: {error}"
    except Exception as error:  # what it does when it is imported is its own affair
        problems.append(f"vLLM cannot be imported: {error!r}")
        return "cannot be imported", "no"
    plugin.register()
    if plugin.failure is not None:
        problems.append(plugin.failure)
        return version, f"no: {plugin.failure}"
    vllm.load_kernels()
    return version, "registered"


def _layers(device: str, problems: list[str]) -> list[LayerRow]:
    rows = []
    for format_name in FORMATS:
        for activation in ACTIVATIONS:
            layer = LayerConfig(
                format=format_name,
                num_experts=8,
                num_local_experts=8,
                top_k=2,
                hidden_size=4096,
                intermediate_size=1280,
                activation=activation,
                dtype="bfloat16",
                device=device,
                w13_block=(128, 128) if format_name == "fp8_block" else None,
                w2_block=(128, 128) if format_name == "fp8_block" else None,
            )
            try:
                selection = select(layer)
            except ValueError as error:
                if str(error) not in problems:
                    problems.append(str(error))
                continue
            rows.append(
                LayerRow(
                    format_name,
                    str(activation),
                    selection.kernel.name,
                    selection.preference,
                    selection.refusals,
                )
            )
    return rows


def reasons(layers: list[LayerRow]) -> dict[str, list[str]]:
    """Each reason once, for a kernel or against one, and the layers that it is given for.

    Layers are named by format and activation, or by format where it holds for all of these, or
    `all`.
    """
    found: dict[str, list[LayerRow]] = {}
    for row in layers:
        for reason in (f"{row.kernel}: {row.reason}", *row.refusals):
            found.setdefault(reason, []).append(row)
    return {reason: _named(rows, layers) for reason, rows in found.items()}


def _named(rows: list[LayerRow], layers: list[LayerRow]) -> list[str]:
    if len(rows) == len(layers):
        return ["all"]
    names = []
    for name in dict.fromkeys(row.format for row in rows):
        own = [row for row in rows if row.format == name]
        if len(own) == sum(row.format == name for row in layers):
            names.append(name)
        else:
            names += [f"{name} {row.activation.partition('(')[0]}" for row in own]
    return names


def _wrong_variables() -> list[str]:
    """What the readers of the variables would refuse; a kernel's name is tried with the layers."""
    found = []
    for read in (
        nvfp4_paths.requested,
        allowed_seconds,
        lambda: parse_override(envs.ALL_REDUCE.get()),
        _check_tuned,
    ):
        try:
            read()
        except ValueError as error:
            found.append(str(error))
    return found


def _check_tuned() -> None:
    """A missing table is none at all to an engine, and nothing else would tell of a wrong name."""
    given = envs.TUNED.get()
    if given not in (None, table.OFF) and not Path(given).is_dir():
        raise ValueError(
            f"{envs.TUNED.name}={given!r}: there is no such folder, so no table of the user's is "
            f"read; a folder or {table.OFF} is expected (`moe-backend tune` makes the folder)"
        )


def _variables() -> list[VariableRow]:
    return [VariableRow(v.name, v.get() or "(unset)", v.meaning, v.unset) for v in envs.VARIABLES]
