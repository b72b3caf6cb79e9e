"""Checkpoints on disk: read, check before loading, quantise."""

from __future__ import annotations

from moe_backend.checkpoint.command import add_convert_arguments, run_convert
from moe_backend.checkpoint.convert import TARGETS, ConversionReport, convert
from moe_backend.checkpoint.layout import ExpertModule, MoeLayer, find_moe_layers
from moe_backend.checkpoint.preflight import preflight
from moe_backend.checkpoint.reader import Checkpoint, CheckpointError, TensorInfo

__all__ = [
    "TARGETS",
    "Checkpoint",
    "CheckpointError",
    "ConversionReport",
    "ExpertModule",
    "MoeLayer",
    "TensorInfo",
    "add_convert_arguments",
    "convert",
    "find_moe_layers",
    "preflight",
    "run_convert",
]
