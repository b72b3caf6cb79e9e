"""The AMD ladder: compile for each target, inspect the machine code, execute it, compare.

Compiling needs Triton's wheel and nothing else. Executing needs the emulator, tools/gcnemu, which
is in the repository and not in the wheel, and a C compiler.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_backend.verify.amd_inspect import Inspection, inspect
from moe_backend.verify.metrics import difference

TARGETS = ("gfx942", "gfx950")
# bf16 operands with fp32 sums, as in verify.run.
REL_L2 = 8e-3


@dataclass(frozen=True)
class KernelCase:
    """One call of a kernel on CPU tensors, and what it should return.

    run: calls the kernel's host code, with the target's driver active, and returns the result.
    reference: the expected result.
    exact: compared bit for bit.
    """

    name: str
    run: Callable[[], torch.Tensor]
    reference: Callable[[], torch.Tensor]
    tolerance: float = REL_L2
    exact: bool = False


@dataclass(frozen=True)
class KernelUnderTest:
    """A kernel of one provider with its cases.

    language: whose launches the driver catches: `triton` or `flydsl`.
    """

    name: str
    cases: tuple[KernelCase, ...]
    language: str = "triton"


@dataclass(frozen=True)
class Comparison:
    """A result against its reference; `message` says what is wrong, in words."""

    rel_l2: float
    finite: bool
    ok: bool
    message: str = ""


@dataclass(frozen=True)
class Compiled:
    """One device kernel on one target. `problems` says why `ok` is false."""

    kernel: str
    arch: str
    case: str
    ok: bool
    problems: tuple[str, ...] = ()
    inspection: Inspection | None = None

    def as_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "kernel": self.kernel, "arch": self.arch, "case": self.case, "ok": self.ok,
            "problems": list(self.problems),
        }  # fmt: skip
        for key in (
            "vgpr", "agpr", "sgpr", "lds", "scratch", "spills", "sgpr_spills", "matrix_ops",
            "loads", "mix", "f16_fallback",
        ):  # fmt: skip
            out[key] = getattr(self.inspection, key, None)
        return out


@dataclass(frozen=True)
class Emulated:
    """One case executed on one target: its error, faults, notes and verdict."""

    kernel: str
    arch: str
    case: str
    rel_l2: float
    faults: tuple[str, ...]
    ok: bool
    notes: tuple[str, ...] = ()
    message: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel, "arch": self.arch, "case": self.case,
            "rel_l2": self.rel_l2 if math.isfinite(self.rel_l2) else None,
            "faults": list(self.faults), "ok": self.ok, "notes": list(self.notes),
            "message": self.message,
        }  # fmt: skip


@dataclass
class Climb:
    """What the ladder found."""

    compiled: list[Compiled] = field(default_factory=list)
    emulated: list[Emulated] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.compiled) and all(e.ok for e in self.emulated)

    def as_json(self) -> dict[str, Any]:
        return {
            "compiled": [c.as_json() for c in self.compiled],
            "emulated": [e.as_json() for e in self.emulated],
        }


def climb(
    kernels: Iterable[KernelUnderTest],
    *,
    compile_for: Iterable[str] = TARGETS,
    emulate_on: Iterable[str] = (),
    heard: Callable[[Compiled | Emulated], None] = lambda result: None,
) -> Climb:
    """Compile, inspect, and where asked execute and compare, every case of every kernel.

    Args:
        compile_for, emulate_on: targets, of `TARGETS`. Emulated ones are compiled as well.
        heard: called with each result when it is known.

    Raises:
        ValueError: an unknown target, or no emulator or C compiler where `emulate_on` is not empty.
    """
    wanted, emulated = list(dict.fromkeys(compile_for)), list(dict.fromkeys(emulate_on))
    for arch in (*wanted, *emulated):
        if arch not in TARGETS:
            raise ValueError(f"no AMD target {arch!r}; known are {', '.join(TARGETS)}")
    if emulated:
        emulator()
    out = Climb()
    for arch in dict.fromkeys((*wanted, *emulated)):
        for kernel in kernels:
            for compiled in _compile(kernel, arch):
                out.compiled.append(compiled)
                heard(compiled)
            if arch in emulated:
                for result in _emulate(kernel, arch):
                    out.emulated.append(result)
                    heard(result)
    return out


# --- rung 1 and 2: compile, inspect ---------------------------------------------------------------


def _compile(kernel: KernelUnderTest, arch: str) -> Iterator[Compiled]:
    """Every device kernel that the cases launch, once per machine code."""
    from moe_backend.verify.amd_triton import LDS_BYTES

    seen: set[bytes] = set()
    for case in kernel.cases:
        error = None
        with _driver(kernel.language, arch, execute=False) as driver:
            try:
                with torch.inference_mode():
                    case.run()
            except Exception as failure:  # whatever a compiler raises is the finding
                error = f"{type(failure).__name__}: {failure}"
        for launch in driver.launches:
            if launch.binary in seen:
                continue
            seen.add(launch.binary)
            seen_as = f"{kernel.name}/{launch.name}"
            found = inspect(
                launch.assembly,
                launch.binary,
                launch.name,
                dynamic_lds=launch.shared,
                types=launch.types,
            )
            problems = tuple(found.problems(LDS_BYTES[arch]))
            yield Compiled(seen_as, arch, case.name, not problems, problems, found)
        if error is not None:
            yield Compiled(kernel.name, arch, case.name, False, (error[:2000],))


# --- rung 3 and 4: execute, compare ---------------------------------------------------------------


def _emulate(kernel: KernelUnderTest, arch: str) -> Iterator[Emulated]:
    for case in kernel.cases:
        try:
            with _driver(kernel.language, arch, execute=True) as driver, _poisoned_memory():
                with torch.inference_mode():
                    result = case.run()
        except Exception as failure:  # of the compiler, the host code or the emulator
            yield Emulated(
                kernel.name,
                arch,
                case.name,
                math.nan,
                (f"{type(failure).__name__}: {failure}",),
                False,
            )
            continue
        seen = compare(result, case.reference(), 0.0 if case.exact else case.tolerance)
        found = [(launch.name, f) for launch in driver.launches for f in launch.found]
        faults = tuple(f"{name}: {f}" for name, f in found if f.severity == "fault")
        notes = tuple(f"{name}: {f}" for name, f in found if f.severity != "fault")
        yield Emulated(
            kernel.name,
            arch,
            case.name,
            seen.rel_l2,
            faults,
            seen.ok and not faults,
            notes,
            seen.message,
        )


def compare(result: torch.Tensor, reference: torch.Tensor, tolerance: float) -> Comparison:
    """Relative L2 of the difference; for a wrong result also a guess at the kind of mistake.

    Args:
        tolerance: largest relative L2; 0 compares bit for bit in the result's dtype.
    """
    if tolerance == 0:
        reference = reference.to(result.dtype)
    found = difference(result, reference)
    ok = found.finite and found.equal if tolerance == 0 else found.within(tolerance)
    if ok:
        return Comparison(found.rel_l2, found.finite, True)
    return Comparison(
        found.rel_l2, found.finite, False, _diagnosis(result, reference, found.finite)
    )


def _diagnosis(result: torch.Tensor, reference: torch.Tensor, finite: bool) -> str:
    if not finite:
        bad = int((~torch.isfinite(result)).sum())
        hint = " (as where nothing was written)" if bad == result.numel() else ""
        return f"{bad} of {result.numel()} results are not finite{hint}"
    got, expected = result.double().flatten(), reference.double().flatten()
    scale = float(got @ expected / (expected @ expected).clamp_min(1e-300))
    if scale > 0:
        power = round(math.log2(scale))
        if power and float((got / 2.0**power - expected).norm() / expected.norm()) < 0.05:
            ratio = f"1/{2**-power}" if power < 0 else f"{2**power}"
            message = f"every result is {ratio} of the reference: a scale is lost or counted twice"
            if power in (-1, -2, 1, 2):
                message += "; e4m3fn codes read as e4m3fnuz, or the reverse, give 2 per operand"
            return message
    rows = (
        (result.double() - reference.double()).flatten(1).norm(dim=1) if result.dim() > 1 else None
    )
    if rows is not None:
        size = reference.double().flatten(1).norm(dim=1).clamp_min(1e-30)
        wrong = (rows / size > 0.05).nonzero().flatten().tolist()
        if wrong and len(wrong) < len(rows):
            return f"{len(wrong)} of {len(rows)} rows are wrong, first {wrong[:8]}"
    return "the result is wrong throughout"


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so that unwritten results show."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            torch.use_deterministic_algorithms(before, warn_only=warn)


# --- drivers --------------------------------------------------------------------------------------


def emulator() -> Any:
    """The package gcnemu.

    Raises:
        ValueError: it is not there, or there is no C compiler; the message says what to do.
    """
    tools = Path(__file__).parents[2] / "tools"
    if (tools / "gcnemu").is_dir() and str(tools) not in sys.path:
        sys.path.append(str(tools))
    try:
        build = importlib.import_module("gcnemu.build")
    except ModuleNotFoundError:
        raise ValueError(
            "emulating needs tools/gcnemu, which is in the repository and not in the wheel: "
            "run this command from a clone, with the package installed by `pip install -e .`"
        ) from None
    try:
        build.compiler()
    except build.NoCompiler as missing:
        raise ValueError(str(missing)) from None
    return importlib.import_module("gcnemu")


def _driver(language: str, arch: str, *, execute: bool) -> contextlib.AbstractContextManager[Any]:
    """A context whose value has `launches`."""
    if language == "triton":
        if not execute:
            from moe_backend.verify.amd_triton import recording

            return recording(arch)
        emulator()
        program = importlib.import_module("gcnemu.program")
        module = importlib.import_module("gcnemu.triton_driver")
        return module.active(arch, schedules=program.ALL, strict=False)  # type: ignore[no-any-return]
    if language == "flydsl":
        emulator()
        program = importlib.import_module("gcnemu.program")
        module = importlib.import_module("gcnemu.flydsl_driver")
        return module.active(  # type: ignore[no-any-return]
            arch, execute=execute, schedules=program.ALL, strict=False
        )
    raise ValueError(f"no driver for {language!r}; there are triton and flydsl")
