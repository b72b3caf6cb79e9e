"""Launches of kernels in CUDA C++ on PyTorch's current stream. Safe in a CUDA graph.

A launch may start while what is before it still runs (programmatic dependent launch): the kernel
waits for that itself before it writes, and before it reads what the launch before it writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_backend.kernels.cuda import build

MAPS_KEPT = 8192  # a few for each layer, and for each address that activations come at


class Kernel(NamedTuple):
    """A kernel with its constants.

    Attributes:
        source: the file; name: of the kernel in it.
        constants: macros and their values.
        shared: bytes of dynamic shared memory.
        cluster: blocks of a cluster, at most 8; a launch's are whole clusters.
    """

    source: Path
    name: str
    constants: tuple[tuple[str, int], ...]
    shared: int
    cluster: int = 1


class Memory(NamedTuple):
    """Device memory that `carve` gave, by its address."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class TensorMap(NamedTuple):
    """A matrix of bytes as the tensor memory accelerator sees it.

    Attributes:
        memory: where it begins.
        shape, strides: in bytes, the fastest dimension first; strides without the first one,
            multiples of 16.
        box: of one copy; where its first dimension is 128 bytes, swizzled by so many.
        streamed: L2 fetches no more than what is asked for, not 256 bytes: with copies after which
            it gives lines up first, what came besides would be gone when it is wanted (on an H200
            3 to 8 % slower).
    """

    memory: torch.Tensor | Memory
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    streamed: bool = False


Argument = torch.Tensor | Memory | TensorMap | int | float
_loaded: dict[Kernel, Any] = {}
_thread = threading.local()


def carve(device: torch.device, *sizes: int) -> tuple[torch.Tensor, list[Memory]]:
    """Memory for several arrays of so many bytes, each from a multiple of 256 on.

    Returns:
        the tensor that holds it, to be kept until the last launch that uses it; and the arrays.
    """
    ends = list(accumulate((size + 255) // 256 * 256 for size in sizes))
    whole = torch.empty(ends[-1], dtype=torch.uint8, device=device)
    base = whole.data_ptr()
    return whole, [Memory(base + start) for start in (0, *ends[:-1])]


class _Numbers:
    """So many int32 of a GPU's memory, for `torch.as_tensor` (the CUDA array interface)."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (count,), "typestr": "<i4", "data": (address, False), "version": 3,
        }  # fmt: skip


def zeros(device: torch.device, count: int) -> torch.Tensor:
    """So many int32 zeros, for as long as the process lives, in memory that is not PyTorch's."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # there is a context
        address = int(_checked(driver.cuMemAlloc(4 * count), "allocating counters"))
        _checked(driver.cuMemsetD32(address, 0, count), "clearing counters")
        return torch.as_tensor(_Numbers(address, count), device=device)


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """The same, contiguous and from a multiple of 16 bytes on, as copies and wide loads want it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(kernel: Kernel, grid: int, threads: int, arguments: Sequence[Argument]) -> None:
    """Run a kernel, compiled and loaded at its first launch.

    Args:
        arguments: tensors and memory go as addresses, ints as int32, floats as fp32, maps as 128
            bytes; the same kinds in every launch of a kernel.
    """
    if grid % kernel.cluster:
        raise ValueError(f"{kernel.name}: {grid} blocks are not whole clusters of {kernel.cluster}")
    instead = getattr(_thread, "instead", None)
    if instead is not None:
        instead(kernel)
        return
    if kernel not in _loaded:
        _loaded[kernel] = _load(kernel)
    _start(_loaded[kernel], kernel, grid, threads, arguments)


def machine_code(kernel: Kernel) -> tuple[bytes, bool]:
    """As `build.machine_code`."""
    return build.machine_code(kernel.source, kernel.constants)


def is_loaded(kernel: Kernel) -> bool:
    """Whether `launch` has nothing to compile or load."""
    return kernel in _loaded


@contextlib.contextmanager
def instead_of_launching(do: Callable[[Kernel], None]) -> Iterator[None]:
    """Within, this thread's launches only tell `do` of their kernel."""
    _thread.instead = do
    try:
        yield
    finally:
        del _thread.instead


def _load(kernel: Kernel) -> Any:
    """The driver's handle of a kernel; what was kept on disk is compiled again if it is damaged."""
    code, fresh = machine_code(kernel)
    try:
        return _handle(kernel, code)
    except RuntimeError:
        if fresh:
            raise
    build.forget(kernel.source, kernel.constants)
    return _handle(kernel, machine_code(kernel)[0])


def _handle(kernel: Kernel, code: bytes) -> Any:
    from cuda.bindings import driver

    doing = f"loading {kernel.name} ({dict(kernel.constants)})"
    library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0), doing)
    return _checked(driver.cuLibraryGetKernel(library, kernel.name.encode()), doing)


class _Packing:
    """Where arguments of these kinds lie for the driver, each from a multiple of 8 bytes on."""

    def __init__(self, arguments: Sequence[Argument]) -> None:
        layouts = ["=" + _layout(argument) for argument in arguments]
        self.format = struct.Struct("=" + "".join(layout[1:] for layout in layouts))
        self.bytes = ctypes.create_string_buffer(self.format.size)
        sizes = map(struct.calcsize, layouts[:-1])
        starts = accumulate(sizes, initial=ctypes.addressof(self.bytes))
        self.pointers = (ctypes.c_void_p * len(layouts))(*starts)

    def pack(self, arguments: Sequence[Argument]) -> None:
        """Raises struct.error for an argument of another kind."""
        self.format.pack_into(self.bytes, 0, *[_packed(argument) for argument in arguments])


class _Prepared:
    """A thread's launches of a kernel on a GPU: what stays the same, and where arguments go."""

    def __init__(
        self, handle: Any, kernel: Kernel, index: int, arguments: Sequence[Argument]
    ) -> None:
        from cuda.bindings import driver

        torch.cuda.set_device(index)  # a thread that has done nothing with it yet has no context
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = _checked(driver.cuDeviceGet(index))
        _checked(driver.cuKernelSetAttribute(most, kernel.shared, handle, device))
        self.handle = handle
        self.config = driver.CUlaunchConfig()
        self.config.gridDimY = self.config.gridDimZ = 1
        self.config.blockDimY = self.config.blockDimZ = 1
        self.config.sharedMemBytes = kernel.shared
        self.config.attrs = _attributes(kernel.cluster)
        self.config.numAttrs = len(self.config.attrs)
        self.packing = _Packing(arguments)

    def start(self, grid: int, threads: int, arguments: Sequence[Argument], stream: int) -> Any:
        """The driver's answer."""
        from cuda.bindings import driver

        self.packing.pack(arguments)
        self.config.gridDimX, self.config.blockDimX = grid, threads
        self.config.hStream = driver.CUstream(stream)
        pointers = ctypes.addressof(self.packing.pointers)
        return driver.cuLaunchKernelEx(self.config, self.handle, pointers, 0)


def _start(
    handle: Any, kernel: Kernel, grid: int, threads: int, arguments: Sequence[Argument]
) -> None:
    index = torch.cuda.current_device()
    prepared: dict[tuple[Kernel, int], _Prepared] = _thread.__dict__.setdefault("prepared", {})
    one = prepared.get((kernel, index))
    if one is None:
        one = prepared[kernel, index] = _Prepared(handle, kernel, index, arguments)
    started = one.start(grid, threads, arguments, torch.cuda.current_stream(index).cuda_stream)
    if started[0]:
        _checked(started, f"launching {kernel.name} on cuda:{index}")


@cache
def _attributes(cluster: int) -> list[Any]:
    """Launches overlap, and so many blocks are a cluster."""
    from cuda.bindings import driver

    ids = driver.CUlaunchAttributeID
    overlapped = driver.CUlaunchAttribute()
    overlapped.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlapped.value.programmaticStreamSerializationAllowed = 1
    if cluster == 1:
        return [overlapped]
    clusters = driver.CUlaunchAttribute()
    clusters.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    sides = clusters.value.clusterDim
    sides.x, sides.y, sides.z = cluster, 1, 1
    return [overlapped, clusters]


def _layout(argument: Argument) -> str:
    """How `struct` is to pack what `_packed` makes of it."""
    if isinstance(argument, TensorMap):
        return "128s"
    if isinstance(argument, float):
        return "f4x"
    return "i4x" if isinstance(argument, int) else "Q"


def _packed(argument: Argument) -> bytes | int | float:
    if isinstance(argument, int | float):
        return argument
    if isinstance(argument, TensorMap):
        return _encoded(argument.memory.data_ptr(), *argument[1:])
    return argument.data_ptr()


@lru_cache(maxsize=MAPS_KEPT)
def _encoded(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    streamed: bool,
) -> bytes:
    from cuda.bindings import driver

    fetched, swizzles = driver.CUtensorMapL2promotion, driver.CUtensorMapSwizzle
    made = _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            len(shape),
            address,
            [driver.cuuint64_t(n) for n in shape],
            [driver.cuuint64_t(n) for n in strides],
            [driver.cuuint32_t(n) for n in box],
            [driver.cuuint32_t(1) for _ in box],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B
            if box[0] == 128
            else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
            fetched.CU_TENSOR_MAP_L2_PROMOTION_L2_128B
            if streamed
            else fetched.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return struct.pack("=16Q", *(int(word) for word in made.opaque))


def _checked(result: tuple[Any, ...], doing: str = "preparing a launch") -> Any:
    """The value of a call of the driver.

    Raises:
        RuntimeError: the driver's error.
    """
    from cuda.bindings import driver

    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{doing}: the CUDA driver says {driver.CUresult(error).name}")
    return values[0] if values else None
