"""The paths: every implementation of the collectives that an engine here may use."""

from __future__ import annotations

from dataclasses import dataclass

VLLM_PATHS = "moe_backend.engines.vllm_comm_paths"


# Paths that compile their kernel on first use, and NCCL, which takes seconds for each rank or two
# where libraries come from a slow disk. Too short a limit would leave out what works.
COMPILES_S = 300.0
NCCL_S = 120.0


@dataclass(frozen=True)
class Path:
    """One implementation of the collectives.

    Attributes:
        opener: `module:function` that opens the path for a `World`, or empty: it cannot be
            opened outside its engine, and is only switched.
        instead: what serves when this path is off; where that is off or absent, its own stand-in.
        limit_s: seconds that opening and checking it may take in a child process.
    """

    name: str
    what: str
    opener: str
    instead: str
    limit_s: float = 30.0


PATHS = {
    path.name: path
    for path in (
        Path(
            "custom",
            "vLLM's custom all-reduce: peer-to-peer kernels, up to 8 MiB",
            f"{VLLM_PATHS}:open_custom",
            instead="symm_mem",
        ),
        Path(
            "aiter",
            "aiter's custom all-reduce, all-gather and fused all-reduce (ROCm)",
            f"{VLLM_PATHS}:open_aiter",
            instead="custom",
            limit_s=COMPILES_S,
        ),
        Path(
            "quick",
            "quick reduce: quantised, for large tensors (ROCm)",
            f"{VLLM_PATHS}:open_quick",
            instead="pynccl",
        ),
        Path(
            "symm_mem",
            "torch symmetric memory through vLLM: multicast or two-shot kernels",
            f"{VLLM_PATHS}:open_symm_mem",
            instead="pynccl",
        ),
        Path(
            "flashinfer",
            "FlashInfer's all-reduce, and its fusion with RMSNorm",
            f"{VLLM_PATHS}:open_flashinfer",
            instead="pynccl",
            limit_s=COMPILES_S,
        ),
        Path(
            "flashinfer_pcie",
            "FlashInfer's all-reduce for PCIe machines",
            "",
            instead="pynccl",
        ),
        Path(
            "nccl_symm",
            "NCCL over symmetric memory (VLLM_USE_NCCL_SYMM_MEM)",
            "",
            instead="pynccl",
        ),
        Path(
            "shm",
            "vLLM's shared-memory collectives for the CPU",
            f"{VLLM_PATHS}:open_shm",
            instead="torch",
        ),
        Path(
            "pynccl",
            "NCCL or RCCL called directly, outside torch",
            f"{VLLM_PATHS}:open_pynccl",
            instead="torch",
            limit_s=NCCL_S,
        ),
        Path(
            "torch_symm_mem",
            "torch symmetric memory without multicast; no engine uses it as it is",
            "moe_backend.comm.torch_paths:open_symmetric_memory",
            instead="torch",
        ),
        Path(
            "torch",
            "torch.distributed: NCCL, RCCL or gloo",
            "moe_backend.comm.torch_paths:open_torch",
            instead="",
            limit_s=NCCL_S,
        ),
    )
}
