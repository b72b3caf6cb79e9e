"""Device code of the sanitizer's controls; Triton wants it in a file."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, out, count, BLOCK: tl.constexpr):
    """Copies `count` elements, whether or not there are so many."""
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(source + index, mask=index < count), mask=index < count)
