"""Open a checkpoint directory: headers at once, tensor data one tensor at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header that gives each tensor's
dtype, shape and byte range, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). The header is read here rather than through
the library because an error has to say what is wrong with which file: a download that stopped
half-way is the most common broken checkpoint, and the library calls it
"MetadataIncompleteBuffer".
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # the library's own limit

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class CheckpointError(ValueError):
    """A checkpoint is missing something, damaged, or not what was asked for."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it.

    Attributes:
        dtype: element type.
        shape: dimensions; `()` for a scalar.
        file: the safetensors file that holds it.
        offset: position of its first byte in the file.
        nbytes: number of bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose headers have been read and checked.

    Attributes:
        path: the directory.
        config: `config.json`.
        tensors: every tensor by name, in file order.
        files: the safetensors files.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read `config.json`, the index if there is one, and every file's header.

        Raises:
            CheckpointError: a file is missing, truncated or damaged, or a tensor that the index
                names is not in its file.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such directory.")
        config = read_json(folder / "config.json")
        weight_map = _read_index(folder / INDEX) if (folder / INDEX).exists() else {}
        files = tuple(folder / name for name in sorted(set(weight_map.values()))) or _files(folder)
        headers = {file.name: read_header(file) for file in files}
        for name, file_name in weight_map.items():
            if name not in headers[file_name]:
                raise CheckpointError(
                    f"{folder / file_name}: has no tensor {name}, which {INDEX} places there. "
                    "The index and the file are of different versions: download both again."
                )
        tensors: dict[str, TensorInfo] = {}
        for file_name, header in headers.items():
            for name, info in header.items():
                if weight_map.get(name, file_name) != file_name:
                    continue  # the index takes this tensor from another file
                if name in tensors:
                    raise CheckpointError(
                        f"{info.file}: tensor {name} is also in {tensors[name].file.name}; without "
                        f"an {INDEX} nothing says which is meant. Remove one of the files."
                    )
                tensors[name] = info
        return cls(folder, config, tensors, files)

    def load(self, name: str) -> torch.Tensor:
        """The tensor called `name`, on the CPU, in memory of its own.

        Raises:
            CheckpointError: no such tensor, or its file can no longer be read.
        """
        info = self._info(name)
        return self._read(name, info.dtype, info.shape, info.offset, info.nbytes)

    def load_part(self, name: str, index: int) -> torch.Tensor:
        """`load(name)[index]`, without reading the rest: one expert of a stacked tensor."""
        info = self._info(name)
        nbytes = info.nbytes // info.shape[0]
        return self._read(name, info.dtype, info.shape[1:], info.offset + index * nbytes, nbytes)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}.")
        return self.tensors[name]

    def _read(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int, nbytes: int
    ) -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        file = self.tensors[name].file
        data = bytearray(nbytes)
        try:
            with file.open("rb") as stream:
                stream.seek(offset)
                found = stream.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error}).") from error
        if found != nbytes:
            raise CheckpointError(
                f"{file}: ends within tensor {name}: {found} of {nbytes} bytes found. The file has "
                "changed since it was opened."
            )
        return torch.frombuffer(data, dtype=dtype).view(shape)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object.

    Raises:
        CheckpointError: the file is missing or is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: a {type(content).__name__} found, a JSON object expected.")
    return content


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file by name, in file order.

    Raises:
        CheckpointError: the file is missing, its header is damaged, or its size is not what the
            header adds up to.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if length < 2 or length > HEADER_LIMIT:
                raise CheckpointError(
                    f"{file}: {size} bytes, of which the first 8 give a header of {length} bytes: "
                    f"not a safetensors file (2 to {HEADER_LIMIT} accepted). Download it again; a "
                    "file of about 130 bytes is a Git LFS pointer (run `git lfs pull`)."
                )
            raw = stream.read(length)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise CheckpointError(f"{file}: cannot be read ({reason}). Download it again.") from error
    if len(raw) < length:
        raise _truncated(file, size, 8 + length, "its header")
    try:
        header = json.loads(raw)
        entries = [_entry(n, e) for n, e in header.items() if n != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: its header of {length} bytes is damaged ({error!r}). Download it again."
        ) from error
    return _check_header(file, size, 8 + length, entries)


_Entry = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, begin, end


def _entry(name: str, entry: dict[str, Any]) -> _Entry:
    begin, end = entry["data_offsets"]
    numbers = (*entry["shape"], begin, end)
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"{name}: {entry}")
    return name, str(entry["dtype"]), tuple(entry["shape"]), begin, end


def _check_header(
    file: Path, size: int, data_start: int, entries: list[_Entry]
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for name, dtype_name, shape, begin, end in sorted(entries, key=lambda e: (e[3], e[4])):
        if dtype_name not in DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name} has dtype {dtype_name!r}; known: {', '.join(DTYPES)}."
            )
        dtype = DTYPES[dtype_name]
        nbytes = prod(shape) * dtype.itemsize
        if begin != position or end - begin != nbytes:
            raise CheckpointError(
                f"{file}: its header is damaged: tensor {name}, {dtype_name} of shape {shape}, "
                f"takes {nbytes} bytes from {position} on, but bytes {begin} to {end} are given. "
                "Download it again."
            )
        tensors[name] = TensorInfo(dtype, shape, file, data_start + begin, nbytes)
        position = end
    if size < data_start + position:
        raise _truncated(file, size, data_start + position, "its tensors")
    if size > data_start + position:
        raise CheckpointError(
            f"{file}: {size} bytes found, but its tensors end at {data_start + position}. "
            "Download it again."
        )
    return tensors


def _truncated(file: Path, size: int, expected: int, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: truncated: {size} bytes found, {what} end at {expected}. The download or copy "
        "stopped early: fetch the file again."
    )


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name to file name."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: has no weight_map. Download it again.")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{file}: places tensor {name} in {file_name!r}; the name of a file beside the "
                "index is accepted."
            )
        if not (file.parent / file_name).is_file():
            raise CheckpointError(
                f"{file.parent / file_name}: no such file, but {INDEX} places tensor {name} and "
                f"{sum(f == file_name for f in weight_map.values()) - 1} others there. The "
                "download is incomplete: fetch the file."
            )
    return weight_map


def _files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a directory without an index."""
    if (folder / SINGLE).exists():
        return (folder / SINGLE,)
    # Engines load shards without an index too.
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise CheckpointError(
            f"{folder}: neither {SINGLE} nor {INDEX} nor another .safetensors file found. Weights "
            "in other formats have to be converted to safetensors first."
        )
    return files
