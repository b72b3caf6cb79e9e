"""Settings that vLLM reads at import, and the one distributed environment of the test process."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads only wait for each other

TINY = Path(__file__).parents[1] / "examples" / "tiny_step" / "checkpoint"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that serve models, and then other slow ones, take minutes: dealt out first, so that at
    # the end no worker waits for another (the Makefile keeps xdist from sorting files by their
    # number of tests).
    served, slow = (
        {item.path for item in items if mark in item.keywords} for mark in ("e2e", "slow")
    )
    items.sort(key=lambda item: (item.path not in served, item.path not in slow))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU; none is visible to torch here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained bf16 model of examples/tiny_step."""
    return TINY


@pytest.fixture(scope="session")
def vllm_world(tmp_path_factory: pytest.TempPathFactory) -> None:
    """vLLM's distributed groups for one process, as its layers need them."""
    pytest.importorskip("vllm")
    from moe_backend import plugin

    plugin.register()
    assert plugin.failure is None
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm_layers import vllm_config

    with set_current_vllm_config(vllm_config()):
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{tmp_path_factory.mktemp('dist') / 'store'}",
            backend="gloo",
        )
        initialize_model_parallel(1, 1)


@pytest.fixture
def hopper(monkeypatch):
    """Hopper's preparation, and plain torch on codes that are put back in order."""
    from test_hopper_codes import codes_of, scales_of_rows

    from moe_backend.formats.nvfp4 import pack
    from moe_backend.kernels import registry
    from moe_backend.kernels.hopper.kernel import HopperKernel

    class OnTheCpu(HopperKernel):
        def refusal(self, layer):
            return None

        def warmup_tokens(self, layer, max_tokens):
            return []

        def apply(self, layer, tensors, *given):
            in_order = list(tensors)
            for n in (0, 3):
                in_order[n] = pack(codes_of(tensors[n]).flatten(-2).to(torch.uint8))
                in_order[n + 1] = scales_of_rows(tensors[n + 1], n == 0, in_order[n].shape[2] // 8)
            return registry.kernel_named("reference").apply(layer, in_order, *given)

    others = registry.kernels()[1:]
    monkeypatch.setattr(registry, "kernels", lambda: [OnTheCpu(), *others])
