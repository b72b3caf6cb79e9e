"""vLLM's shared-memory communicator, which not every CPU has."""

from __future__ import annotations

import pytest
import torch

# For x86 CPUs without AVX-512 vLLM 0.32 loads another build of its CPU code, without
# `init_shm_manager`, and its communicator takes torch.distributed (vllm/platforms/cpu.py,
# vllm/distributed/device_communicators/cpu_communicator.py).
needs_shm = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="vLLM has no shared-memory communicator on x86 CPUs without AVX-512",
)
