"""Quantise the routed experts of a bf16 checkpoint; everything else is copied byte for byte.

One expert's projection is in memory at a time, so the size of the model does not matter. The new
checkpoint is written beside its destination and renamed when it is complete and has passed
`preflight`; a failure leaves nothing behind.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_backend.checkpoint.configs import write_configs
from moe_backend.checkpoint.dialects import Dialect, read_quantisation
from moe_backend.checkpoint.encode import decode, encode, snr_db
from moe_backend.checkpoint.layout import (
    DOWN,
    GATE,
    UP,
    ExpertModule,
    MoeLayer,
    find_moe_layers,
)
from moe_backend.checkpoint.preflight import check, check_experts, preflight
from moe_backend.checkpoint.reader import INDEX, Checkpoint, CheckpointError
from moe_backend.checkpoint.writer import CheckpointWriter, OutputTensor
from moe_backend.formats.nvfp4 import GROUP

TARGETS = {name: Dialect(name) for name in ("fp8-block", "nvfp4-modelopt", "nvfp4-ct")}
MAX_SHARD_BYTES = 5 * 10**9
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5"}


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    Attributes:
        target: dialect written.
        bytes_before, bytes_after: tensor data of the whole checkpoint.
        converted: weights quantised, counted per expert and projection.
        copied: other tensors.
        snr_db: mean over the converted weights; infinite if all are exact.
        seconds: wall time.
    """

    target: str
    bytes_before: int
    bytes_after: int
    converted: int
    copied: int
    snr_db: float
    seconds: float


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    sync_gate_up: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> ConversionReport:
    """Write the bf16 checkpoint in `src` to `dst` with its routed experts quantised.

    Stacked experts stay stacked in `fp8-block` and `nvfp4-modelopt`, as in the official Step-3.5
    checkpoints; `nvfp4-ct` names them one by one, as llm-compressor does (vLLM 0.32
    `models/step3p5.py` reads each dialect in that style).

    Args:
        src: directory with config.json and safetensors files; bf16, fp16 or fp32 experts.
        dst: directory that does not exist yet or is empty.
        to: `fp8-block`, `nvfp4-modelopt` or `nvfp4-ct`.
        sync_gate_up: NVFP4: one global scale for an expert's gate and up, from the larger amax. It
            is what modelopt and llm-compressor do, and engines that keep a single scale for both
            need it.
        max_shard_bytes: split the output into files of at most this size where it can be.
        progress: show a progress bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: `src` is damaged, quantised already, has no routed experts, or has a
            weight that the format cannot hold; or `dst` is in the way.
    """
    started = time.monotonic()
    if to not in TARGETS:
        raise CheckpointError(f"target {to!r} is unknown; accepted: {', '.join(TARGETS)}.")
    source = Checkpoint.open(src)
    target = TARGETS[to]
    layers = _expert_layers(source, target)
    conversion = _Conversion(source, layers, target, sync_gate_up)
    with _new_folder(Path(dst), source.path, conversion.output_bytes) as folder:
        _copy_files(source, folder)
        write_configs(source, layers, target, folder)
        writer = CheckpointWriter(folder, conversion.outputs, max_shard_bytes)
        with _progress_bar(progress, conversion.input_bytes) as report:
            conversion.run(writer, report)
        writer.finish()
        preflight(folder)
    finite = [snr for snr in conversion.snrs if math.isfinite(snr)]
    return ConversionReport(
        target=to,
        bytes_before=conversion.input_bytes,
        bytes_after=conversion.output_bytes,
        converted=len(conversion.snrs),
        copied=len(conversion.copies),
        snr_db=sum(finite) / len(finite) if finite else math.inf,
        seconds=time.monotonic() - started,
    )


def _expert_layers(source: Checkpoint, target: Dialect) -> tuple[MoeLayer, ...]:
    """The layers to convert, after everything that headers can tell has been checked."""
    quantisation = read_quantisation(source)
    if quantisation.source:
        raise CheckpointError(
            f"{source.path}: quantised already ({quantisation.source}: {quantisation.method}). "
            "Convert from the bf16 checkpoint it was made from: quantising twice adds both errors."
        )
    layers = find_moe_layers(source.tensors)
    if not layers:
        raise CheckpointError(
            f"{source.path}: no routed experts found. Accepted names: "
            "...moe.gate_proj.weight (stacked) and ...experts.0.gate_proj.weight or "
            "...experts.0.w1.weight."
        )
    check(source)
    for layer in layers:
        for module in layer.modules:
            info = source.tensors[module.tensors["weight"]]
            others = module.tensors.keys() - {"weight"}
            if others:
                raise CheckpointError(
                    f"{module.name}.{min(others)}: found beside the expert's weight; only experts "
                    "that are a plain weight can be converted."
                )
            rows = info.shape[-2]
            if target.name == "fp8-block" and module.projection != DOWN and rows % 128:
                # vLLM 0.32 `fp8_utils.py validate_fp8_block_shape_moe`
                raise CheckpointError(
                    f"{module.tensors['weight']}: intermediate size {rows} found; engines load FP8 "
                    "blocks of 128x128 only where it is a multiple of 128. Convert to NVFP4."
                )
            if target.name.startswith("nvfp4") and info.shape[-1] % GROUP:
                raise CheckpointError(
                    f"{module.tensors['weight']}: {info.shape[-1]} columns found, NVFP4 needs a "
                    f"multiple of {GROUP}. Convert to fp8-block."
                )
    return layers


class _Conversion:
    """The plan for one checkpoint, and its execution."""

    def __init__(
        self,
        source: Checkpoint,
        layers: tuple[MoeLayer, ...],
        target: Dialect,
        sync_gate_up: bool,
    ) -> None:
        self.source = source
        self.layers = layers
        self.target = target
        self.sync_gate_up = sync_gate_up
        self.num_experts = check_experts(source, layers)
        self.stays_stacked = target.name != "nvfp4-ct"
        self.snrs: list[float] = []
        self.copies: list[str] = []
        self.outputs: list[OutputTensor] = []
        owner = {m.tensors["weight"]: (layer, m) for layer in layers for m in layer.modules}
        for name, info in source.tensors.items():
            if name in owner:
                self.outputs += self._outputs(*owner[name])
            else:
                self.copies.append(name)
                self.outputs.append(OutputTensor(name, info.dtype, info.shape))
        self.input_bytes = sum(info.nbytes for info in source.tensors.values())
        self.output_bytes = sum(output.nbytes for output in self.outputs)

    def _outputs(self, layer: MoeLayer, module: ExpertModule) -> list[OutputTensor]:
        shape = self.source.tensors[module.tensors["weight"]].shape
        stack = shape[:1] if layer.stacked and self.stays_stacked else ()
        experts = range(self.num_experts if layer.stacked and not self.stays_stacked else 1)
        return [
            OutputTensor(self._output(layer, module, e, kind), spec.dtypes[0], stack + spec.shape)
            for e in experts
            for kind, spec in self.target.tensors(shape[-2], shape[-1]).items()
        ]

    def _output(self, layer: MoeLayer, module: ExpertModule, expert: int, kind: str) -> str:
        """Name of a tensor of `expert` in the new checkpoint."""
        if layer.stacked and not self.stays_stacked:
            projection = module.name.rpartition(".")[2]
            return f"{layer.block}.experts.{expert}.{projection}.{kind}"
        return f"{module.name}.{kind}"

    def run(self, writer: CheckpointWriter, report: Callable[[int], None]) -> None:
        """Write everything; `report` gets the number of source bytes done at each step."""
        for name in self.copies:
            writer.copy(name, self.source.tensors[name], report)
        together = self.sync_gate_up and self.target.name != "fp8-block"
        for layer in self.layers:
            modules = {(m.expert, m.projection): m for m in layer.modules}
            for expert in range(self.num_experts):
                key = None if layer.stacked else expert
                gate, up, down = (modules[key, p] for p in (GATE, UP, DOWN))
                pair = None
                if together:
                    pair = self._amax(gate, expert).maximum(self._amax(up, expert))
                for module, amax in ((gate, pair), (up, pair), (down, None)):
                    report(self._convert(writer, layer, module, expert, amax))

    def _convert(
        self,
        writer: CheckpointWriter,
        layer: MoeLayer,
        module: ExpertModule,
        expert: int,
        amax: torch.Tensor | None,
    ) -> int:
        """Quantise and write one weight; returns its size in the source."""
        weight, own_amax = self._load(module, expert)
        tensors = encode(self.target, weight, own_amax if amax is None else amax)
        self.snrs.append(snr_db(weight, decode(self.target, tensors)))
        for kind, value in tensors.items():
            part = expert if layer.stacked and self.stays_stacked else None
            writer.write(self._output(layer, module, expert, kind), value, part)
        return weight.nbytes

    def _amax(self, module: ExpertModule, expert: int) -> torch.Tensor:
        return self._load(module, expert)[1]

    def _load(self, module: ExpertModule, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[rows, columns]` of one expert as it is in the source, and its amax in float32."""
        name = module.tensors["weight"]
        if module.expert is None:
            weight = self.source.load_part(name, expert)
        else:
            weight = self.source.load(name)
        amax = weight.abs().amax().float()  # NaN and infinity get through to it
        if not torch.isfinite(amax):
            bad = int((~torch.isfinite(weight)).sum())
            raise CheckpointError(
                f"{name}: {bad} values of expert {expert} are NaN or infinite; finite ones are "
                "accepted. The source is damaged: download it again."
            )
        return weight, amax


def _copy_files(source: Checkpoint, folder: Path) -> None:
    """Tokenizer, generation config, model code: all but weights, config.json and hidden files."""

    for file in source.path.rglob("*"):
        name = file.relative_to(source.path)
        hidden = any(part.startswith(".") for part in name.parts)
        replaced = str(name) in ("config.json", INDEX) or file.suffix in _WEIGHT_FILES
        if file.is_file() and not hidden and not replaced:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)  # contents only: a source may be read-only


@contextmanager
def _new_folder(dst: Path, src: Path, nbytes: int) -> Iterator[Path]:
    """A new directory that becomes `dst` on success and disappears on failure."""
    dst, src = dst.resolve(), src.resolve()
    if dst == src or src in dst.parents:
        raise CheckpointError(f"{dst}: is inside the source {src}; give another directory.")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst}: exists and is not empty; give a new directory.")
    if not dst.parent.is_dir():
        raise CheckpointError(f"{dst.parent}: no such directory; create it first.")
    free = shutil.disk_usage(dst.parent).free
    if free < nbytes:
        raise CheckpointError(f"{dst.parent}: {free} bytes are free, {nbytes} are needed.")
    folder = dst.parent / f".{dst.name}.partial-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        folder.rename(dst)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _progress_bar(wanted: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of bytes done since it was last called."""
    # Not at the top: preflight runs inside engines, which need no progress bar.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    shown = wanted and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
