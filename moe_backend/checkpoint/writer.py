"""Write safetensors files piece by piece.

The library's `save_file` wants every tensor in memory. Here the headers are written first, from
dtypes and shapes alone, and each tensor's bytes go to their place whenever they are ready.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from moe_backend.checkpoint.reader import DTYPES, INDEX, SINGLE, CheckpointError, TensorInfo

COPY_BYTES = 16 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class CheckpointWriter:
    """The safetensors files of a new checkpoint. `finish` when everything is written."""

    def __init__(self, folder: Path, tensors: Iterable[OutputTensor], max_shard_bytes: int) -> None:
        """Write the headers and reserve the space.

        Args:
            folder: an existing directory.
            tensors: everything that will be written; the order decides which file.
            max_shard_bytes: a file ends before it would exceed this; a tensor is never split.
        """
        self.folder = folder
        self.places: dict[str, TensorInfo] = {}
        self.missing: dict[str, int] = {}  # bytes still to be written
        shards = _split(tensors, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start(folder / (SINGLE if len(shards) == 1 else name), shard)

    def _start(self, file: Path, shard: list[OutputTensor]) -> None:
        # Large elements first: then every tensor is aligned to its element size, which readers
        # that map the file rely on. The library sorts the same way.
        ordered = sorted(shard, key=lambda t: -t.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        position = 0
        for tensor in ordered:
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        offset = 8 + len(raw)
        with file.open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(offset + position)
        for tensor in ordered:
            if tensor.name in self.places:
                raise ValueError(f"{tensor.name}: planned twice")
            info = TensorInfo(tensor.dtype, tensor.shape, file, offset, tensor.nbytes)
            self.places[tensor.name] = info
            self.missing[tensor.name] = tensor.nbytes
            offset += tensor.nbytes

    def write(self, name: str, value: torch.Tensor, part: int | None = None) -> None:
        """Write a tensor, or with `part` its slice `[part]` along the first dimension."""
        place = self.places[name]
        shape = place.shape if part is None else place.shape[1:]
        if value.dtype != place.dtype or tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: {value.dtype} {tuple(value.shape)} given, {place.dtype} {shape} planned"
            )
        data = value.contiguous().flatten().view(torch.uint8).numpy()
        with place.file.open("r+b") as stream:
            stream.seek(place.offset + (part or 0) * data.nbytes)
            stream.write(data.data)
        self.missing[name] -= data.nbytes

    def copy(self, name: str, source: TensorInfo, report: Callable[[int], None]) -> None:
        """Copy a tensor's bytes from another file; `report` gets the size of each piece."""
        place = self.places[name]
        with source.file.open("rb") as stream, place.file.open("r+b") as out:
            stream.seek(source.offset)
            out.seek(place.offset)
            while self.missing[name]:
                data = stream.read(min(COPY_BYTES, self.missing[name]))
                if not data:
                    raise CheckpointError(f"{source.file}: ends within tensor {name}.")
                out.write(data)
                self.missing[name] -= len(data)
                report(len(data))

    def finish(self) -> None:
        """Check that every byte was written; with more than one file, add the index."""
        unwritten = [name for name, nbytes in self.missing.items() if nbytes]
        if unwritten:
            raise RuntimeError(f"{len(unwritten)} tensors were not written, first {unwritten[0]}")
        if len({place.file for place in self.places.values()}) > 1:
            index = {
                "metadata": {"total_size": sum(p.nbytes for p in self.places.values())},
                "weight_map": {name: p.file.name for name, p in sorted(self.places.items())},
            }
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")


def _split(tensors: Iterable[OutputTensor], max_bytes: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
