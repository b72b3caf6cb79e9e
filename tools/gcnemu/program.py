"""One compiled kernel, ready to launch on host memory."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gcnemu import asm, build, checks, state
from gcnemu.asm import Unsupported
from gcnemu.checks import FAULT, KINDS, Found
from gcnemu.translate import translate

# Bit patterns of unwritten registers and LDS: a NaN, and an ordinary number far from zero. Results
# that differ between the two used something that nobody wrote.
POISON_NAN, POISON_NUMBER = 0x7FC0DEAD, 0x4B3D7A11
FORWARD, BACKWARD, INTERLEAVED = 0, 1, 2
KERNARG_SLACK = 256
# Wave instructions of one workgroup; a GEMM tile takes some 10^5. Beyond it the run is given up.
INSTRUCTION_BUDGET = 1 << 26


@dataclass(frozen=True)
class Region:
    """Memory that a launch may touch: `size` bytes from address `start`."""

    start: int
    size: int
    name: str = "tensor"
    read_only: bool = False


@dataclass(frozen=True)
class Schedule:
    """Order of waves (0 forward to the next barrier, 1 backward, from 2 interleaved) and poison."""

    order: int = FORWARD
    poison: int = POISON_NAN


ONE = (Schedule(),)
# Enough to tell a race and an uninitialised value from a wrong result.
ALL = (
    Schedule(),
    Schedule(BACKWARD),
    Schedule(INTERLEAVED),
    Schedule(INTERLEAVED + 1),
    Schedule(FORWARD, POISON_NUMBER),
)


class Program:
    """A kernel of an assembly file, translated and compiled.

    Raises:
        UnsupportedInstructions: the kernel uses something that is not modelled.
        NoCompiler: there is no C compiler.
    """

    def __init__(self, assembly: str, name: str | None = None):
        state.check_sizes()
        self.kernel = asm.parse(assembly, name)
        _check_modes(self.kernel.descriptor)
        self.code = translate(self.kernel)

    def __call__(
        self,
        kernarg: bytes,
        grid: Sequence[int],
        block: Sequence[int],
        *,
        dynamic_lds: int = 0,
        regions: Iterable[Region] = (),
        schedules: Sequence[Schedule] = ONE,
        late: bool = True,
    ) -> list[Found]:
        """Run the launch once per schedule; memory is left as the first schedule left it.

        Args:
            kernarg: the kernel's argument block.
            grid: workgroups in x, y, z.
            block: work-items per workgroup in x, y, z.
            dynamic_lds: bytes of LDS beyond the kernel's own.
            regions: memory that the kernel may touch; everything else is a fault.
            late: loaded data lands when s_waitcnt says so (otherwise at once).

        Returns:
            What the checks found, faults first.

        Raises:
            RuntimeError: the run was stopped: a trap, no end, waves that wait for each other. With
                several schedules, memory is as before.
        """
        runs: list[_Run] = []
        several = len(schedules) > 1
        for schedule in schedules:
            run = _Run(self, kernarg, grid, block, dynamic_lds, list(regions), schedule, late)
            runs.append(run)
            try:
                run.go(journal=several)
            except RuntimeError:
                run.undo()
                for each in runs:
                    each.close()
                raise
            if several:
                run.written = run.writes()
                run.undo()
        found = {(f.kind, f.line): f for run in runs for f in run.found()}
        if several:
            for run, schedule in zip(runs[1:], schedules[1:], strict=True):
                where = runs[0].differs(run)
                if where is None:
                    continue
                if schedule.poison != schedules[0].poison:
                    new = checks.uninitialised(where)
                else:
                    new = checks.order_dependent(where)
                found.setdefault((new.kind, 0), new)
            runs[0].redo()
        for run in runs:
            run.close()
        return sorted(found.values(), key=lambda f: (f.severity != FAULT, f.line))


def _check_modes(descriptor: dict[str, int]) -> None:
    """Float modes are those of compute kernels: denormals on, round to nearest even."""
    for key, expected in (
        ("float_denorm_mode_32", 3), ("float_denorm_mode_16_64", 3), ("float_round_mode_32", 0),
        ("float_round_mode_16_64", 0), ("dx10_clamp", 1),
    ):  # fmt: skip
        if descriptor.get(key, expected) != expected:
            raise Unsupported(f".amdhsa_{key} {descriptor[key]}: only {expected} is modelled")


class _Run:
    """One launch under one schedule."""

    def __init__(
        self,
        program: Program,
        kernarg: bytes,
        grid: Sequence[int],
        block: Sequence[int],
        dynamic_lds: int,
        regions: list[Region],
        schedule: Schedule,
        late: bool,
    ):
        self.program, self.schedule, self.late = program, schedule, late
        self.grid, self.block = _three(grid, "grid"), _three(block, "block")
        descriptor = program.kernel.descriptor
        size = max(len(kernarg), descriptor.get("kernarg_size", 0)) + KERNARG_SLACK
        self.kernarg = ctypes.create_string_buffer(bytes(kernarg), size)
        self.dispatch = ctypes.create_string_buffer(_dispatch_packet(self.grid, self.block), 128)
        own = [
            Region(ctypes.addressof(self.kernarg), size, "kernel arguments", True),
            Region(ctypes.addressof(self.dispatch), 128, "dispatch packet", True),
        ]
        self.tensors = regions
        self.regions = _merged([*own, *regions])
        self.lds_size = descriptor.get("group_segment_fixed_size", 0) + dynamic_lds
        self.written: np.ndarray | None = None

    def go(self, journal: bool) -> None:
        library, descriptor = build.runtime(), self.program.kernel.descriptor
        self.group = group = state.Group()
        lds = ctypes.create_string_buffer(self.lds_size + 64)
        shadow = ctypes.create_string_buffer((self.lds_size + 64) * state.SHADOW_BYTES)
        group.lds, group.lds_size = ctypes.addressof(lds), self.lds_size
        group.shadow = ctypes.addressof(shadow)
        ranges = (state.Range * len(self.regions))(
            *[
                state.Range(r.start, r.start + r.size, n, r.read_only)
                for n, r in enumerate(self.regions)
            ]
        )
        group.ranges, group.n_ranges = ranges, len(self.regions)
        group.max_findings = 256
        self.findings = (state.Finding * 256)()
        group.findings = self.findings
        group.options = (
            state.RACES | (state.LATE if self.late else 0) | (state.JOURNAL if journal else 0)
        )
        group.poison, group.budget = self.schedule.poison, INSTRUCTION_BUDGET
        group.ieee = descriptor.get("ieee_mode", 1)
        start = state.Wave()
        start.overflow = descriptor.get("fp16_overflow", 0)
        user = self._user_registers(start)
        ids = [descriptor.get(f"system_sgpr_workgroup_id_{d}", int(d == "x")) for d in "xyz"]
        threads = self.block[0] * self.block[1] * self.block[2]
        waves = (threads + state.LANES - 1) // state.LANES
        if not 1 <= threads <= 1024:
            raise ValueError(f"block {self.block}: 1 to 1024 work-items are possible")
        private = descriptor.get("private_segment_fixed_size", 0)
        scratch = ctypes.create_string_buffer(max(1, private * state.LANES * waves))
        three = ctypes.c_uint32 * 3
        result = library.gcn_launch(
            ctypes.byref(start), self.program.code, ctypes.byref(group), three(*self.grid),
            three(*self.block), user, ids[0] | ids[1] << 1 | ids[2] << 2, self.schedule.order,
            scratch, private,
        )  # fmt: skip
        if result < 0:
            why = {
                state.TRAPPED: "s_trap, or a lane exchange under a partial EXEC, not modelled",
                state.LOST: "no end: waves wait for each other, or the code runs on without end",
            }[result]
            raise RuntimeError(
                f"{self.program.kernel.name}: stopped in workgroup {tuple(group.id)}: {why}"
            )

    def _user_registers(self, start: state.Wave) -> int:
        """Fill the scalar registers that the descriptor asks for; returns how many there are."""
        get = self.program.kernel.descriptor.get
        values: list[int] = []

        def address(buffer: ctypes.Array[ctypes.c_char]) -> None:
            at = ctypes.addressof(buffer)
            values.extend((at & 0xFFFFFFFF, at >> 32))

        if get("user_sgpr_private_segment_buffer"):
            values += [0, 0, 0, 0]
        if get("user_sgpr_dispatch_ptr"):
            address(self.dispatch)
        if get("user_sgpr_queue_ptr"):
            values += [0, 0]  # reading through it is a fault
        if get("user_sgpr_kernarg_segment_ptr"):
            address(self.kernarg)
        if get("user_sgpr_dispatch_id"):
            values += [0, 0]
        if get("user_sgpr_flat_scratch_init"):
            values += [0, 0]
        if get("user_sgpr_private_segment_size"):
            values.append(get("private_segment_fixed_size", 0))
        preload = get("user_sgpr_kernarg_preload_length", 0)
        if preload:  # the first arguments come in registers
            offset = 4 * get("user_sgpr_kernarg_preload_offset", 0)
            values += struct.unpack_from(f"<{preload}I", self.kernarg.raw, offset)
        for n, value in enumerate(values):
            start.s[n] = value
        return max(len(values), get("user_sgpr_count", len(values)))

    # --- what it found and wrote ---

    def found(self) -> list[Found]:
        out = []
        for f in self.findings[: self.group.n_findings]:
            kind, severity, message = KINDS[f.kind]
            ins = self.program.kernel.instructions[f.pc]
            place = f"{message} (workgroup {tuple(f.group)}, wave {f.wave}, lane {f.lane}"
            if kind == "outside-tensor":
                place += f", address {f.address:#x}, {self._near(f.address)}"
            elif f.kind in (2, 3, 9):
                place += f", LDS bytes {f.address} to {f.address + f.size - 1} of {self.lds_size}"
            place += f"; {f.count} times)"
            out.append(
                Found(
                    kind, severity, place, ins.text, ins.line, ins.source, tuple(f.group),
                    f.wave, f.lane, f.address, f.size, f.count,
                )
            )  # fmt: skip
        return out

    def _near(self, address: int) -> str:
        """The nearest tensor below or above, as a distance in bytes, and a hint at a lost carry."""
        best, nearest = "no tensor near", 1 << 62
        for region in self.tensors:
            for distance, text in (
                (address - (region.start + region.size), "past the end of"),
                (region.start - address, "before the start of"),
            ):
                if 0 <= distance < nearest:
                    nearest = distance
                    best = f"{distance} bytes {text} {region.name} ({region.size} bytes)"
        for sign, text in ((1, "higher"), (-1, "lower")):
            for region in self.tensors:
                if 0 <= address + sign * (1 << 32) - region.start < region.size:
                    best += f"; 4 GiB {text} is inside {region.name}: a 32-bit offset?"
        return best

    def writes(self) -> np.ndarray:
        """Sorted `(address, byte)` of everything that was stored, as it is now."""
        log = self.group.writes[: self.group.n_writes] if self.group.n_writes else []
        if not log:
            return np.zeros((0, 2), np.uint64)
        raw = np.ctypeslib.as_array(
            ctypes.cast(self.group.writes, ctypes.POINTER(ctypes.c_uint8)),
            (self.group.n_writes, ctypes.sizeof(state.Write)),
        )
        start = raw[:, :8].copy().view(np.uint64)[:, 0]
        size = raw[:, 8:12].copy().view(np.uint32)[:, 0].astype(np.int64)
        where = np.repeat(start, size) + _counts(size).astype(np.uint64)
        where = np.unique(where)
        return np.stack([where, _bytes_at(where)], axis=1)

    def undo(self) -> None:
        build.runtime().gcn_roll_back(ctypes.byref(self.group))

    def redo(self) -> None:
        """Store again what was undone."""
        assert self.written is not None
        where, values = self.written[:, 0], self.written[:, 1].astype(np.uint8)
        for first, last in _runs(where):
            data = values[first:last].tobytes()
            ctypes.memmove(int(where[first]), data, len(data))

    def differs(self, other: _Run) -> str | None:
        """Where two runs' results differ, in words; None where they do not."""
        a, b = self.written, other.written
        assert a is not None
        assert b is not None
        if a.shape == b.shape and np.array_equal(a, b):
            return None
        if a.shape != b.shape or not np.array_equal(a[:, 0], b[:, 0]):
            other_set = np.setxor1d(a[:, 0], b[:, 0])
            return f"different places are written, {len(other_set)} bytes in all"
        bad = np.flatnonzero(a[:, 1] != b[:, 1])
        at = int(a[bad[0], 0])
        name = next((r for r in self.regions if r.start <= at < r.start + r.size), None)
        place = f"byte {at - name.start} of {name.name}" if name else f"address {at:#x}"
        return f"{len(bad)} of {len(a)} written bytes differ, first {place}"

    def close(self) -> None:
        build.runtime().gcn_free_journal(ctypes.byref(self.group))


def _three(values: Sequence[int], what: str) -> tuple[int, int, int]:
    out = tuple(int(v) for v in values) + (1,) * (3 - len(values))
    if len(out) != 3 or min(out) < 1:
        raise ValueError(f"{what} {tuple(values)}: one to three positive numbers expected")
    return out  # type: ignore[return-value]


def _dispatch_packet(grid: Sequence[int], block: Sequence[int]) -> bytes:
    """hsa_kernel_dispatch_packet_t: sizes of the workgroup and of the grid in work-items."""
    work_items = [g * b for g, b in zip(grid, block, strict=True)]
    return struct.pack("<HHHHHHIIIII", 0, 3, *block, 0, *work_items, 0, 0)


def _merged(regions: Iterable[Region]) -> list[Region]:
    """Sorted, without overlaps: of regions that overlap, the union."""
    out: list[Region] = []
    for r in sorted((r for r in regions if r.size), key=lambda r: (r.start, -r.size)):
        last = out[-1] if out else None
        if last and r.start < last.start + last.size:
            end = max(last.start + last.size, r.start + r.size)
            out[-1] = Region(
                last.start, end - last.start, last.name, last.read_only and r.read_only
            )
        else:
            out.append(r)
    return out


def _counts(sizes: np.ndarray) -> np.ndarray:
    """0..size-1 for every size, joined."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def _runs(where: np.ndarray) -> list[tuple[int, int]]:
    """Index ranges of consecutive addresses."""
    if not len(where):
        return []
    cuts = np.flatnonzero(np.diff(where) != 1) + 1
    edges = [0, *cuts.tolist(), len(where)]
    return list(itertools.pairwise(edges))


def _bytes_at(where: np.ndarray) -> np.ndarray:
    out = np.empty(len(where), np.uint64)
    for first, last in _runs(where):
        data = ctypes.string_at(int(where[first]), last - first)
        out[first:last] = np.frombuffer(data, np.uint8)
    return out
