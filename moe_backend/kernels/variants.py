"""The compiled variants that a call's launches need: found without launching, and compiled.

Which variant a Triton launch needs is Triton's to say: by constants, dtypes, and which integers and
pointers are 1 or multiples of 16. So the host code is run as it is, with launches that stop short
of the GPU (`JITFunction.run(warmup=True)`), and Triton's hook is asked what it would compile. Read
and run with Triton 3.6 and 3.9 (`runtime/jit.py`, `runtime/_async_compile.py`). A kernel in CUDA
C++ is one variant for each set of constants (`kernels.cuda.launch`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moe_backend.kernels.cuda import launch
from moe_backend.kernels.registry import LayerConfig

# Module or source, kernel, and Triton's key of arguments and options or the constants.
Variant = tuple[str, str, str]
MAX_THREADS = 16
MULTIPLE = 16  # what Triton specialises integers and pointers on


def candidates(layer: LayerConfig, max_tokens: int, choice: Callable[[int], Hashable]) -> list[int]:
    """Token counts that between them need every variant of calls with 1 to `max_tokens` tokens.

    Within a range of equal choices and equal powers of two above tokens and slots, what is left is
    divisibility by 16 of numbers that grow with the tokens: 16 counts in a row show each.

    Args:
        choice: what the host code chooses for so many tokens, tiles or blocks.
    """
    found = []
    last: tuple[Hashable, ...] | None = None
    remaining = 0
    for tokens in range(1, max_tokens + 1):
        powers = (tokens - 1).bit_length(), (tokens * layer.top_k - 1).bit_length()
        here = (choice(tokens), *powers)
        if here != last:
            last, remaining = here, MULTIPLE
        if remaining:
            found.append(tokens)
            remaining -= 1
    return found


def variants_missing(call: Callable[[], None]) -> set[Variant]:
    """The variants that `call` needs and this process has not; nothing is compiled or launched."""
    from triton import knobs

    missing: set[Variant] = set()
    thread = threading.get_ident()
    previous = knobs.runtime.jit_cache_hook

    def note(*, key: Any, fn: Any, **others: Any) -> bool:
        if threading.get_ident() != thread:  # the hook is the process's; that launch is a real one
            return previous is not None and bool(previous(key=key, fn=fn, **others))
        missing.add((fn.module, fn.name, str(key)))
        return True  # do not compile it

    def note_cuda(kernel: launch.Kernel) -> None:
        if not launch.is_loaded(kernel):
            missing.add((str(kernel.source), kernel.name, str(kernel[2:])))

    knobs.runtime.jit_cache_hook = note
    try:
        with _without_launches(note_cuda):
            call()
    finally:
        knobs.runtime.jit_cache_hook = previous
    return missing


def compile_variants(
    calls: Sequence[Callable[[], None]], deadline: float, threads: int | None = None
) -> int:
    """Compile what the calls need, many at a time, until `time.monotonic()` passes the deadline.

    An error of the compiler is left for the call that needs the variant. What is being compiled at
    the deadline is finished.

    Returns:
        how many variants were compiled, rather than found in Triton's cache.
    """
    import triton

    threads = threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with _count_compiled() as compiled, _Until(deadline, threads) as executor:
        seen: set[launch.Kernel] = set()

        def compile_cuda(kernel: launch.Kernel) -> None:
            if kernel not in seen and not launch.is_loaded(kernel):
                seen.add(kernel)
                executor.submit(_compile_cuda, kernel, compiled)

        asynchronous = getattr(triton, "AsyncCompileMode", None)
        if asynchronous is None:  # an older Triton: each in turn
            with _without_launches(compile_cuda):
                for call in calls:
                    if time.monotonic() < deadline:
                        call()
        else:
            with asynchronous(executor, ignore_errors=True), _without_launches(compile_cuda):
                for call in calls:
                    call()
    return len(compiled)


def _compile_cuda(kernel: launch.Kernel, compiled: list[str]) -> None:
    _, anew = launch.machine_code(kernel)
    if anew:
        compiled.append(kernel.name)


class _Until(ThreadPoolExecutor):
    """Threads that start nothing after a deadline."""

    def __init__(self, deadline: float, threads: int) -> None:
        super().__init__(threads)
        self.deadline = deadline

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._start, fn, *args, **kwargs)

    def _start(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Not `shutdown(cancel_futures=True)`: `as_completed` waits for ever for those it cancels.
        if time.monotonic() > self.deadline:
            raise TimeoutError
        return fn(*args, **kwargs)


@contextlib.contextmanager
def _without_launches(cuda: Callable[[launch.Kernel], None]) -> Iterator[None]:
    """Within, this thread's launches end before the launch; those in CUDA C++ tell `cuda`.

    Triton compiles what it has not, or asks its hook. Not for two threads at once: what the second
    takes for Triton's own would stay.
    """
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    thread = threading.get_ident()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        ours = threading.get_ident() == thread
        return run(self, *args, grid=grid, warmup=warmup or ours, **kwargs)

    JITFunction.run = compile_only
    try:
        with launch.instead_of_launching(cuda):
            yield
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def _count_compiled() -> Iterator[list[str]]:
    """Within, the kernels that Triton compiled, not those found in its cache."""
    from triton import knobs

    compiled: list[str] = []
    previous = knobs.compilation.listener

    def listen(**found: Any) -> None:
        if not found["cache_hit"]:
            compiled.append(str(found["metadata"]["name"]))
        if previous is not None:
            previous(**found)

    knobs.compilation.listener = listen
    try:
        yield compiled
    finally:
        knobs.compilation.listener = previous
