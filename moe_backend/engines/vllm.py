"""How `--moe-backend blockscale` gets into vLLM.

Two things happen at `register`: the name is added to the choices, and a hook is set on the module
that owns the expert weights. When a layer asks for our name, its stock quantisation method (FP8
block, NVFP4 of modelopt or compressed-tensors, unquantised) is built as ever, except that vLLM's
kernel selection is answered with our experts class for that one call. Weight loading, tensor and
expert parallelism, EPLB and reload stay vLLM's own. Layers that ask for another backend take the
original path untouched.

Private names used, checked on vLLM 0.30.0, 0.31.0, 0.32.0 and 0.33.0 (read and run):
`config.kernel.KernelConfig.__dataclass_fields__`, `config.speculative.SpeculativeConfig`,
`engine.arg_utils._compute_kwargs`, `fused_moe.routed_experts.RoutedExperts._get_quant_method`,
`fused_moe.oracle.{fp8,nvfp4,unquantized}.map_*_backend` and `.backend_to_kernel_cls`.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

NAME = "blockscale"
SUPPORTED = ("0.30", "0.31", "0.32", "0.33")
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
ROUTED_EXPERTS = f"{FUSED_MOE}.routed_experts"


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one that this package was checked on."""


def register() -> None:
    """Make the name selectable and hook the experts; called in every vLLM process.

    Raises:
        UnsupportedVllmError: the version is unknown.
    """
    check_version(installed_version())
    _extend_choices()
    after_import(ROUTED_EXPERTS, _hook_routed_experts)
    from moe_backend.engines import vllm_comm, vllm_cpu

    vllm_cpu.register()
    vllm_comm.register()


def installed_version() -> str:
    """Version of the importable vLLM, such as `0.32.0+cpu`."""
    import vllm

    return str(vllm.__version__)


def load_kernels() -> None:
    """Let vLLM load its compiled ops, so that the kernels which call them can be offered."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()


def check_version(version: str) -> None:
    """Refuse a vLLM whose private names were never checked."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise UnsupportedVllmError(
            f"vLLM {version} is not supported by moe_backend; supported: "
            f"{', '.join(f'{v}.x' for v in SUPPORTED)}. "
            "Install one of these, or a newer moe-backend."
        )


# --- The name -------------------------------------------------------------------------------------


def _extend_choices() -> None:
    """Add NAME where vLLM lists the backends: two config fields and what was derived from them."""
    import vllm.config.kernel as kernel
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import KernelConfig, VllmConfig
    from vllm.config.speculative import SpeculativeConfig

    if not _extend_literal(KernelConfig, "moe_backend"):
        return
    kernel.MoEBackend = KernelConfig.__dataclass_fields__["moe_backend"].type
    _extend_literal(SpeculativeConfig, "moe_backend")
    rebuild_dataclass(VllmConfig, force=True)  # its schema has both inlined
    # argparse choices are computed from the field types once and cached.
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    cache_clear = getattr(getattr(arg_utils, "_compute_kwargs", None), "cache_clear", None)
    if cache_clear is not None:
        cache_clear()


def _extend_literal(config: Any, field_name: str) -> bool:
    """Add NAME to the Literal of a pydantic dataclass field; False if it is there already."""
    from pydantic.dataclasses import rebuild_dataclass

    field = config.__dataclass_fields__[field_name]
    if NAME in _literal_values(field.type):
        return False
    field.type = _with_name(field.type)
    config.__annotations__[field_name] = field.type
    rebuild_dataclass(config, force=True)
    return True


def _literal_values(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(v for part in get_args(annotation) for v in _literal_values(part))


def _with_name(annotation: Any) -> Any:
    """`Literal[...]` with NAME added, also inside `Literal[...] | None`."""
    if get_origin(annotation) is Literal:
        return Literal[(*get_args(annotation), NAME)]  # type: ignore[valid-type]
    union = None
    for part in get_args(annotation):
        widened = _with_name(part) if get_args(part) else part
        union = widened if union is None else union | widened
    return union


# --- The experts ----------------------------------------------------------------------------------


def _hook_routed_experts(module: ModuleType) -> None:
    """Let layers with our name build their quantisation method around our experts."""
    routed_experts = module.RoutedExperts
    original = routed_experts._get_quant_method
    if getattr(original, "is_moe_backend", False):
        return
    _use_official_registry()

    def _get_quant_method(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        if moe_config.moe_backend != NAME:
            return original(self, prefix, quant_config, moe_config)
        from moe_backend.engines import vllm_experts, vllm_loading, vllm_methods

        vllm_experts.refuse_unsupported(prefix, quant_config, moe_config)
        vllm_loading.preflight_model()
        with _oracles_answer_ours():
            try:
                method = original(self, prefix, quant_config, moe_config)
            except (ValueError, NotImplementedError, KeyError) as error:
                raise vllm_experts.unsupported(
                    prefix, quant_config, str(error), of_format=True
                ) from error
        return vllm_methods.adopt(method, prefix, quant_config)

    _get_quant_method.is_moe_backend = True  # type: ignore[attr-defined]
    routed_experts._get_quant_method = _get_quant_method


def _use_official_registry() -> bool:
    """Announce the FP8 experts to vLLM's own registry where it has one (vllm#53897, unmerged).

    The registry covers FP8 alone; the substitution below stays for the other formats and is
    harmless for this one.
    """
    name = f"{FUSED_MOE}.oracle.fp8_registry"
    if importlib.util.find_spec(name) is None:
        return False
    registry = importlib.import_module(name)
    registry.register_fp8_moe_backend(
        NAME, "moe_backend.engines.vllm_experts.Fp8BlockExperts", auto_select=False
    )
    return True


@contextlib.contextmanager
def _oracles_answer_ours() -> Iterator[None]:
    """While active, vLLM's kernel selection answers NAME with our experts classes.

    Each oracle maps NAME to a member of its enum whose weight conversion is the identity, and that
    member to our class. vLLM therefore logs the member's name (TRITON, EMULATION); our own line
    follows when the weights are loaded.
    """
    import vllm.model_executor.layers.fused_moe.oracle.fp8 as fp8
    import vllm.model_executor.layers.fused_moe.oracle.nvfp4 as nvfp4
    import vllm.model_executor.layers.fused_moe.oracle.unquantized as unquantized

    from moe_backend.engines import vllm_experts as ours

    with contextlib.ExitStack() as stack:
        for oracle, mapper, member, experts in (
            (fp8, "map_fp8_backend", fp8.Fp8MoeBackend.TRITON, ours.Fp8BlockExperts),
            (nvfp4, "map_nvfp4_backend", nvfp4.NvFp4MoeBackend.EMULATION, ours.Nvfp4Experts),
            (
                unquantized,
                "map_unquantized_backend",
                unquantized.UnquantizedMoeBackend.TRITON,
                ours.Bf16Experts,
            ),
        ):
            stack.enter_context(_answer(oracle, mapper, member, experts))
        yield


@contextlib.contextmanager
def _answer(oracle: ModuleType, mapper: str, member: Any, experts: type) -> Iterator[None]:
    map_backend = getattr(oracle, mapper)
    kernel_classes = oracle.backend_to_kernel_cls

    def map_ours(backend: str) -> Any:
        return member if backend == NAME else map_backend(backend)

    def ours_only(backend: Any) -> list[type]:
        return [experts] if backend == member else list(kernel_classes(backend))

    setattr(oracle, mapper, map_ours)
    oracle.backend_to_kernel_cls = ours_only  # type: ignore[attr-defined]
    try:
        yield
    finally:
        setattr(oracle, mapper, map_backend)
        oracle.backend_to_kernel_cls = kernel_classes  # type: ignore[attr-defined]


# --- Import hook ----------------------------------------------------------------------------------


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Run `action(module)` now if module `name` is imported, else right after its first import.

    Importing the fused-MoE modules at registration would cost a second in every vLLM process, the
    command line's included. The action must be idempotent.
    """
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(f, _AfterImport) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loader of one module so that an action follows it."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action
        self.busy = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_then_act  # type: ignore[method-assign]
        return spec
