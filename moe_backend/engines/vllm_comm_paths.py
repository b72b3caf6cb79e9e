"""vLLM's collective paths, one by one: opened for the probe, found on a communicator, replaced.

Private names used, checked on vLLM 0.30.0, 0.31.0, 0.32.0 and 0.33.0 (read; the CPU ones run on
0.32.0): the attributes and classes in `PARTS`, the methods called below, `CpuCommunicator` with
`dist_module` and `_CPUSHMDistributed`.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.distributed as dist

from moe_backend.comm.checks import Collective, Unavailable, World

COMMUNICATORS = "vllm.distributed.device_communicators"


@dataclass(frozen=True)
class Part:
    """Where a path sits: the attribute of the communicator, and the class that it is built from."""

    attribute: str
    module: str
    class_name: str


PARTS = {
    "custom": Part("ca_comm", "custom_all_reduce", "CustomAllreduce"),
    "aiter": Part("aiter_ar_comm", "cuda_communicator", "AiterCustomAllreduce"),
    "quick": Part("qr_comm", "quick_all_reduce", "QuickAllReduce"),
    "symm_mem": Part("symm_mem_comm", "symm_mem", "SymmMemCommunicator"),
    "flashinfer": Part("fi_ar_comm", "flashinfer_all_reduce", "FlashInferAllReduce"),
    "flashinfer_pcie": Part(
        "fi_pcie_ipc_ar_comm", "flashinfer_pcie_ipc_all_reduce", "FlashInferPcieIpcAllReduce"
    ),
    "pynccl": Part("pynccl_comm", "pynccl", "PyNcclCommunicator"),
}


def module_of(part: Part) -> Any:
    return importlib.import_module(f"{COMMUNICATORS}.{part.module}")


# --- Paths of a communicator, as the checks want them ---------------------------------------------


def collective(path: str, part: Any, world: World) -> Collective:
    """The path that vLLM's object `part` implements.

    Raises:
        Unavailable: vLLM has it disabled, or it can only be used by vLLM itself.
    """
    if part is None or getattr(part, "disabled", False):
        raise Unavailable(f"vLLM does not enable {path} here")
    if path in ("custom", "aiter"):
        return Collective(
            all_reduce=part.custom_all_reduce,
            all_gather=part.custom_all_gather,
            accepts=part.should_custom_ar,
            gathers=part.should_custom_ag if path == "aiter" else part.should_custom_all_gather,
            capture=part.capture,
            close=part.close,
        )
    if path == "quick":
        # Its smallest tensors: 1 to 16 MiB, by dtype, world size and codec. Those over 32 MiB
        # (8 ranks in bf16: 2 GiB) are left untried.
        return Collective(
            all_reduce=part.quick_all_reduce,
            accepts=part.should_quick_allreduce,
            tolerance=0.02,
            flat=True,
            sizes=(1 << 19, 1 << 20, 1 << 23, 1 << 24),
        )
    if path == "symm_mem":
        return Collective(all_reduce=part.all_reduce, accepts=part.should_use_symm_mem)
    if path == "flashinfer":
        return _flashinfer(part)
    if path == "pynccl":
        return _pynccl(part, world)
    raise Unavailable(f"{path} cannot be tried outside a running model")


def _pynccl(part: Any, world: World) -> Collective:
    def all_gather(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.new_empty(world.world_size * tensor.shape[0], *tensor.shape[1:])
        part.all_gather(result, tensor)
        return result

    return Collective(all_reduce=part.all_reduce, all_gather=all_gather)


def _flashinfer(part: Any) -> Collective:
    hidden_size = 1024  # the kernels take [tokens, hidden_size] and make a workspace for it

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, hidden_size)

    def accepts(tensor: torch.Tensor) -> bool:
        return tensor.numel() % hidden_size == 0 and bool(part.should_use_fi_ar(rows(tensor)))

    return Collective(
        all_reduce=lambda tensor: part.all_reduce(rows(tensor)).view(-1), accepts=accepts
    )


# --- Openers for the child processes --------------------------------------------------------------


def _open(path: str, world: World) -> Collective:
    if world.device.type != "cuda":
        raise Unavailable(f"{path} needs a CUDA or ROCm device")
    part = PARTS[path]
    built = getattr(module_of(part), part.class_name)(world.group, world.device)
    return collective(path, built, world)


open_custom = partial(_open, "custom")
open_aiter = partial(_open, "aiter")
open_quick = partial(_open, "quick")
open_symm_mem = partial(_open, "symm_mem")
open_flashinfer = partial(_open, "flashinfer")
open_pynccl = partial(_open, "pynccl")


def open_shm(world: World) -> Collective:
    """vLLM's shared-memory collectives, under a name that no server uses."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise Unavailable("shared memory serves the CPU platform only")
    current_platform.import_kernels()
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    parent = [os.getppid()]
    dist.broadcast_object_list(parent, src=0)
    os.environ["VLLM_DIST_IDENT"] = f"moe-backend-probe-{parent[0]}"
    communicator = CpuCommunicator(
        world.group, torch.device("cpu"), world.group, unique_name="tp:moe-backend-probe"
    )
    opened = shm_collective(communicator, world)
    # A child leaves without destructors. Once both sides have mapped it, the name is not needed.
    dist.barrier(world.group)
    name = f"{communicator.dist_module.group_name}_{world.rank}"
    FilePath("/dev/shm", name).unlink(missing_ok=True)
    return opened


def shm_collective(communicator: Any, world: World) -> Collective:
    """The shared-memory path of a `CpuCommunicator`.

    Raises:
        Unavailable: the communicator uses torch.distributed.
    """
    shm = communicator.dist_module
    if shm is torch.distributed:
        raise Unavailable("vLLM does not enable shared memory here")

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.clone()
        shm.all_reduce(result, group=communicator.device_group)
        return result

    def all_gather(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.new_empty(world.world_size * tensor.shape[0], *tensor.shape[1:])
        shm.all_gather_into_tensor(result, tensor, group=communicator.device_group)
        return result

    return Collective(all_reduce=all_reduce, all_gather=all_gather)


def prepare(world: World) -> None:
    """Import vLLM where it is installed. Some of its communicators ask its world group for their
    place in the host.
    """
    try:
        from vllm.distributed import parallel_state
    except ImportError:
        return  # the openers say so, path by path

    if parallel_state._WORLD is None:
        local_rank = world.device.index if world.device.type == "cuda" else world.rank
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        parallel_state.init_distributed_environment(
            world.world_size, world.rank, "env://", local_rank, backend
        )
