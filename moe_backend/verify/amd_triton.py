"""Triton launches on CPU tensors, compiled for an AMD target and recorded; nothing is executed.

    with recording("gfx950") as driver:
        kernel[grid](x, y, ...)
    driver.launches

Triton's wheel holds the AMD compiler; no ROCm and no GPU are needed. The emulator in the
repository's tools/gcnemu extends `RecordingDriver` to run what was compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase, expand_signature
from triton.runtime import driver as runtime_driver
from triton.runtime.cache import get_cache_manager

# Device numbers: Triton keeps one cache of compiled kernels per device.
TARGETS = {"gfx942": 9042, "gfx950": 9050}
# Bytes of LDS that a workgroup may have.
LDS_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}


@dataclass
class Launch:
    """One launch.

    Attributes:
        types: Triton's types of the arguments, e.g. `*fp8e4nv`, `i32`, `constexpr`.
        shared: bytes of LDS that the launch asks for.
        found: what the emulator's checks found; empty where nothing was run.
    """

    name: str
    arch: str
    grid: tuple[int, int, int]
    types: tuple[str, ...]
    warps: int
    shared: int
    assembly: str
    binary: bytes
    found: list[Any] = field(default_factory=list)
    ran: bool = False


class _Utils:
    """What Triton asks of a device."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {
            "max_shared_mem": LDS_BYTES[self.arch], "arch": self.arch, "warpSize": 64,
            "multiprocessor_count": 1,
        }  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), name, 0, 0, 1024  # module, function, registers, spills, most work-items

    def unload_module(self, module: object) -> None:
        pass


class RecordingDriver(DriverBase):  # type: ignore[misc]
    """A Triton driver that compiles for `arch` and records every launch.

    Raises:
        ValueError: `arch` is not a known target.
    """

    def __init__(self, arch: str):
        if arch not in TARGETS:
            raise ValueError(f"no AMD target {arch!r}; known are {', '.join(TARGETS)}")
        self.arch = arch
        self.launches: list[Launch] = []
        self.utils = _Utils(arch)

    def execute(self, launch: Launch, arguments: Sequence[Any]) -> None:
        """Called after every launch; `arguments` as Triton passes them, without constants."""

    # --- Triton's interface of a driver ---

    def launcher_cls(self, source: Any, metadata: Any) -> _Launcher:
        return _Launcher(source, metadata)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self.arch, 64)

    def get_current_device(self) -> int:
        return TARGETS[self.arch]

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing is timed here: give the configuration yourself")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


class _Launcher:
    """Records the launches of one compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("kernels with global scratch memory are not supported here")
        self.metadata = metadata
        self.texts = _texts(metadata.hash, str(source.name))
        descriptors = getattr(metadata, "tensordesc_meta", None)
        self.types = expand_signature(list(source.signature.values()), descriptors, "")
        if any(not isinstance(t, str) or t.startswith("tensordesc") for t in self.types):
            raise NotImplementedError("tuple and descriptor arguments are not supported here")

    def __call__(
        self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, about: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        driver = runtime_driver.active
        assert isinstance(driver, RecordingDriver)
        metadata = self.metadata
        launch = Launch(
            metadata.name, driver.arch, (x, y, z), tuple(self.types), metadata.num_warps,
            metadata.shared, self.texts["amdgcn"].decode(), self.texts["hsaco"],
        )  # fmt: skip
        driver.launches.append(launch)
        kept = [a for t, a in zip(self.types, arguments, strict=True) if t != "constexpr"]
        driver.execute(launch, kept)


def _texts(key: str, name: str) -> dict[str, bytes]:
    """Assembly and code object of a compiled kernel, from Triton's cache."""
    group = get_cache_manager(key).get_group(f"{name[:150]}.json") or {}
    out = {}
    for path in group.values():
        kind = path.rpartition(".")[2]
        if kind in ("amdgcn", "hsaco"):
            with open(path, "rb") as file:
                out[kind] = file.read()
    if len(out) != 2:
        raise RuntimeError(
            f"Triton's cache holds no assembly of {name}; is TRITON_STORE_BINARY_ONLY set?"
        )
    return out


@contextlib.contextmanager
def activated(driver: RecordingDriver) -> Iterator[RecordingDriver]:
    """Make `driver` Triton's driver for a while."""
    before = runtime_driver._active
    runtime_driver.set_active(driver)
    try:
        yield driver
    finally:
        runtime_driver._active = before


def recording(arch: str) -> contextlib.AbstractContextManager[RecordingDriver]:
    """Compile and record every launch inside the `with`."""
    return activated(RecordingDriver(arch))
