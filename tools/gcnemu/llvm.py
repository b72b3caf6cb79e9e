"""LLVM IR and assembly text through the AMD compiler in Triton's wheel, and launches of both."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Sequence

import torch
from triton._C.libtriton import amd, llvm
from triton.backends.amd import compiler

from gcnemu.checks import Found
from gcnemu.program import ONE, Program, Region, Schedule
from moe_backend.verify import code_object


def compile_ir(text: str, arch: str) -> str:
    """Assembly of an LLVM IR module, optimised as Triton's kernels are."""
    llvm.init_targets()
    return compiler.compile_amdgpu(
        text,
        compiler.get_amd_codegen_target_triple(arch),
        arch,
        "",
        flags=[],
        enable_fp_fusion=True,
        disable_optimization=False,
        canonicalize_gep=False,
        disabled_passes="",
        dump_ir=False,
        enable_timing=False,
    )


def assemble(assembly: str, arch: str) -> bytes:
    """The code object of an assembly file.

    Raises:
        RuntimeError: LLVM does not accept it.
    """
    return link(compiler.assemble_amdgcn(assembly, arch, ""))


def link(relocatable: bytes) -> bytes:
    """A code object from one relocatable object, by the linker inside Triton's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "x.o"), os.path.join(folder, "x.hsaco")
        with open(source, "wb") as file:
            file.write(relocatable)
        amd.link_hsaco(source, target)
        with open(target, "rb") as file:
            return file.read()


class Kernel:
    """One kernel from LLVM IR or assembly text, for launches with plain arguments."""

    def __init__(self, assembly: str, arch: str, name: str | None = None):
        self.assembly, self.arch = assembly, arch
        self.binary = assemble(assembly, arch)
        self.program = Program(assembly, name)
        self.metadata = code_object.read(self.binary)[self.program.kernel.name]

    @classmethod
    def from_ir(cls, text: str, arch: str) -> Kernel:
        return cls(compile_ir(text, arch), arch)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        *args: torch.Tensor | int | float,
        dynamic_lds: int = 0,
        schedules: Sequence[Schedule] = ONE,
    ) -> list[Found]:
        """Run on CPU tensors, integers and 32-bit floats, in the order of the parameters."""
        from gcnemu.triton_driver import region_of

        block_of_arguments = bytearray(self.metadata.kernarg_size)
        visible = [a for a in self.metadata.arguments if not a.kind.startswith("hidden_")]
        regions: list[Region] = []
        if len(visible) != len(args):
            raise ValueError(f"{len(args)} arguments for {len(visible)} parameters")
        for place, value in zip(visible, args, strict=True):
            if isinstance(value, torch.Tensor):
                regions.append(region_of(value))
                value = value.data_ptr()
            if isinstance(value, float):
                data = struct.pack("<f", value)
            else:
                data = (value & (1 << 8 * place.size) - 1).to_bytes(place.size, "little")
            block_of_arguments[place.offset : place.offset + len(data)] = data
        return self.program(
            bytes(block_of_arguments), grid, block, dynamic_lds=dynamic_lds, regions=regions,
            schedules=schedules,
        )  # fmt: skip
