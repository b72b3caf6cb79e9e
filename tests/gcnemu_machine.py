"""One instruction on one wave, with the whole state compared before and after."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from gcnemu import asm, build, state
from gcnemu.translate import shape_of

LDS_BYTES = 4096
MEMORY_BYTES = 1 << 16
ALL_LANES = (1 << 64) - 1


class State:
    """Registers and memory as numpy arrays: v [512, 64], s [128], lds and memory in bytes."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.v = rng.integers(0, 1 << 32, (512, 64), dtype=np.uint32)
        self.s = rng.integers(0, 1 << 32, 128, dtype=np.uint32)
        self.scc = int(rng.integers(0, 2))
        self.pc = 0
        self.exec = int(rng.integers(1, 1 << 63)) * 2 + int(rng.integers(0, 2))
        self.lds = rng.integers(0, 256, LDS_BYTES, dtype=np.uint8)
        self.memory = MEMORY
        self.memory[:] = rng.integers(0, 256, MEMORY_BYTES, dtype=np.uint8)
        self.overflow = 0  # MODE.FP16_OVFL
        self.ended = 0  # what the instruction returned: go on, barrier, end, trap

    # --- scalar pairs ---
    def get64(self, r: int) -> int:
        return int(self.s[r]) | int(self.s[r + 1]) << 32

    def set64(self, r: int, value: int) -> None:
        self.s[r], self.s[r + 1] = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF

    @property
    def exec(self) -> int:
        return self.get64(126)

    @exec.setter
    def exec(self, value: int) -> None:
        self.set64(126, value)

    @property
    def vcc(self) -> int:
        return self.get64(106)

    @vcc.setter
    def vcc(self, value: int) -> None:
        self.set64(106, value)

    @property
    def active(self) -> np.ndarray:
        """The EXEC mask as booleans."""
        return np.array([self.exec >> lane & 1 for lane in range(64)], bool)

    def copy(self) -> State:
        other = object.__new__(State)
        other.__dict__.update(self.__dict__)
        other.v, other.s, other.lds = self.v.copy(), self.s.copy(), self.lds.copy()
        other.memory = self.memory.copy()
        return other


MEMORY = np.zeros(MEMORY_BYTES, np.uint8)
BASE = MEMORY.ctypes.data


@dataclass
class Case:
    """One text of one instruction.

    prepare: puts operands into a random state.
    expect: changes that state as the ISA says.
    nan: how results are compared where both are NaN: "" by bits; "f32", "f64", "f16" or "pk16" as
        floats (payloads are not modelled); ulp: allowed distance of float results in their last place.
    notes: kinds of finding that must be reported.
    """

    name: str
    text: str
    expect: Callable[[State], None]
    prepare: Callable[[State], None] = lambda state: None
    nan: str = ""
    ulp: int = 0
    seeds: int = 3
    labels: dict[str, int] = field(default_factory=dict)
    notes: tuple[int, ...] = ()
    archs: tuple[str, ...] = ("gfx942", "gfx950")


def body(case: Case, arch: str) -> str:
    return shape_of(_instruction(case), arch, case.labels)[1]


def _instruction(case: Case) -> asm.Instruction:
    return asm.parse_instruction(case.text, 1, "")


def check(case: Case, arch: str) -> None:
    """Run the case on every seed; raise AssertionError where the state is not as expected."""
    shape, c_body = shape_of(_instruction(case), arch, case.labels)
    program = (state.Ins * 2)()
    # The instruction, then s_endpgm, which waits for everything outstanding.
    end = shape_of(asm.parse_instruction("s_endpgm", 2, ""), arch, {})[1]
    program[0].fn, program[1].fn = build.functions([c_body, end])
    for n, value in enumerate(shape.registers):
        program[0].r[n] = value
    for n, value in enumerate(shape.constants):
        program[0].x[n] = value
    for seed in range(case.seeds):
        before = State(zlib.crc32(f"{case.text} {seed}".encode()))
        case.prepare(before)
        expected = before.copy()
        expected.pc = 1
        case.expect(expected)
        after, kinds = _run(before, program)
        _compare(case, seed, before, expected, after)
        assert set(kinds) == set(case.notes), f"{case.text}: findings {kinds}"


def run_sequence(state_: State, text: str, arch: str) -> None:
    """Run several instructions one after the other, changing the state."""
    for line in text.splitlines():
        case = Case(line.split()[0], line, lambda state: None)
        shape, c_body = shape_of(_instruction(case), arch, {})
        program = (state.Ins * 2)()
        end = shape_of(asm.parse_instruction("s_endpgm", 2, ""), arch, {})[1]
        program[0].fn, program[1].fn = build.functions([c_body, end])
        for n, value in enumerate(shape.registers):
            program[0].r[n] = value
        for n, value in enumerate(shape.constants):
            program[0].x[n] = value
        after, _ = _run(state_, program)
        state_.v, state_.s, state_.scc = after.v, after.s, after.scc


def _run(before: State, program: ctypes.Array) -> tuple[State, list[int]]:
    library = build.runtime()
    group, wave = state.Group(), state.Wave()
    lds = (ctypes.c_uint8 * LDS_BYTES).from_buffer_copy(before.lds.tobytes())
    shadow = ctypes.create_string_buffer((LDS_BYTES + 64) * state.SHADOW_BYTES)
    findings = (state.Finding * 16)()
    ranges = (state.Range * 1)(state.Range(BASE, BASE + MEMORY_BYTES, 0, 0))
    group.lds, group.lds_size, group.shadow = (
        ctypes.addressof(lds),
        LDS_BYTES,
        ctypes.addressof(shadow),
    )
    group.findings, group.max_findings = findings, 16
    group.ranges, group.n_ranges = ranges, 1
    group.options, group.epoch, group.ieee, group.poison = state.LATE, 1, 1, 0x7FC0DEAD
    group.budget = 1 << 20
    wave.g = ctypes.pointer(group)
    scratch = (ctypes.c_uint8 * (64 * 256)).from_buffer_copy(before.memory[: 64 * 256].tobytes())
    wave.scratch, wave.scratch_size = ctypes.addressof(scratch), 256
    ctypes.memmove(wave.v, before.v.ctypes.data, before.v.nbytes)
    ctypes.memmove(wave.s, before.s.ctypes.data, before.s.nbytes)
    wave.scc, wave.pc, wave.overflow = before.scc, 0, before.overflow
    result = library.gcn_single(ctypes.byref(wave), program, 1)
    after = before.copy()
    after.pc = wave.pc
    after.ended = result
    wave.pc = 1
    library.gcn_single(ctypes.byref(wave), program, 1)
    after.v = np.ctypeslib.as_array(wave.v).copy()
    after.s = np.ctypeslib.as_array(wave.s).copy()
    after.scc, after.overflow = wave.scc, wave.overflow
    after.lds = np.frombuffer(lds, np.uint8).copy()
    after.memory = MEMORY.copy()
    after.scratch = np.frombuffer(scratch, np.uint8).copy()
    return after, [findings[n].kind for n in range(group.n_findings)]


def _compare(case: Case, seed: int, before: State, expected: State, after: State) -> None:
    where = f"{case.text} (seed {seed}): "
    assert after.scc == expected.scc, f"{where}SCC is {after.scc}"
    assert after.pc == expected.pc, f"{where}the program counter is {after.pc}"
    assert after.overflow == expected.overflow, f"{where}FP16_OVFL is {after.overflow}"
    assert after.ended == expected.ended, f"{where}it returned {after.ended}"
    for r in np.flatnonzero(after.s != expected.s):
        raise AssertionError(f"{where}s{r} is {after.s[r]:#x}, not {expected.s[r]:#x}")
    same = after.v == expected.v
    if case.nan:
        same |= _same_floats(after.v, expected.v, case)
    for r, lane in np.argwhere(~same):
        raise AssertionError(
            f"{where}v{r} lane {lane} is {after.v[r, lane]:#x}, not {expected.v[r, lane]:#x}; "
            f"before v2..v7 {[hex(x) for x in before.v[2:8, lane]]}, exec {before.exec >> int(lane) & 1}"
        )
    for name in ("lds", "memory"):
        a, e = getattr(after, name), getattr(expected, name)
        for at in np.flatnonzero(a != e):
            raise AssertionError(f"{where}{name}[{at}] is {a[at]}, not {e[at]}")
    if hasattr(expected, "scratch"):
        assert np.array_equal(after.scratch, expected.scratch), f"{where}scratch differs"


def _same_floats(a: np.ndarray, b: np.ndarray, case: Case) -> np.ndarray:
    if case.nan == "f32":
        return _close(a.view(np.float32), b.view(np.float32), a, b, case.ulp)
    if case.nan == "f64":
        wide_a, wide_b = (
            x[10].astype(np.uint64) | x[11].astype(np.uint64) << np.uint64(32) for x in (a, b)
        )
        close = _close(wide_a.view(np.float64), wide_b.view(np.float64), wide_a, wide_b, case.ulp)
        out = np.zeros(a.shape, bool)
        out[10] = out[11] = close
        return out
    low_a, low_b = ((x & np.uint32(0xFFFF)).astype(np.uint16) for x in (a, b))
    high_a, high_b = ((x >> np.uint32(16)).astype(np.uint16) for x in (a, b))
    low = _close(low_a.view(np.float16), low_b.view(np.float16), low_a, low_b, case.ulp)
    high = high_a == high_b
    if case.nan == "pk16":
        high = _close(high_a.view(np.float16), high_b.view(np.float16), high_a, high_b, case.ulp)
    return low & high


def _close(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, ulp: int) -> np.ndarray:
    equal = (a == b) | (np.isnan(x) & np.isnan(y))
    if ulp:
        distance = np.abs(a.astype(np.int64) - b.astype(np.int64))
        equal |= (
            (distance <= ulp) & np.isfinite(x) & np.isfinite(y) & (np.signbit(x) == np.signbit(y))
        )
    return equal
