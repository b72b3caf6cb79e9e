"""CUDA C++ to machine code with NVRTC, which PyTorch's CUDA wheels bring along; and what is kept.

A source is compiled once for each set of constants. The machine code is kept under
`$XDG_CACHE_HOME/moe-backend/cuda` (else `~/.cache/...`), named by a hash of all that it is made of.
Deleting the folder is always safe, and one that cannot be written, or a user without a home, only
means that the next start compiles again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from moe_backend import folders

ARCHITECTURE = "sm_90a"  # wgmma and setmaxnreg are in no other
Constants = Iterable[tuple[str, int]]  # macros and their values


def folder() -> Path | None:
    """Where machine code is kept from one start to the next, if anywhere."""
    root = folders.cache_root()
    return None if root is None else root / "cuda"


@cache
def missing() -> str | None:
    """What this installation lacks to compile and launch, None if nothing; asked once."""
    try:
        from cuda.bindings import driver, nvrtc

        error, *version = nvrtc.nvrtcVersion()
    except ImportError:
        return "cuda-bindings is not installed"
    except Exception as error:  # the bindings raise what their loader raises
        return f"NVRTC cannot be loaded ({error})"
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS or not hasattr(driver, "cuLibraryLoadData"):
        return "the bindings are not those of CUDA 12 or newer"
    known = _driver_version()
    if known is not None and known[0] < version[0]:
        # Machine code runs on drivers of its major version, and on newer ones (CUDA
        # Compatibility guide, "minor version compatibility").
        return f"the driver is for CUDA {known[0]}.{known[1]}, NVRTC is {version[0]}.{version[1]}"
    return None


def _driver_version() -> tuple[int, int] | None:
    """The CUDA that the driver is for; None where there is no driver, and so nothing to launch."""
    from cuda.bindings import driver

    try:
        error, number = driver.cuDriverGetVersion()
    except Exception:  # as the bindings' loader
        return None
    if error != driver.CUresult.CUDA_SUCCESS or not number:
        return None
    return number // 1000, number % 1000 // 10


def machine_code(source: Path, constants: Constants) -> tuple[bytes, bool]:
    """The machine code of a source, and whether it had to be compiled.

    Args:
        source: includes headers of its own folder (`*.cuh`) alone.
    Raises:
        RuntimeError: it does not compile; the compiler's words.
    """
    options = _options(constants)
    kept = _kept(source, options)
    if kept is None:
        return _compile(source, options)[0], True
    with contextlib.suppress(OSError):
        return kept.read_bytes(), False
    code, _ = _compile(source, options)
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as own:
            whole = Path(own) / kept.name
            whole.write_bytes(code)
            os.replace(whole, kept)
    return code, True


def forget(source: Path, constants: Constants) -> None:
    """Delete what `machine_code` has kept, where that could not be loaded."""
    kept = _kept(source, _options(constants))
    if kept is not None:
        with contextlib.suppress(OSError):
            kept.unlink()


def _options(constants: Constants) -> list[str]:
    defines = [f"-D{name}={value}" for name, value in sorted(constants)]
    return [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", *defines]


def _kept(source: Path, options: list[str]) -> Path | None:
    where = folder()
    if where is None:
        return None
    parts = [source.read_text(), *_headers(source.parent).values(), *options, str(_version())]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return where / f"{source.stem}-{key}.cubin"


@cache
def _headers(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.cuh"))}


@cache
def _version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def _compile(source: Path, options: list[str]) -> tuple[bytes, str]:
    """The machine code, and the compiler's words: none, unless an option asks for some."""
    from cuda.bindings import nvrtc

    headers = _headers(source.parent)
    error, program = nvrtc.nvrtcCreateProgram(
        source.read_text().encode(), source.name.encode(), len(headers),
        [text.encode() for text in headers.values()], [name.encode() for name in headers],
    )  # fmt: skip
    _check(error)
    try:
        encoded = [option.encode() for option in options]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = _room(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        words = log.rstrip(b"\0 ").decode(errors="replace")
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{source.name} {' '.join(options)} does not compile:\n{words}")
        error, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(error)
        code = _room(size)
        _check(*nvrtc.nvrtcGetCUBIN(program, code))
        return code, words
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _room(size: int) -> bytes:
    """Bytes that the bindings write into, though Python takes them to be constant: never the one
    object that stands for all equal strings of a single byte, or `b" "` is another one afterwards.
    """
    return bytes(max(size, 2))


def _check(error: object) -> None:
    from cuda.bindings import nvrtc

    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {error}")
