"""Which paths vLLM would use in a group, and how one is left out: before and after it is built.

Private names used, checked on vLLM 0.30.0, 0.31.0, 0.32.0 and 0.33.0 (read; the fallback run with
`CudaCommunicator` over gloo on all four): `parallel_state._ENABLE_CUSTOM_ALL_REDUCE`,
`rocm_aiter_ops.is_custom_all_reduce_enabled`, `pynccl_allocator._nccl_allocator_failed_to_compile`,
`flashinfer_all_reduce.fi_ar_available`, `.get_fi_ar_workspace` and `.get_fi_ar_quant_workspace`,
and what `CudaCommunicator` calls on its `pynccl_comm`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from moe_backend.comm.torch_paths import all_gather_single, reduce_scatter_single
from moe_backend.engines.vllm_comm_paths import COMMUNICATORS, PARTS, module_of


def candidates(group: str, device: torch.device) -> tuple[str, ...]:
    """The paths that vLLM may use in this group on this platform and with its settings."""
    if device.type == "cpu":
        return ("shm", "torch") if group.split(":")[0] in ("tp", "pp") else ("torch",)
    import vllm.envs as envs
    from vllm._aiter_ops import rocm_aiter_ops
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    custom = parallel_state._ENABLE_CUSTOM_ALL_REDUCE and is_tensor_parallel(group)
    aiter = bool(rocm_aiter_ops.is_custom_all_reduce_enabled())
    rocm = current_platform.is_rocm()
    present = {
        "custom": custom,
        "aiter": rocm and aiter and (custom or "dp" in group),
        "quick": rocm and custom and envs.VLLM_ROCM_QUICK_REDUCE_QUANTIZATION != "NONE",
        "symm_mem": not rocm and is_tensor_parallel(group) and envs.VLLM_ALLREDUCE_USE_SYMM_MEM,
        "flashinfer": not rocm and is_tensor_parallel(group) and _has_flashinfer(),
        "flashinfer_pcie": not rocm and envs.VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC,
        "nccl_symm": not rocm and envs.VLLM_USE_NCCL_SYMM_MEM,
        "pynccl": True,
        "torch": True,
    }
    return tuple(name for name, there in present.items() if there)


@contextlib.contextmanager
def left_out(without: tuple[str, ...], device_group: Any, device: Any) -> Iterator[None]:
    """While vLLM's constructor runs, have it build nothing for these paths."""
    with contextlib.ExitStack() as stack:
        for path in without:
            if path == "aiter":
                # Asked before the class is used, and vLLM's own kernel stands in if it says no.
                from vllm._aiter_ops import rocm_aiter_ops

                stack.enter_context(
                    _replaced(rocm_aiter_ops, "is_custom_all_reduce_enabled", lambda: False)
                )
            elif path == "pynccl":
                stack.enter_context(
                    _replaced(
                        module_of(PARTS[path]),
                        PARTS[path].class_name,
                        lambda **_: TorchInsteadOfPyNccl(device_group, torch.device(device)),
                    )
                )
            elif path in PARTS:
                stack.enter_context(
                    _replaced(module_of(PARTS[path]), PARTS[path].class_name, _nothing)
                )
            _switch_off_globally(path)
        yield


def switch_off(communicator: Any, path: str, device_group: Any) -> None:
    """Take a built path out of use. The object is kept: peers may still map its memory."""
    _switch_off_globally(path)
    if path == "shm":
        kept = communicator.dist_module
        communicator.dist_module = torch.distributed
        communicator.supports_tensor_dict = False
    else:
        attribute = PARTS[path].attribute
        kept = getattr(communicator, attribute)
        instead = None
        if path == "pynccl":
            instead = TorchInsteadOfPyNccl(device_group, communicator.device)
        setattr(communicator, attribute, instead)
        if path == "aiter":
            communicator.use_aiter_ag_rs = False
    communicator.__dict__.setdefault("_moe_backend_kept", []).append(kept)


def is_active(communicator: Any, path: str) -> bool:
    """Whether vLLM has built and enabled the path; True where only a running model could tell."""
    if path == "shm":
        return communicator.dist_module is not torch.distributed
    if path not in PARTS:
        return True
    part = getattr(communicator, PARTS[path].attribute)
    return part is not None and not part.disabled and type(part) is not TorchInsteadOfPyNccl


def stand_in_for_pynccl(communicator: Any, device_group: Any) -> bool:
    """Where vLLM built PyNccl and it disabled itself, have torch do what vLLM asserts it can do.

    It does so in silence: without a library, with VLLM_DISABLE_PYNCCL, and in vLLM 0.33 with NCCL
    before 2.29.7, which lacks `ncclCommSuspend` (vLLM pynccl_wrapper.py).
    """
    part = getattr(communicator, "pynccl_comm", None)
    if part is None or not part.disabled:
        return False
    switch_off(communicator, "pynccl", device_group)
    return True


def _switch_off_globally(path: str) -> None:
    """What a path has outside the communicator: compiler passes and allocators ask there."""
    if path in ("nccl_symm", "pynccl"):
        # The one switch that every user of NCCL's symmetric memory asks.
        allocator = importlib.import_module(f"{COMMUNICATORS}.pynccl_allocator")
        allocator._nccl_allocator_failed_to_compile = True  # type: ignore[attr-defined]
    elif path == "flashinfer":
        # Without a workspace the fusion with RMSNorm switches itself off (allreduce_rms_fusion.py).
        for name in (
            f"{COMMUNICATORS}.flashinfer_all_reduce",
            "vllm.compilation.passes.fusion.allreduce_rms_fusion",
            "vllm.model_executor.layers.fused_allreduce_gemma_rms_norm",
        ):
            module = sys.modules.get(name)
            for function in ("get_fi_ar_workspace", "get_fi_ar_quant_workspace"):
                if hasattr(module, function):
                    setattr(module, function, _nothing)


def _nothing(*args: Any, **more: Any) -> None:
    """In place of a communicator's constructor: vLLM takes None for "not there"."""
    return None


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(owner)[name]  # not getattr: a class method is to stay one
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def is_tensor_parallel(group: str) -> bool:
    """Whether this is the name of the group whose paths are tried: `tp:0` and the like."""
    return group.split(":")[0] == "tp"


def _has_flashinfer() -> bool:
    module = importlib.import_module(f"{COMMUNICATORS}.flashinfer_all_reduce")
    return bool(module.fi_ar_available)


# --- PyNccl's interface over torch.distributed ----------------------------------------------------


class TorchInsteadOfPyNccl:
    """What `CudaCommunicator` calls on its `pynccl_comm`, done by torch.distributed.

    With PyNccl merely absent, vLLM's all-reduce and all-gather fall back by themselves, but
    `reduce_scatter`, `reduce_scatterv` and `all_gatherv` fail an assertion and `broadcast` and
    `batch_isend_irecv` raise (vLLM cuda_communicator.py). With this in its place they all work,
    under CUDA graphs too.

    Ragged gathers travel padded and ragged scatters as an all-reduce: more bytes, and no operation
    that gloo or a graph lacks.
    """

    disabled = False
    available = False  # expert rebalancing then refuses its backend "pynccl" (eplb_communicator.py)
    nccl_version = 0  # no direct symmetric-memory output

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def all_reduce(
        self,
        in_tensor: torch.Tensor,
        out_tensor: torch.Tensor | None = None,
        op: Any = dist.ReduceOp.SUM,
        stream: Any = None,
    ) -> torch.Tensor:
        result = in_tensor.clone() if out_tensor is None else out_tensor.copy_(in_tensor)
        dist.all_reduce(result, op=op, group=self.group)
        return result

    def all_gather(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, stream: Any = None
    ) -> None:
        all_gather_single(output_tensor, input_tensor.contiguous(), group=self.group)

    def all_gatherv(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        sizes: list[int],
        stream: Any = None,
    ) -> None:
        padded = input_tensor.new_zeros(max(sizes), *input_tensor.shape[1:])
        padded[: input_tensor.shape[0]] = input_tensor
        parts = padded.new_empty(self.world_size * max(sizes), *padded.shape[1:])
        all_gather_single(parts, padded, group=self.group)
        start = 0
        for rank, size in enumerate(sizes):
            begin = rank * max(sizes)
            output_tensor[start : start + size] = parts[begin : begin + size]
            start += size

    def reduce_scatter(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        stream: Any = None,
    ) -> None:
        reduce_scatter_single(output_tensor, input_tensor, op=op, group=self.group)

    def reduce_scatterv(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        sizes: list[int],
        op: Any = dist.ReduceOp.SUM,
        stream: Any = None,
    ) -> None:
        start = sum(sizes[: self.rank])
        everything = self.all_reduce(input_tensor, op=op)
        output_tensor.copy_(everything[start : start + sizes[self.rank]])

    def reduce(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        root: int,
        op: Any = dist.ReduceOp.SUM,
        stream: Any = None,
    ) -> None:
        self.all_reduce(input_tensor, output_tensor, op)

    def scatter(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        sizes: list[int],
        root: int = 0,
        stream: Any = None,
    ) -> None:
        everything = self.broadcast(input_tensor.clone(), root)
        start = sum(sizes[: self.rank])
        output_tensor.copy_(everything[start : start + sizes[self.rank]])

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> torch.Tensor:
        dist.broadcast(tensor, dist.get_global_rank(self.group, src), group=self.group)
        return tensor

    def send(self, tensor: torch.Tensor, dst: int, stream: Any = None) -> None:
        dist.send(tensor, dist.get_global_rank(self.group, dst), group=self.group)

    def recv(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        dist.recv(tensor, dist.get_global_rank(self.group, src), group=self.group)

    def batch_isend_irecv(self, p2p_ops: list[Any], stream: Any = None) -> None:
        for work in dist.batch_isend_irecv(p2p_ops):
            work.wait()

    def group_start(self) -> None:
        """NCCL would merge the calls up to `group_end`; done one by one they mean the same."""

    def group_end(self) -> None:
        pass

    def suspend(self) -> None:
        """Sleep mode frees NCCL's memory here; torch keeps its own."""

    def resume(self) -> None:
        pass

    def destroy(self) -> None:
        """vLLM destroys the process group itself."""
