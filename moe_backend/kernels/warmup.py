"""Kernels compiled before they are needed: one call for every variant that an engine can ask for.

Triton compiles a kernel anew for other tile sizes, and for integers and pointers that are or are
not multiples of 16, so a token count that comes for the first time may cost seconds, in the middle
of serving or inside the capture of a CUDA graph. `warm_up` runs a layer once per variant, on its
own weights with routing over all experts, and throws the outputs away. Equal layers are warmed
once per process; across processes Triton keeps what it compiled (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_backend import envs, folders
from moe_backend.kernels.registry import Kernel, LayerConfig
from moe_backend.kernels.variants import Variant, compile_variants, variants_missing

SECONDS = 120.0  # unless MOE_BACKEND_WARMUP says otherwise
MAX_CALLS = 512  # bounds what the time does not: variants that are all in Triton's cache

_warmed: set[tuple[str, LayerConfig, torch.device, int]] = set()
_one_at_a_time = threading.Lock()  # it changes Triton for the whole process meanwhile


@dataclass(frozen=True)
class Report:
    """What a warm-up did.

    Attributes:
        called: token counts that were run.
        kernels: compiled kernels that this process had not and now has.
        compiled: those of them that were not in Triton's cache.
        seconds: that it took.
        left: token counts at which something is still to be compiled; a bound was hit.
        bound: the bound in seconds.
    """

    called: tuple[int, ...]
    kernels: int
    compiled: int
    seconds: float
    left: tuple[int, ...] = ()
    bound: float = SECONDS

    def __str__(self) -> str:
        if self.compiled in (0, self.kernels):
            source = "compiled" if self.compiled else "from cache"
        else:
            source = f"{self.compiled} compiled, {self.kernels - self.compiled} from cache"
        line = f"warmed {self.kernels} kernels in {self.seconds:.1f} s ({source})"
        if self.left:
            counts = ", ".join(map(str, self.left[:8])) + (", ..." if self.left[8:] else "")
            line += (
                f"; stopped at {self.bound:g} s or {MAX_CALLS} calls ({envs.WARMUP.name}): what "
                f"calls with {counts} tokens need is compiled at their first use, which cannot be "
                "captured in a CUDA graph"
            )
        return line


def warm_up(
    kernel: Kernel, layer: LayerConfig, tensors: list[torch.Tensor | None], max_tokens: int
) -> Report | None:
    """Compile and load what calls with 1 to `max_tokens` tokens need.

    Args:
        tensors: the layer's prepared weights; they say which device it is on.
        max_tokens: the most tokens of one call, of all ranks whose tokens reach these experts.
    Returns:
        None where there was nothing to do: the kernel needs none, an equal layer was warmed before,
        or MOE_BACKEND_WARMUP is 0.
    Raises:
        ValueError: MOE_BACKEND_WARMUP is not a number of seconds.
    """
    bound = allowed_seconds()
    with _one_at_a_time:
        return _warm_up(kernel, layer, tensors, max_tokens, bound)


def _warm_up(
    kernel: Kernel,
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    max_tokens: int,
    bound: float,
) -> Report | None:
    assert tensors[0] is not None
    device = tensors[0].device
    key = (kernel.name, layer, device, max_tokens)
    if bound == 0 or key in _warmed:
        return None
    _warmed.add(key)
    start = time.monotonic()
    counts = kernel.warmup_tokens(layer, max_tokens)
    if not counts:
        return None
    call = _calls(kernel, layer, tensors, device, max(counts))
    needed: list[int] = []
    variants: set[Variant] = set()
    for tokens in counts:
        new = variants_missing(lambda t=tokens: call(t)) - variants  # type: ignore[misc]
        if new:
            needed.append(tokens)
            variants |= new
    needed, beyond = needed[:MAX_CALLS], needed[MAX_CALLS:]
    deadline = start + bound
    compiled = compile_variants([lambda t=t: call(t) for t in needed], deadline)  # type: ignore[misc]
    called, left = [], []
    for tokens in needed:
        if time.monotonic() > deadline and variants_missing(lambda t=tokens: call(t)):  # type: ignore[misc]
            left.append(tokens)
            continue
        call(tokens)
        called.append(tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # an error belongs here, not to the first request
    return Report(
        called=tuple(called),
        kernels=len(variants),
        compiled=compiled,
        seconds=time.monotonic() - start,
        left=(*left, *beyond),
        bound=bound,
    )


def allowed_seconds() -> float:
    """The bound on each layer's warm-up, from MOE_BACKEND_WARMUP.

    Raises:
        ValueError: it is not a number of seconds.
    """
    given = envs.WARMUP.get()
    if given is None:
        return SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(
            f"{envs.WARMUP.name}={given!r}: a number of seconds is expected, such as 60; "
            "0 compiles at first use"
        )
    return seconds


def cache_folder() -> str:
    """Where Triton keeps compiled kernels from one start to the next, for `moe-backend doctor`."""
    if importlib.util.find_spec("triton") is None:
        return "none: Triton is not installed"
    if os.environ.get("TRITON_CACHE_DIR"):
        return os.environ["TRITON_CACHE_DIR"]
    home = os.environ.get("TRITON_HOME") or folders.home()
    if home is None:  # Triton takes `~` for a folder's name then
        return f"{Path('~', '.triton', 'cache').absolute()}, as there is no home folder"
    return str(Path(home) / ".triton" / "cache")


def _calls(
    kernel: Kernel,
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    device: torch.device,
    most: int,
) -> Callable[[int], None]:
    """A call of the layer with so many tokens, up to `most`, on inputs as an engine gives them."""
    x = torch.zeros(most, layer.hidden_size, dtype=layer.torch_dtype, device=device)
    slots = torch.arange(most * layer.top_k, dtype=torch.int32, device=device)
    ids = (slots % layer.num_experts).view(most, layer.top_k)
    weights = torch.ones(most, layer.top_k, dtype=torch.float32, device=device)
    expert_map = None
    if layer.expert_parallel:
        expert_map = torch.full((layer.num_experts,), -1, dtype=torch.int32, device=device)
        local = layer.num_local_experts
        expert_map[:local] = torch.arange(local, dtype=torch.int32, device=device)

    def call(tokens: int) -> None:
        kernel.apply(layer, tensors, x[:tokens], weights[:tokens], ids[:tokens], expert_map)

    return call
