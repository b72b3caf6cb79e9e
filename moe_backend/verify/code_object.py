"""AMD code objects: the kernels of an ELF file, their descriptors and metadata.

Formats: "User Guide for AMDGPU Backend", LLVM: Code Object V5 metadata (a MessagePack note) and the
kernel descriptor.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

_NT_AMDGPU_METADATA = 32
_PT_NOTE = 4


@dataclass(frozen=True)
class Argument:
    """One kernel argument: place in the argument block, and its kind (`global_buffer`, ...)."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class CodeObjectKernel:
    """What the metadata says of one kernel. Sizes in bytes, registers in 32-bit registers."""

    name: str
    vgpr: int
    agpr: int
    sgpr: int
    vgpr_spills: int
    sgpr_spills: int
    lds: int
    scratch: int
    kernarg_size: int
    arguments: tuple[Argument, ...]


def read(blob: bytes) -> dict[str, CodeObjectKernel]:
    """The kernels of a code object by name.

    Raises:
        ValueError: the bytes are not an ELF file with AMDGPU metadata.
    """
    if blob[:4] != b"\x7fELF":
        raise ValueError("not an ELF file")
    (offset,) = struct.unpack_from("<Q", blob, 32)
    entry_size, entries = struct.unpack_from("<HH", blob, 54)
    for n in range(entries):
        kind, _, at, _, _, size = struct.unpack_from("<IIQQQQ", blob, offset + n * entry_size)
        if kind == _PT_NOTE:
            metadata = _metadata(blob[at : at + size])
            if metadata is not None:
                kernels = (_kernel(k) for k in metadata["amdhsa.kernels"])
                return {k.name: k for k in kernels}
    raise ValueError("the ELF file has no AMDGPU metadata")


def code(blob: bytes) -> bytes:
    """The machine code: the contents of the section .text.

    Raises:
        ValueError: there is no such section.
    """
    (at,) = struct.unpack_from("<Q", blob, 40)
    size, count, names = struct.unpack_from("<HHH", blob, 58)
    sections = [struct.unpack_from("<IIQQQQ", blob, at + n * size) for n in range(count)]
    for name, _, _, _, offset, length in sections:
        start = sections[names][4] + name
        if blob[start : start + 6] == b".text\0":
            return blob[offset : offset + length]
    raise ValueError("the code object has no section .text")


def _metadata(notes: bytes) -> dict[str, Any] | None:
    at = 0
    while at + 12 <= len(notes):
        name, size, kind = struct.unpack_from("<III", notes, at)
        data = at + 12 + (name + 3 & ~3)
        if kind == _NT_AMDGPU_METADATA:
            value: dict[str, Any] = _unpack(notes[data : data + size], 0)[0]
            return value
        at = data + (size + 3 & ~3)
    return None


def _kernel(k: dict[str, Any]) -> CodeObjectKernel:
    return CodeObjectKernel(
        name=k[".symbol"].removesuffix(".kd"),
        vgpr=k[".vgpr_count"],
        agpr=k.get(".agpr_count", 0),
        sgpr=k[".sgpr_count"],
        vgpr_spills=k.get(".vgpr_spill_count", 0),
        sgpr_spills=k.get(".sgpr_spill_count", 0),
        lds=k[".group_segment_fixed_size"],
        scratch=k[".private_segment_fixed_size"],
        kernarg_size=k[".kernarg_segment_size"],
        arguments=tuple(
            Argument(a[".offset"], a[".size"], a[".value_kind"]) for a in k.get(".args", [])
        ),
    )


def _unpack(b: bytes, i: int) -> tuple[Any, int]:
    """One MessagePack value at `i`, and where the next begins (the types that metadata uses)."""
    tag = b[i]
    i += 1
    if tag <= 0x7F:
        return tag, i
    if tag >= 0xE0:
        return tag - 256, i
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], i
    numbers = {
        0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
        0xD3: ">q",
    }  # fmt: skip
    if tag in numbers:
        size = struct.calcsize(numbers[tag])
        return struct.unpack_from(numbers[tag], b, i)[0], i + size
    lengths = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
    if tag in lengths:
        (n,) = struct.unpack_from(lengths[tag], b, i)
        i += struct.calcsize(lengths[tag])
    elif tag < 0xC0:
        n = tag & (0x1F if tag >= 0xA0 else 0x0F)
    else:
        raise ValueError(f"MessagePack type {tag:#x} is not used in AMDGPU metadata")
    if 0xA0 <= tag <= 0xBF or 0xD9 <= tag <= 0xDB:
        return b[i : i + n].decode(), i + n
    if 0x90 <= tag <= 0x9F or tag in (0xDC, 0xDD):
        items = []
        for _ in range(n):
            item, i = _unpack(b, i)
            items.append(item)
        return items, i
    table = {}
    for _ in range(n):
        key, i = _unpack(b, i)
        table[key], i = _unpack(b, i)
    return table, i
