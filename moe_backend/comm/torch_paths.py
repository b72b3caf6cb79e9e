"""The paths that torch offers by itself: `torch.distributed`, and its symmetric memory."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from moe_backend.comm.checks import Collective, Unavailable, World

SYMMETRIC_NUMEL = 1 << 20

# torch 2.13 renamed these two and warns at every use of the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def open_torch(world: World) -> Collective:
    """NCCL or RCCL through a process group of its own; gloo on the CPU."""
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    return over_group(dist.new_group(backend=backend), world.world_size)


def over_group(group: dist.ProcessGroup, world_size: int) -> Collective:
    """`torch.distributed` over an existing group."""

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.clone()
        dist.all_reduce(result, group=group)
        return result

    def all_gather(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.new_empty(world_size * tensor.shape[0], *tensor.shape[1:])
        all_gather_single(result, tensor, group=group)
        return result

    return Collective(all_reduce=all_reduce, all_gather=all_gather)


def open_symmetric_memory(world: World) -> Collective:
    """One-shot and two-shot kernels over peer mappings; never multicast.

    Multicast is left alone because the fault that it can cause is not confined to a process: on a
    shared host a broken multicast group can take the switch's other devices out of service.

    Raises:
        Unavailable: no CUDA device, or the devices cannot map each other's memory.
    """
    if world.device.type != "cuda":
        raise Unavailable("symmetric memory needs a CUDA device")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric_memory

    name = world.group.group_name
    buffers: dict[torch.dtype, torch.Tensor] = {}
    for dtype in (torch.bfloat16, torch.float32):  # the kernels take no fp16
        try:
            buffer = symmetric_memory.empty(SYMMETRIC_NUMEL, dtype=dtype, device=world.device)
            symmetric_memory.rendezvous(buffer, name)
        except RuntimeError as error:
            raise Unavailable(f"symmetric memory: {str(error).splitlines()[0]}") from error
        buffers[dtype] = buffer

    def accepts(tensor: torch.Tensor) -> bool:
        return tensor.dtype in buffers and tensor.numel() <= SYMMETRIC_NUMEL

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        shared = buffers[tensor.dtype][: tensor.numel()]
        shared.copy_(tensor)
        if tensor.numel() <= 8192:
            return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", name)
        return shared.clone()

    return Collective(all_reduce=all_reduce, accepts=accepts)
