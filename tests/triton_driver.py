"""A stand-in for compilers and drivers: launches are counted, nothing is compiled or run."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from moe_backend.kernels import hopper
from moe_backend.kernels.cuda import build, launch
from moe_backend.kernels.hopper import device as hopper_device
from moe_backend.kernels.hopper import tiled
from moe_backend.kernels.triton import device as triton_device


class _Driver:
    """A Hopper GPU, as far as compiling for it goes."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Counts:
    """What the host code had compiled and launched: names of kernels, in order."""

    def __init__(self):
        self.compiled = []
        self.launched = []
        self.threads = set()
        self.cached = False  # whether everything was kept by an earlier process
        self.compile = lambda: None  # called for each


class _Kernel:
    def __init__(self, name, counts):
        self.function = None
        self.packed_metadata = None
        self.run = lambda *_: counts.launched.append(name)

    def launch_metadata(self, *_):
        return None


@contextlib.contextmanager
def counted(monkeypatch):
    """Within, Triton and NVRTC "compile" and the driver "launches" on a CPU; gives the counts."""
    counts = Counts()
    _count_cuda(monkeypatch, counts)

    def fake_compile(src, target=None, options=None, _env_vars=None):
        name = src.fn.__name__
        counts.compile()
        counts.threads.add(threading.get_ident())
        if not counts.cached:
            counts.compiled.append(name)
        listener = triton.knobs.compilation.listener
        if listener is not None:
            metadata = {"name": name}
            listener(
                src=src, metadata=metadata, metadata_group={}, times=None, cache_hit=counts.cached
            )
        return _Kernel(name, counts)

    monkeypatch.setattr(triton.compiler, "compile", fake_compile)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    kernels = [
        f
        for module in _device_modules()
        for f in vars(module).values()
        if isinstance(f, triton.runtime.jit.JITFunction)
    ]
    for kernel in kernels:
        kernel.device_caches.clear()
    monkeypatch.setattr(driver, "_active", _Driver())
    try:
        yield counts
    finally:
        launch._loaded.clear()
        tiled.multiprocessors.cache_clear()
        for kernel in kernels:
            kernel.device_caches.clear()


def _count_cuda(monkeypatch, counts):
    """The same for kernels in CUDA C++, whatever is installed; what is compiled is kept."""
    kept = set()

    def machine_code(kernel):
        if kernel in kept:
            return b"", False
        counts.compile()
        counts.threads.add(threading.get_ident())
        kept.add(kernel)
        if not counts.cached:
            counts.compiled.append(kernel.name)
        return b"", not counts.cached

    def start(handle, kernel, grid, threads, arguments):
        counts.launched.append(kernel.name)

    launch._loaded.clear()
    monkeypatch.setattr(build, "missing", lambda: None)
    monkeypatch.setattr(launch, "machine_code", machine_code)
    monkeypatch.setattr(launch, "_handle", lambda kernel, code: kernel.name)
    monkeypatch.setattr(launch, "_start", start)


def _device_modules():
    """Modules of device code, those of later kernels of the Hopper folder included."""
    found = [hopper_device, triton_device]
    for module in pkgutil.iter_modules(hopper.__path__):
        if module.name.endswith("_device"):
            found.append(importlib.import_module(f"{hopper.__name__}.{module.name}"))
    return found
