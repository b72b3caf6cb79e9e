"""gcc, and what it made before.

Instruction bodies are cached one by one, by their content: a kernel whose instruction shapes have
all been seen costs no compilation at all. `GCNEMU_CACHE` names the folder (default
`~/.cache/gcnemu`), `GCNEMU_CC` the compiler (default gcc).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
FLAGS = [
    "-O2", "-march=native", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-w", "-shared",
    "-fPIC",
]  # fmt: skip


class NoCompiler(RuntimeError):
    """There is no C compiler."""


def compiler() -> str:
    """Path of the C compiler.

    Raises:
        NoCompiler: none was found.
    """
    wanted = os.environ.get("GCNEMU_CC", "gcc")
    found = shutil.which(wanted)
    if found is None:
        raise NoCompiler(
            f"the emulator compiles instructions with {wanted}, which is not installed; "
            "install gcc or name a C compiler in GCNEMU_CC"
        )
    return found


@cache
def cache_folder() -> Path:
    """Made by this compiler, for this processor, with this run time."""
    parts = [platform.machine(), " ".join(FLAGS)]
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        parts += [line for line in cpu.read_text().splitlines() if line.startswith("flags")][:1]
    parts.append(subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout)
    parts += [(RUNTIME / name).read_text() for name in ("gcn.h", "run.c")]
    root = os.environ.get("GCNEMU_CACHE") or os.path.expanduser("~/.cache/gcnemu")
    folder = Path(root) / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compile(source: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        c, so = Path(work) / "x.c", Path(work) / "x.so"
        c.write_text(source)
        done = subprocess.run(
            [compiler(), *FLAGS, f"-I{RUNTIME}", "-o", str(so), str(c), "-lm"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{compiler()} failed:\n{done.stderr[:2000]}")
        os.replace(so, target)  # atomic: another process may be at the same work


@cache
def runtime() -> ctypes.CDLL:
    """The run time of runtime/run.c, with its symbols visible to instruction bodies."""
    target = cache_folder() / "run.so"
    if not target.exists():
        _compile((RUNTIME / "run.c").read_text(), target)
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    library.gcn_prepare()
    library.gcn_sizes.restype = ctypes.c_uint64
    return library


_functions: dict[str, int] = {}  # content hash of a body -> address of its function
_loaded: set[str] = set()


def functions(bodies: list[str]) -> list[int]:
    """Addresses of the C functions with these bodies; missing ones are compiled, together."""
    runtime()
    names = ["f" + hashlib.sha256(body.encode()).hexdigest()[:24] for body in bodies]
    missing = {n: b for n, b in zip(names, bodies, strict=True) if n not in _functions}
    if missing:
        _load_known(missing)
        missing = {n: b for n, b in missing.items() if n not in _functions}
    if missing:
        source = '#include "gcn.h"\n' + "\n".join(
            f"int {name}(Wave *w, const Ins *i) {{ const u64 ex = EXEC; (void)ex; {body} }}"
            for name, body in sorted(missing.items())
        )
        stem = hashlib.sha256(source.encode()).hexdigest()[:16]
        target = cache_folder() / f"{stem}.so"
        if not target.exists():
            _compile(source, target)
        listing = cache_folder() / f"{stem}.txt"
        scratch = listing.with_suffix(f".{os.getpid()}")
        scratch.write_text("\n".join(sorted(missing)))
        os.replace(scratch, listing)
        _load(stem, missing)
    return [_functions[name] for name in names]


def _load_known(wanted: dict[str, str]) -> None:
    for listing in sorted(cache_folder().glob("*.txt")):
        if listing.stem not in _loaded:
            here = set(listing.read_text().split())
            if here & set(wanted):
                _load(listing.stem, here)


def _load(stem: str, names: object) -> None:
    library = ctypes.CDLL(str(cache_folder() / f"{stem}.so"))
    _loaded.add(stem)
    for name in names:  # type: ignore[attr-defined]
        _functions.setdefault(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0)
