"""Bytes of tensors that are alive, and the most there were, on a CPU."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Within, counts storages that operators make. Those from before are counted by `know`."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def know(self, *tensors: torch.Tensor) -> None:
        """Count these from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._alive or self._alive[reference.cdata][0].expired():
                self._alive[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, self.now())

    def now(self) -> int:
        """Bytes that are alive."""
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.know(*(t for t in tree_iter(out) if isinstance(t, torch.Tensor)))
        return out
