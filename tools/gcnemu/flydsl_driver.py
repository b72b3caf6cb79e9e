"""Unmodified FlyDSL launches on CPU tensors, compiled for an AMD target and emulated.

    with flydsl_driver.active("gfx950") as driver:
        launch(out, x, ...)              # a @flyc.jit function
    driver.launches

For flydsl 0.3.1 to 0.4.2. It takes two things that no ROCm is needed for: the linker and the device
libraries that FlyDSL looks for under ROCM_PATH come from Triton's wheel, and its GPU runtime is
replaced by runtime/flydsl.c. Kernels get raw addresses, so they may touch every live CPU tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gcnemu import asm, build, llvm
from gcnemu.checks import FAULT
from gcnemu.program import ONE, Program, Region, Schedule
from moe_backend.verify import code_object
from moe_backend.verify.amd_triton import TARGETS, Launch

LINKER = """#!{python}
# FlyDSL calls: ld.lld -shared IN.o -o OUT. Triton's wheel has the linker as a function.
import sys
from triton._C.libtriton import amd
arguments = sys.argv[1:]
target = arguments[arguments.index("-o") + 1]
(source,) = [a for a in arguments if not a.startswith("-") and a != target]
amd.link_hsaco(source, target)
"""
_LOAD = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_GET = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int32,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
HIDDEN_SIZES = {
    f"hidden_{what}_{axis}": 3 * n + k
    for n, what in enumerate(("block_count", "group_size"))
    for k, axis in enumerate("xyz")
}


@cache
def rocm_folder() -> Path:
    """A ROCM_PATH with what FlyDSL's last compilation step asks for, made from Triton's wheel."""
    import triton

    folder = build.cache_folder() / "rocm"
    linker = folder / "llvm" / "bin" / "ld.lld"
    linker.parent.mkdir(parents=True, exist_ok=True)
    linker.write_text(LINKER.format(python=sys.executable))
    linker.chmod(0o755)
    bitcode = folder / "amdgcn" / "bitcode"
    bitcode.mkdir(parents=True, exist_ok=True)
    libraries = Path(triton.__file__).parent / "backends" / "amd" / "lib"
    for name in ("ocml.bc", "ockl.bc"):
        with contextlib.suppress(FileExistsError):
            (bitcode / name).symlink_to(libraries / name)
    return folder


@cache
def _stand_in() -> tuple[ctypes.CDLL, str]:
    """The replacement of FlyDSL's GPU runtime: loaded, and its path."""
    source = (build.RUNTIME / "flydsl.c").read_text()
    target = build.cache_folder() / "flydsl.so"
    stamp = build.cache_folder() / "flydsl.c"
    if not target.exists() or not stamp.exists() or stamp.read_text() != source:
        build._compile(source, target)
        stamp.write_text(source)
    return ctypes.CDLL(str(target)), str(target)


class FlyDriver:
    """Receives FlyDSL's modules and launches; options as for `triton_driver.EmulatorDriver`."""

    def __init__(
        self,
        arch: str,
        *,
        execute: bool = True,
        schedules: Sequence[Schedule] = ONE,
        strict: bool = True,
    ):
        if arch not in TARGETS:
            raise ValueError(f"no AMD target {arch!r}; known are {', '.join(TARGETS)}")
        self.arch, self.executes, self.schedules, self.strict = arch, execute, schedules, strict
        self.launches: list[Launch] = []
        self.errors: list[BaseException] = []  # raised when the `with` ends
        self.dumps = tempfile.mkdtemp(prefix="gcnemu-flydsl-")
        self.programs: dict[str, Program] = {}

    # --- what the stand-in calls ---

    def load(self, data: int, size: int) -> int:
        blob = ctypes.string_at(data, _elf_size(data))
        _modules.append((blob, self._assembly_of(blob)))
        return len(_modules)

    def launch(self, function: int, sizes: Any, shared: int, parameters: Any) -> None:
        (blob, assembly), name = _functions[function]
        if not re.search(rf'amdgcn_target\s+"[^"]*{self.arch}\b', assembly):
            raise RuntimeError(
                f"{name} was compiled for another target than {self.arch}: make it anew"
            )
        kernel = code_object.read(blob)[name]
        grid, block = tuple(sizes[0:3]), tuple(sizes[3:6])
        launch = Launch(
            name, self.arch, grid, (), (block[0] * block[1] * block[2] + 63) // 64,  # type: ignore[arg-type]
            kernel.lds + shared, assembly, blob,
        )  # fmt: skip
        self.launches.append(launch)
        if not self.executes or 0 in grid:
            return
        if assembly not in self.programs:
            self.programs[assembly] = Program(assembly, name)
        launch.found = self.programs[assembly](
            _pack(kernel, sizes, parameters), grid, block, dynamic_lds=shared,
            regions=live_tensors(), schedules=self.schedules,
        )  # fmt: skip
        launch.ran = True
        faults = [str(f) for f in launch.found if f.severity == FAULT]
        if faults and self.strict:
            raise RuntimeError(f"{name} on {self.arch}: " + "; ".join(faults[:4]))

    def _assembly_of(self, blob: bytes) -> str:
        """The assembly text that FlyDSL wrote beside this code object.

        It comes from a second run of FlyDSL's compiler, so it is assembled and must give the same
        bytes: what runs is then the code object's own code.
        """
        names, machine_code = set(code_object.read(blob)), code_object.code(blob)
        dumps = sorted(Path(self.dumps).rglob("*final_isa.s"), key=os.path.getmtime, reverse=True)
        for path in dumps:
            text = path.read_text()
            if set(asm.kernel_names(text)) != names:
                continue
            if code_object.code(llvm.assemble(text, self.arch)) == machine_code:
                return text
        raise RuntimeError(
            f"none of FlyDSL's {len(dumps)} assembly dumps is the code of {sorted(names)}"
        )


_modules: list[tuple[bytes, str]] = []
_functions: dict[int, tuple[tuple[bytes, str], str]] = {}
_active: list[FlyDriver] = []


def _guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    """C cannot carry an exception: keep it for the end of the `with`."""

    def run(*args: Any) -> Any:
        try:
            return call(*args)
        except BaseException as error:
            _active[-1].errors.append(error)
            return 0

    return run


def _get(module: int, name: bytes) -> int:
    handle = 0x1000 + len(_functions)
    _functions[handle] = (_modules[module - 1], name.decode())
    return handle


_callbacks = (
    _LOAD(_guarded(lambda data, size: _active[-1].load(data, size))),
    _GET(_guarded(_get)),
    _LAUNCH(_guarded(lambda *a: _active[-1].launch(*a))),
)


def _elf_size(address: int) -> int:
    """The section headers come last in a linked object."""
    (offset,) = struct.unpack("<Q", ctypes.string_at(address + 40, 8))
    size, count = struct.unpack("<HH", ctypes.string_at(address + 58, 4))
    return int(offset + size * count)


def _pack(kernel: code_object.CodeObjectKernel, sizes: Any, parameters: Any) -> bytes:
    """Arguments are passed by pointer, in order; the hidden ones are the launch's sizes."""
    block = bytearray(kernel.kernarg_size)
    visible = [a for a in kernel.arguments if not a.kind.startswith("hidden_")]
    for n, place in enumerate(visible):
        block[place.offset : place.offset + place.size] = ctypes.string_at(
            parameters[n], place.size
        )
    for place in kernel.arguments:
        if place.kind in HIDDEN_SIZES:
            value = sizes[HIDDEN_SIZES[place.kind]]
        elif place.kind == "hidden_grid_dims":
            value = 3
        else:
            continue
        block[place.offset : place.offset + place.size] = value.to_bytes(place.size, "little")
    return bytes(block)


def live_tensors() -> list[Region]:
    """The storage of every CPU tensor that Python can reach."""
    found: dict[int, Region] = {}
    for thing in gc.get_objects():
        try:
            if not isinstance(thing, torch.Tensor) or thing.device.type != "cpu":
                continue
            storage = thing.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
        except Exception:  # dead weak proxies, tensors without storage
            continue
        if size:
            found[start] = Region(start, size, f"{thing.dtype} {list(thing.shape)}")
    return list(found.values())


@contextlib.contextmanager
def active(arch: str, **options: Any) -> Iterator[FlyDriver]:
    """Run FlyDSL launches on the emulator for a while; options as for `FlyDriver`.

    Raises (when it ends): the first error of a launch.
    """
    import flydsl.compiler.jit_executor as executor

    driver = FlyDriver(arch, **options)
    library, path = _stand_in()
    library.gcn_install(*_callbacks)
    environment = {
        "ARCH": arch, "FLYDSL_GPU_ARCH": arch, "ROCM_PATH": str(rocm_folder()),
        "FLYDSL_DUMP_IR": "1",
        "FLYDSL_DUMP_DIR": driver.dumps, "FLYDSL_RUNTIME_ENABLE_CACHE": "0",
    }  # fmt: skip
    before = {key: os.environ.get(key) for key in environment}
    original = executor._resolve_runtime_libs
    executor._resolve_runtime_libs = lambda: [path, *map(str, original()[1:])]
    os.environ.update(environment)
    _active.append(driver)
    try:
        yield driver
    finally:
        _active.pop()
        shutil.rmtree(driver.dumps, ignore_errors=True)
        executor._resolve_runtime_libs = original
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
    if driver.errors:
        raise driver.errors[0]
