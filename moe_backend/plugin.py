"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in each of its processes.

A general plugin that raises stops vLLM (vLLM `plugins/__init__.py` calls it unguarded), so
`register` never does; when it cannot register, `--moe-backend blockscale` does not exist and
`moe-backend doctor` says why.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.moe_backend")  # under vLLM's logger, so that its settings apply

failure: str | None = None  # why the last `register` did not register


def register() -> None:
    """Add `blockscale` to vLLM's MoE backends. Idempotent; takes milliseconds; never raises."""
    global failure
    try:
        from moe_backend.engines import vllm

        vllm.register()
        failure = None
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        logger.exception("--moe-backend blockscale is not available in this process")
