"""Launches of kernels in CUDA C++ on PyTorch's current stream. Safe in a CUDA graph.

A launch may start while what is before it still runs (programmatic dependent launch): the kernel
waits for that itself before it reads what others write.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
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
    """

    source: Path
    name: str
    constants: tuple[tuple[str, int], ...]
    shared: int


@dataclass(frozen=True)
class TensorMap:
    """A tensor of bytes as the tensor memory accelerator sees it, swizzled by 128 bytes.

    Attributes:
        shape, strides: in bytes, the fastest dimension first; strides without the first one,
            multiples of 16.
        box: of one copy, its first dimension 128 bytes.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


Argument = torch.Tensor | TensorMap | int | float
_loaded: dict[Kernel, Any] = {}
_ready: set[tuple[Kernel, int]] = set()  # on which GPU
_thread = threading.local()


def launch(kernel: Kernel, grid: int, threads: int, arguments: Sequence[Argument]) -> None:
    """Run a kernel, compiled and loaded at its first launch.

    Args:
        arguments: tensors go as addresses, ints as int32, floats as fp32, maps as 128 bytes.
    """
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


def _start(
    handle: Any, kernel: Kernel, grid: int, threads: int, arguments: Sequence[Argument]
) -> None:
    from cuda.bindings import driver

    index = torch.cuda.current_device()
    if (kernel, index) not in _ready:
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = _checked(driver.cuDeviceGet(index))
        _checked(driver.cuKernelSetAttribute(most, kernel.shared, handle, device))
        _ready.add((kernel, index))
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = kernel.shared
    config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
    config.attrs = [_overlapped()]
    config.numAttrs = 1
    values = [_packed(argument) for argument in arguments]
    addresses = [ctypes.addressof(value) for value in values]
    pointers = (ctypes.c_void_p * len(values))(*addresses)
    started = driver.cuLaunchKernelEx(config, handle, ctypes.addressof(pointers), 0)
    _checked(started, f"launching {kernel.name} on cuda:{index}")


@cache
def _overlapped() -> Any:
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _packed(argument: Argument) -> Any:
    if isinstance(argument, TensorMap):
        tensor = argument.tensor
        return _encoded(tensor.data_ptr(), argument.shape, argument.strides, argument.box)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_uint64(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int32(argument)


@lru_cache(maxsize=MAPS_KEPT)
def _encoded(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> Any:
    from cuda.bindings import driver

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
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return (ctypes.c_uint64 * 16)(*(int(word) for word in made.opaque))


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
