"""vLLM's communicators, built and used only as far as their paths work on this machine.

`register` puts a subclass of the platform's own communicator in its place, for engines that run
`--moe-backend blockscale` and wherever MOE_BACKEND_ALL_REDUCE is set. The subclass adds nothing to
the running model: when a group is built it decides which paths vLLM may build, tries what was
built with known sums, and switches off what fails (`vllm_comm_start`). What remains is vLLM's code.

Private names used, checked on vLLM 0.30.0, 0.31.0, 0.32.0 and 0.33.0 (read; CPU run on 0.32.0):
`Platform.get_device_communicator_cls`, the constructors of `CudaCommunicator` and
`CpuCommunicator`, and `CpuCommunicator._all_group_ranks_share_shm_group_name`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist

from moe_backend.comm.checks import World
from moe_backend.engines.vllm import NAME
from moe_backend.envs import ALL_REDUCE

SUPPORTED_BASES = ("CudaCommunicator", "CpuCommunicator")

_base_of: dict[str, str] = {}  # the name of each class of ours: the qualified name of vLLM's
_classes: dict[str, type] = {}


def register() -> None:
    """Answer vLLM's question for its communicator class. Idempotent."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.get_device_communicator_cls
    if getattr(original, "is_moe_backend", False):
        return

    def get_device_communicator_cls(cls: Any) -> str:
        base: str = original()
        class_name = base.rpartition(".")[2]
        if class_name not in SUPPORTED_BASES or not wanted():
            return base
        _base_of[f"Checked{class_name}"] = base
        return f"{__name__}.Checked{class_name}"

    get_device_communicator_cls.is_moe_backend = True  # type: ignore[attr-defined]
    platform.get_device_communicator_cls = classmethod(get_device_communicator_cls)


def wanted() -> bool:
    """Whether the group that vLLM is about to build gets our communicator."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None and config.parallel_config.enable_elastic_ep:
        # vLLM stateless_coordinator.py asserts that the class is CudaCommunicator itself.
        return False
    if ALL_REDUCE.get() is not None:
        return True
    return config is not None and bool(config.kernel_config.moe_backend == NAME)


def __getattr__(name: str) -> type:
    """vLLM looks its communicator up by name; ours is made when first asked for."""
    if name not in _base_of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _classes:
        module, _, class_name = _base_of[name].rpartition(".")
        _classes[name] = communicator_class(getattr(importlib.import_module(module), class_name))
    return _classes[name]


def communicator_class(base: Any) -> type:
    """A subclass of vLLM's communicator that leaves out what does not work.

    It must be a subclass: graph capture asserts that (vLLM parallel_state.py, graph_capture).
    """

    class Checked(base):  # type: ignore[misc]
        def __init__(
            self,
            cpu_group: Any,
            device: Any = None,
            device_group: Any = None,
            unique_name: str = "",
            **more: Any,
        ) -> None:
            from moe_backend.engines.vllm_comm_start import Start

            self._without: tuple[str, ...] = ()

            def build(without: tuple[str, ...]) -> None:
                self._without = without
                super(Checked, self).__init__(
                    cpu_group=cpu_group,
                    device=device,
                    device_group=device_group,
                    unique_name=unique_name,
                    **more,
                )

            ranks = dist.get_world_size(cpu_group)
            if ranks == 1:
                build(())
                return
            world = World(dist.get_rank(cpu_group), ranks, torch.device(device or "cpu"), cpu_group)
            Start(world, unique_name, device_group).run(self, build)

        def _all_group_ranks_share_shm_group_name(self) -> bool:
            """Of CpuCommunicator: whether to build shared memory."""
            if "shm" in self._without:
                return False
            return bool(super()._all_group_ranks_share_shm_group_name())

    Checked.__name__ = Checked.__qualname__ = f"Checked{base.__name__}"
    return Checked
