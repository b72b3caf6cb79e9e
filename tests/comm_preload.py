"""What the server of `comm_fork` imports."""

import contextlib

import comm_faults  # noqa: F401

with contextlib.suppress(ImportError):
    import vllm.config
    import vllm.distributed.device_communicators.cpu_communicator
    import vllm.distributed.device_communicators.cuda_communicator
    import vllm.distributed.parallel_state  # noqa: F401

    import moe_backend.engines.vllm_comm_start
    import moe_backend.engines.vllm_cpu  # noqa: F401
