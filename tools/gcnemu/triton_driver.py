"""Ordinary Triton launches on CPU tensors, compiled for an AMD target and emulated.

    with triton_driver.active("gfx950") as driver:
        kernel[grid](x, y, ...)          # CPU tensors
    driver.launches                      # what was compiled, what the checks found

Compiling and recording is `moe_backend.verify.amd_triton`'s business; this adds the run.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from typing import Any

import torch

from gcnemu.checks import FAULT
from gcnemu.program import ONE, Program, Region, Schedule
from moe_backend.verify import code_object
from moe_backend.verify.amd_triton import Launch, RecordingDriver, activated

_PACK = {
    "i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q",
    "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


class Faulty(RuntimeError):
    """A launch broke a rule; the message says which, and where."""


class EmulatorDriver(RecordingDriver):
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
        super().__init__(arch)
        self.executes, self.schedules, self.strict = execute, schedules, strict
        self.regions = list(regions)
        self.programs: dict[str, Program] = {}

    def execute(self, launch: Launch, arguments: Sequence[Any]) -> None:
        if not self.executes or 0 in launch.grid:
            return
        kernel = code_object.read(launch.binary)[launch.name]
        types = [t for t in launch.types if t != "constexpr"]
        block, regions = pack(types, arguments, kernel)
        if launch.assembly not in self.programs:
            self.programs[launch.assembly] = Program(launch.assembly, launch.name)
        launch.found = self.programs[launch.assembly](
            block,
            launch.grid,
            (64 * launch.warps, 1, 1),
            # The code object says 0 where the launch decides.
            dynamic_lds=max(0, launch.shared - kernel.lds),
            regions=[*regions, *self.regions],
            schedules=self.schedules,
        )
        launch.ran = True
        faults = [str(f) for f in launch.found if f.severity == FAULT]
        if faults and self.strict:
            raise Faulty(f"{launch.name} on {self.arch}: " + "; ".join(faults[:4]))


def pack(
    types: Sequence[str], arguments: Sequence[Any], kernel: code_object.CodeObjectKernel
) -> tuple[bytes, list[Region]]:
    """The argument block of a launch, and the memory that its tensors own."""
    visible = [a for a in kernel.arguments if not a.kind.startswith("hidden_")]
    # The compiler appends pointers to scratch memory that these kernels do not have.
    if len(types) > len(visible):
        raise NotImplementedError(f"{len(types)} arguments for {len(visible)} places")
    block, regions = bytearray(kernel.kernarg_size), []
    for place, type, value in zip(visible, types, arguments, strict=False):
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


def active(arch: str, **options: Any) -> contextlib.AbstractContextManager[EmulatorDriver]:
    """Make the emulator Triton's driver for a while; options as for `EmulatorDriver`."""
    return activated(EmulatorDriver(arch, **options))  # type: ignore[return-value]
