"""The C structures of runtime/gcn.h, for ctypes."""

from __future__ import annotations

import ctypes as c

from gcnemu import build

u8, u32, u64 = c.c_uint8, c.c_uint32, c.c_uint64
LANES, VGPRS, SGPRS = 64, 512, 128
VCC, M0, EXEC = 106, 124, 126
NEXT, AT_BARRIER, ENDED, TRAPPED, LOST = 0, 1, 2, -1, -2
LATE, RACES, JOURNAL = 1, 2, 4


class Ins(c.Structure):
    _fields_ = [("fn", c.c_void_p), ("r", u32 * 8), ("x", u64 * 8)]


class Range(c.Structure):
    _fields_ = [("lo", u64), ("hi", u64), ("id", u32), ("read_only", u32)]


class Finding(c.Structure):
    _fields_ = [
        ("kind", u32), ("pc", u32), ("wave", u32), ("lane", u32), ("address", u64), ("size", u32),
        ("group", u32 * 3), ("count", u64),
    ]  # fmt: skip


class Write(c.Structure):
    _fields_ = [("address", u64), ("size", u32), ("old", u8 * 16)]


class Pending(c.Structure):
    _fields_ = [
        ("target", u8), ("form", u8), ("size", c.c_uint16), ("dst", u32), ("pc", u32),
        ("lanes", u64), ("lds_lo", u32), ("lds_hi", u32), ("lds", u32 * LANES),
        ("data", (u8 * 16) * LANES),
    ]  # fmt: skip


class Queue(c.Structure):
    _fields_ = [("head", u32), ("n", u32), ("p", Pending * 64)]


class Group(c.Structure):
    _fields_ = [
        ("lds", c.c_void_p), ("lds_size", u32), ("epoch", u32), ("shadow", c.c_void_p),
        ("ranges", c.POINTER(Range)), ("n_ranges", u32), ("last_range", u32),
        ("findings", c.POINTER(Finding)), ("n_findings", u32), ("max_findings", u32),
        ("writes", c.POINTER(Write)), ("n_writes", u64), ("max_writes", u64),
        ("options", u32), ("poison", u32), ("clock", u64), ("id", u32 * 3), ("ieee", u32),
        ("budget", u64), ("waves", c.c_void_p), ("n_waves", u32), ("n_dma", u32),
    ]  # fmt: skip


class Wave(c.Structure):
    _fields_ = [
        ("v", (u32 * LANES) * VGPRS), ("s", u32 * SGPRS), ("scc", u32), ("pc", u32), ("id", u32),
        ("lanes", u32), ("overflow", u32),
        ("scratch", c.c_void_p), ("scratch_size", u32), ("g", c.POINTER(Group)),
        ("vm", Queue), ("lgkm", Queue),
    ]  # fmt: skip


SHADOW_BYTES = 8


def check_sizes() -> None:
    """The structures here and in C must agree."""
    sizes = build.runtime().gcn_sizes
    for which, structure in enumerate((Wave, Group, Ins, Finding, Write)):
        if sizes(which) != c.sizeof(structure):
            raise AssertionError(
                f"{structure.__name__}: {c.sizeof(structure)} here, {sizes(which)} in C"
            )
