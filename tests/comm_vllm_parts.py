"""Stand-ins for the objects that vLLM builds its paths from, over gloo, with planted faults."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from moe_backend.engines.vllm_comm_paths import COMMUNICATORS, PARTS, module_of
from moe_backend.engines.vllm_comm_switch import TorchInsteadOfPyNccl

built: list[str] = []  # the paths that vLLM built in this process
used: list[str] = []  # the paths that reduced something


class Stand:
    """One object for every path: it has the methods of each."""

    disabled = False
    path = ""
    fault = ""

    def __init__(self, group: Any = None, device: Any = None, **more: Any) -> None:
        built.append(self.path)
        if self.fault == "error when built":
            raise RuntimeError(f"{self.path} cannot be built")
        if self.fault == "hang when built":
            time.sleep(1000)
        if self.fault == "only on rank 0":
            self.disabled = dist.get_rank() > 0
        self.group = group if dist.get_world_size(group) > 0 else None

    def reduce(self, tensor: torch.Tensor, *_: Any, **more: Any) -> torch.Tensor:
        used.append(self.path)
        result = tensor.clone()
        if self.fault == "hang" and dist.get_rank() == 0:
            time.sleep(1000)
        if self.fault == "error" and dist.get_rank() == 1:
            raise RuntimeError(f"{self.path} failed")
        dist.all_reduce(result, group=self.group)
        if self.fault in ("nan", "wrong") and dist.get_rank() == 1:
            result.view(-1)[0] += float("nan") if self.fault == "nan" else 1
        return result

    custom_all_reduce = quick_all_reduce = all_reduce = reduce

    def takes(self, tensor: torch.Tensor, *_: Any) -> bool:
        return True

    should_custom_ar = should_quick_allreduce = should_use_symm_mem = takes
    should_use_fi_ar = should_use = takes

    def takes_not(self, *_: Any) -> bool:
        return False

    should_custom_all_gather = should_custom_ag = should_custom_rs = takes_not

    def custom_all_gather(self, *_: Any, **more: Any) -> None:
        return None

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        pass

    destroy = close


class StandPyNccl(TorchInsteadOfPyNccl):
    """PyNccl as far as vLLM uses it."""

    available = True
    fault = ""

    def __init__(self, group: Any, device: Any) -> None:
        built.append("pynccl")
        super().__init__(group, torch.device("cpu"))
        self.disabled = self.fault == "disabled"

    def all_reduce(self, in_tensor: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        used.append("pynccl")
        result = super().all_reduce(in_tensor, *args, **more)
        if self.fault in ("nan", "wrong") and dist.get_rank() == 1:
            result.view(-1)[0] += float("nan") if self.fault == "nan" else 1
        return result


class GpuPlatform:
    """Says what vLLM's constructor asks of the platform."""

    def __init__(self, rocm: bool) -> None:
        self.rocm = rocm

    def is_cuda(self) -> bool:
        return not self.rocm

    def is_rocm(self) -> bool:
        return self.rocm


def install(patch: Any, faults: dict[str, str], rocm: bool) -> tuple[str, ...]:
    """Have vLLM build stand-ins; returns the paths of such a machine.

    Args:
        patch: a `pytest.MonkeyPatch`.
        faults: path to fault.
    """
    import vllm.distributed.device_communicators.cuda_communicator as cuda_communicator
    from vllm._aiter_ops import rocm_aiter_ops

    patch.setattr(cuda_communicator, "current_platform", GpuPlatform(rocm))
    if rocm:
        paths = ["aiter", "quick"] if "aiter" in faults else ["custom", "quick"]
    else:
        paths = ["custom", "symm_mem", "flashinfer"]
    patch.setattr(rocm_aiter_ops, "is_custom_all_reduce_enabled", lambda: "aiter" in paths)
    for path in ("custom", *paths):
        stand = type(f"Stand_{path}", (Stand,), {"path": path, "fault": faults.get(path, "")})
        patch.setattr(module_of(PARTS[path]), PARTS[path].class_name, stand)
    pynccl = type("P", (StandPyNccl,), {"fault": faults.get("pynccl", "")})
    patch.setattr(f"{COMMUNICATORS}.pynccl.PyNcclCommunicator", pynccl)
    return (*paths, "pynccl", "torch")
