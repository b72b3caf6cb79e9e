"""Ordinary Triton launches on CPU tensors, compiled for an AMD target and emulated.

    with triton_driver.active("gfx950") as driver:
        kernel[grid](x, y, ...)          # CPU tensors
    driver.launches                      # what was compiled, what the checks found

Triton's wheel holds the AMD compiler; no ROCm is needed.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase, expand_signature
from triton.runtime import driver as runtime_driver

from gcnemu.checks import FAULT, Found
from gcnemu.program import ONE, Program, Region, Schedule
from moe_backend.verify import code_object

TARGETS = {"gfx942": 9042, "gfx950": 9050}  # device numbers: Triton keeps one cache per device
LDS_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
_PACK = {
    "i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q",
    "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


@dataclass
class Launch:
    """One launch: the compiled kernel and what its run found (`found` stays empty if not run)."""

    name: str
    arch: str
    grid: tuple[int, int, int]
    assembly: str
    binary: bytes
    found: list[Found] = field(default_factory=list)
    ran: bool = False

    @property
    def faults(self) -> list[Found]:
        return [f for f in self.found if f.severity == FAULT]


class Faulty(RuntimeError):
    """A launch broke a rule; the message says which, and where."""


class _Utils:
    """What Triton asks of a device."""

    def __init__(self, driver: EmulatorDriver):
        self.driver = driver

    def get_device_properties(self, device: int) -> dict[str, Any]:
        arch = self.driver.arch
        return {
            "max_shared_mem": LDS_BYTES[arch],
            "arch": arch,
            "warpSize": 64,
            "multiprocessor_count": 1,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        return object(), name, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class EmulatorDriver(DriverBase):
    """A Triton driver whose device is the emulator.

    Args:
        arch: gfx942 or gfx950.
        execute: False compiles and records, and leaves memory alone.
        schedules: how often, and in which orders of waves, each launch runs; see `program.ALL`.
        strict: a fault raises `Faulty`; otherwise it is recorded in `launches`.
        regions: memory that kernels may touch beside the tensors they are given.
    """

    def __init__(
        self,
        arch: str,
        *,
        execute: bool = True,
        schedules: Sequence[Schedule] = ONE,
        strict: bool = True,
        regions: Sequence[Region] = (),
    ):
        if arch not in TARGETS:
            raise ValueError(f"no target {arch!r}; the emulator knows {', '.join(TARGETS)}")
        self.arch, self.execute, self.schedules, self.strict = arch, execute, schedules, strict
        self.regions = list(regions)
        self.launches: list[Launch] = []
        self.programs: dict[str, Program] = {}
        self.utils = _Utils(self)

    def launcher_cls(self, source: Any, metadata: Any) -> _Launcher:
        return _Launcher(self, source, metadata)

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
        raise RuntimeError("the emulator does not measure time: give the configuration yourself")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


class _Launcher:
    """Packs a launch's arguments and runs it. One per compiled kernel."""

    def __init__(self, driver: EmulatorDriver, source: Any, metadata: Any):
        self.driver, self.metadata, self.source = driver, metadata, source
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("kernels with global scratch memory are not emulated")
        signature = list(source.signature.values())
        self.types = expand_signature(signature, getattr(metadata, "tensordesc_meta", None), "")
        self.constants = {path[0] for path in source.constants if len(path) == 1}
        if any(isinstance(t, tuple) for t in self.types):
            raise NotImplementedError("tuple arguments are not emulated")

    def __call__(
        self, grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter, leave, *args
    ) -> None:
        driver = runtime_driver.active
        assert isinstance(driver, EmulatorDriver)
        compiled = _compiled(self.source, self.metadata)
        launch = Launch(
            self.metadata.name, driver.arch, (grid_x, grid_y, grid_z), compiled["amdgcn"],
            compiled["hsaco"],
        )  # fmt: skip
        driver.launches.append(launch)
        if not driver.execute or not grid_x * grid_y * grid_z:
            return
        kernel = code_object.read(launch.binary)[launch.name]
        kernarg, regions = self._pack(args, kernel)
        if launch.assembly not in driver.programs:
            driver.programs[launch.assembly] = Program(launch.assembly, launch.name)
        program = driver.programs[launch.assembly]
        # Triton's LDS is dynamic: the descriptor says 0 and the launch adds metadata.shared.
        shared = self.metadata.shared - kernel.lds if self.metadata.shared > kernel.lds else 0
        launch.found = program(
            kernarg,
            launch.grid,
            (64 * self.metadata.num_warps, 1, 1),
            dynamic_lds=shared,
            regions=[*regions, *driver.regions],
            schedules=driver.schedules,
        )
        launch.ran = True
        if launch.faults and driver.strict:
            raise Faulty(
                f"{launch.name} on {driver.arch}: " + "; ".join(map(str, launch.faults[:4]))
            )

    def _pack(
        self, args: Sequence[Any], kernel: code_object.CodeObjectKernel
    ) -> tuple[bytes, list[Region]]:
        visible = [a for a in kernel.arguments if not a.kind.startswith("hidden_")]
        block = bytearray(kernel.kernarg_size)
        regions = []
        values = [
            (type, arg) for type, arg in zip(self.types, args, strict=True) if type != "constexpr"
        ]
        # The compiler appends pointers to scratch memory that these kernels do not have.
        if len(values) > len(visible):
            raise NotImplementedError(f"{len(values)} arguments for {len(visible)} places")
        for place, (type, value) in zip(visible, values, strict=False):
            if isinstance(value, torch.Tensor):
                regions.append(region_of(value))
                value = value.data_ptr()
            if type.startswith("*"):
                data = struct.pack("<Q", int(value))
            elif type in ("fp16", "bf16"):
                dtype = torch.float16 if type == "fp16" else torch.bfloat16
                data = struct.pack("<h", torch.tensor(value, dtype=dtype).view(torch.int16).item())
            else:
                data = struct.pack("<" + _PACK[type], value)
            if len(data) > place.size:
                raise NotImplementedError(f"{type} argument in {place.size} bytes")
            block[place.offset : place.offset + len(data)] = data
        return bytes(block), regions


def region_of(tensor: torch.Tensor) -> Region:
    """The tensor's storage: a kernel that is given a view may use all of what it is a view of."""
    if tensor.device.type != "cpu":
        raise ValueError(f"the emulator takes CPU tensors, not one on {tensor.device}")
    storage = tensor.untyped_storage()
    return Region(storage.data_ptr(), storage.nbytes(), f"{tensor.dtype} {list(tensor.shape)}")


def _compiled(source: Any, metadata: Any) -> dict[str, Any]:
    """The texts of a compiled kernel, from Triton's cache, by the hash in its metadata."""
    from triton.runtime.cache import get_cache_manager

    group = get_cache_manager(metadata.hash).get_group(f"{_file_name(source)}.json")
    if not group:
        raise RuntimeError(f"Triton's cache has lost {metadata.name}")
    out: dict[str, Any] = {}
    for path in group.values():
        stem, _, kind = path.rpartition(".")
        if kind in ("amdgcn", "hsaco"):
            with open(path, "rb") as file:
                data = file.read()
            out[kind] = data if kind == "hsaco" else data.decode()
    return out


def _file_name(source: Any) -> str:
    return str(source.name)[:150]


@contextlib.contextmanager
def active(arch: str, **options: Any) -> Iterator[EmulatorDriver]:
    """Make the emulator Triton's driver for a while; options as for `EmulatorDriver`."""
    before = runtime_driver._active
    driver = EmulatorDriver(arch, **options)
    runtime_driver.set_active(driver)
    try:
        yield driver
    finally:
        runtime_driver._active = before
