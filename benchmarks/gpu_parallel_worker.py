"""What `gpu_parallel.py` has vLLM import in each worker before the worker builds any group.

It counts the calls of every path, at capture and in eager steps; lets vLLM's symmetric memory run
without NVLink multicast; and plants a fault, if it is told to. Private names as in vLLM 0.33.0
`distributed/device_communicators/`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch

from moe_backend.engines import vllm_comm_start
from moe_backend.engines.vllm_comm_switch import TorchInsteadOfPyNccl

DEVICE_COMMUNICATORS = "vllm.distributed.device_communicators"
COUNTED = {
    "custom": ("custom_all_reduce", "CustomAllreduce", "custom_all_reduce"),
    "quick": ("quick_all_reduce", "QuickAllReduce", "quick_all_reduce"),
    "symm_mem": ("symm_mem", "SymmMemCommunicator", "all_reduce"),
    "flashinfer": ("flashinfer_all_reduce", "FlashInferAllReduce", "all_reduce"),
    "pynccl": ("pynccl", "PyNcclCommunicator", "all_reduce"),
    "shm": ("cpu_communicator", "_CPUSHMDistributed", "all_reduce"),
}
calls: Counter[str] = Counter()


class CountingWorker:
    def collective_calls(self) -> tuple[dict[str, int], int]:
        """Calls of each path since the worker started, and the most that the check makes of it."""
        sizes = len(vllm_comm_start.CHECK_SIZES)
        return dict(calls), sizes * 3 + sizes


def count(path: str, owner: Any, method: str) -> None:
    original = getattr(owner, method)

    @functools.wraps(original)
    def counted(*args: Any, **more: Any) -> Any:
        calls[path] += 1
        result = original(*args, **more)
        if os.environ.get("GPU_PARALLEL_FAULTY") and path in ("custom", "shm"):
            spoil(args[1] if result is None else result)  # shared memory works in place
        return result

    setattr(owner, method, counted)


def spoil(result: torch.Tensor) -> None:
    if torch.distributed.get_rank() == 1:
        result.neg_()


def allow_two_shot() -> None:
    """The two-shot kernel of vLLM's symmetric memory, which needs no multicast, without it.

    vLLM looks at the handle of the rendezvous and gives up where it has no multicast pointer
    (vllm-project/vllm#50179), and takes the multicast kernel for 4 ranks and more.
    """
    symm_mem = importlib.import_module(f"{DEVICE_COMMUNICATORS}.symm_mem")
    torch_symm_mem = symm_mem.torch_symm_mem

    def rendezvous(*args: Any) -> Any:
        torch_symm_mem.rendezvous(*args)
        return SimpleNamespace(multicast_ptr=1)

    symm_mem.torch_symm_mem = SimpleNamespace(empty=torch_symm_mem.empty, rendezvous=rendezvous)
    kernels = symm_mem.SymmMemCommunicator._WORLD_SIZES_MULTIMEM
    symm_mem.SymmMemCommunicator._WORLD_SIZES_MULTIMEM = {key: [] for key in kernels}


for _path, (_module, _class, _method) in COUNTED.items():
    count(
        _path,
        getattr(importlib.import_module(f"{DEVICE_COMMUNICATORS}.{_module}"), _class),
        _method,
    )
count("torch", TorchInsteadOfPyNccl, "all_reduce")
if os.environ.get("GPU_PARALLEL_TWO_SHOT"):
    allow_two_shot()
