"""Compiles CUDA kernels for the host and launches them on CPU tensors; host.h says what that shows.

    library = compile(SOURCE, {"TILE": 64})
    launch(library, "once", grid=4, threads=256, shared_bytes=65536, args=[codes, scale, 8, 0.5])

The launch works on copies of the tensors' storages (tensors of one storage share it) between pages
that fault, and writes them back at its end.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "moe_backend" / "kernels" / "hopper" / "cuda"
FLAGS = [
    # More than -Og takes longer to compile than it saves: most kernels run once or twice. With -O1
    # it is almost twice as long, and launches take as long as with -Og.
    *("-std=c++17", "-Og", "-march=native", "-g1", "-fno-exceptions", "-DCUDA_ON_HOST"),
    *("-shared", "-fPIC", "-fvisibility=hidden"),
    # As nvcc: types may be reinterpreted, and `#pragma unroll` is known.
    *("-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-psabi", "-Werror=return-type"),
    # What a GPU would fault at, or do differently, traps; what is not set is far from any number.
    *("-fsanitize=alignment,bounds,shift-exponent", "-fsanitize-undefined-trap-on-error"),
    "-ftrivial-auto-var-init=pattern",
]
KERNEL = re.compile(r"^KERNEL\s+void\s+(?:__launch_bounds__\(.*?\)\s+)?(\w+)\s*\(", re.MULTILINE)


@dataclass(frozen=True)
class Library:
    path: Path
    kernels: tuple[str, ...]
    entry: ctypes._CFuncPtr


@dataclass(frozen=True)
class TensorMap:
    tensor: torch.Tensor
    packed: bytes


class _Argument(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_long), ("value", ctypes.c_uint64)]


class _Range(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("tensors", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("tensor_count", ctypes.c_int),
        ("argument_count", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("sources_may_change", ctypes.c_int),
        ("resident", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("failure", ctypes.c_void_p),
        ("failure_bytes", ctypes.c_uint64),
    ]


def compile(
    source: Path, defines: dict[str, object] | None = None, folder: Path | None = None
) -> Library:
    """A library of the kernels (`KERNEL void name(`) of a file, compiled unless `folder` has it."""
    folder = folder or Path(tempfile.gettempdir()) / f"cuda_host_{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    text = source.read_text()
    flags = [*FLAGS, f"-I{HERE}", f"-I{KERNELS}", f"-I{source.parent}", f"-I{folder}"]
    macros = "".join(f"#define {name} {value}\n" for name, value in (defines or {}).items())
    parts = [text, macros, *flags]
    for path in sorted({*HERE.glob("*.h"), *KERNELS.glob("*.cuh"), *source.parent.glob("*.cuh")}):
        parts.append(path.read_text())
    name = f"{source.stem}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    kernels = tuple(KERNEL.findall(text))
    path = folder / f"{name}.so"
    if not path.exists():
        table = ", ".join(f'describe<{kernel}>("{kernel}", {kernel})' for kernel in kernels)
        whole = folder / f"{name}.{os.getpid()}.cpp"
        whole.write_text(
            f'#include "{_header(folder)}"\n{macros}#include "{source.resolve()}"\n'
            f"const std::vector<host::Kernel> host::kernels = {{{table}}};\n"
        )
        built = whole.with_suffix(".so")
        try:
            _run("g++", *flags, str(whole), "-o", str(built), "-ldl")
        finally:
            whole.unlink()
        built.rename(path)
    entry = ctypes.CDLL(str(path)).host_launch
    entry.restype = None
    return Library(path, kernels, entry)


def _header(folder: Path) -> str:
    """What to include for launch.h: parsed once, as that takes as long as a small kernel."""
    parts = [*FLAGS, *(path.read_text() for path in sorted(HERE.glob("*.h")))]
    name = f"launch_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.h"
    path = folder / f"{name}.gch"  # which g++ takes for the header
    if not path.exists():
        built = folder / f"{name}.{os.getpid()}.gch"
        _run("g++", *FLAGS, "-x", "c++-header", str(HERE / "launch.h"), "-o", str(built))
        built.rename(path)
    return name


def _run(*command: str) -> None:
    """Raises RuntimeError with the compiler's words."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)


def tensor_map(
    tensor: torch.Tensor,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    swizzle: int = 0,
) -> TensorMap:
    """A tensor for copy_box, as for cuTensorMapEncodeTiled: the fastest dimension first, without
    its stride; swizzle 0 or 128."""
    rank, size = len(dims), tensor.element_size()
    strides = [size, *strides_bytes]
    ends = sum((dim - 1) * stride for dim, stride in zip(dims, strides, strict=True)) + size
    offset = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
    assert 1 <= rank <= 5, "dimensions"
    assert len(box) == rank, "as many sides as dimensions"
    assert all(1 <= side <= 256 for side in box), "sides of a box"
    assert not any(n % 16 for n in (tensor.data_ptr(), *strides_bytes, box[0] * size)), "alignment"
    assert ends <= tensor.untyped_storage().nbytes() - offset, "the tensor is smaller than its map"
    assert swizzle in (0, 128), "swizzle"
    assert swizzle == 0 or box[0] * size == 128, "only rows of 128 bytes are swizzled"

    def five(values: Sequence[int], bytes_each: int) -> bytes:
        padded = [*values, *[0] * (5 - rank)]
        return b"".join(value.to_bytes(bytes_each, "little") for value in padded)

    packed = tensor.data_ptr().to_bytes(8, "little") + five(strides, 8)
    packed += five(dims, 4) + five(box, 4)
    packed += rank.to_bytes(4, "little") + (swizzle // 128).to_bytes(4, "little")
    return TensorMap(tensor, packed.ljust(128, b"\0"))


def launch(
    library: Library,
    kernel: str,
    grid: int,
    threads: int,
    shared_bytes: int,
    args: Sequence[object],
    seed: int = 0,
    seconds: float = 120.0,
    sources_may_change: bool = False,
    resident: int | None = None,
    cluster: int = 1,
) -> None:
    """Runs a kernel; RuntimeError says what went wrong in it, and where.

    Tensors are passed as pointers (None as a null pointer), ints and bools as 32-bit integers,
    floats as floats. The seed decides the order of the threads and when copies arrive. After so
    many seconds a launch has failed. Sources of copies may change until these arrive where a kernel
    copies more than it makes use of, from what other blocks are writing; what changed is NaN.
    No more than `resident` blocks run at a time, where given; the next starts when one ends.
    `cluster` consecutive blocks are a cluster: they start together, where there is room for all.
    """
    storages: dict[int, int] = {}
    arguments = (_Argument * max(len(args), 1))()
    kept = []
    for argument, arg in zip(arguments, args, strict=False):
        tensor = arg.tensor if isinstance(arg, TensorMap) else arg
        if isinstance(tensor, torch.Tensor):
            assert tensor.device.type == "cpu"
            if tensor.numel():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        if isinstance(arg, TensorMap):
            buffer = ctypes.create_string_buffer(arg.packed, 128)
            kept.append(buffer)
            argument.kind, argument.value = ord("m"), ctypes.addressof(buffer)
        elif isinstance(arg, torch.Tensor):
            argument.kind, argument.value = ord("p"), arg.data_ptr()
        elif arg is None:
            argument.kind, argument.value = ord("p"), 0
        elif isinstance(arg, int):
            argument.kind, argument.value = ord("i"), arg & 0xFFFFFFFF
        elif isinstance(arg, float):
            argument.kind = ord("f")
            argument.value = ctypes.c_uint32.from_buffer(ctypes.c_float(arg)).value
        else:
            raise TypeError(f"{kernel}: an argument of type {type(arg).__name__}")
    tensors = (_Range * max(len(storages), 1))(*storages.items())
    failure = ctypes.create_string_buffer(1 << 16)
    request = _Launch(
        kernel=kernel.encode(),
        grid=grid,
        threads=threads,
        shared_bytes=shared_bytes,
        tensors=ctypes.addressof(tensors),
        arguments=ctypes.addressof(arguments),
        tensor_count=len(storages),
        argument_count=len(args),
        seed=seed,
        seconds=seconds,
        sources_may_change=sources_may_change,
        resident=grid if resident is None else min(resident, grid),
        cluster=cluster,
        failure=ctypes.addressof(failure),
        failure_bytes=len(failure),
    )
    library.entry(ctypes.byref(request))
    if failure.value:
        raise RuntimeError(f"{kernel}, seed {seed}: {_with_lines(library, failure.value.decode())}")


def _with_lines(library: Library, message: str) -> str:
    """The offsets of calls replaced by the lines of the kernels that they are in."""
    offsets = sorted(set(re.findall(r"\+(0x[0-9a-f]+)", message)))
    command = ["addr2line", "-e", str(library.path), "-a", "-i", *offsets]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return message
    lines: dict[str, list[str]] = {}
    for line in found.splitlines():
        if line.startswith("0x"):
            inside = lines.setdefault(hex(int(line, 16)), [])
            continue
        path = Path(line.split(" ")[0])
        if path.suffix[:3] == ".cu":
            inside.append(path.name)

    def called(match: re.Match[str]) -> str:
        frames = [line for offset in match[0].split() for line in lines.get(offset[1:], [])]
        return " at " + ", called at ".join(frames) if frames else ""

    return re.sub(r"( \+0x[0-9a-f]+)+", called, message)
